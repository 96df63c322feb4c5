"""Gateway API's GRPCRoute: calls through a real Envoy, by service, method and header."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest

from pykmesh.contracts.waypoints import Endpoint
from pykmesh.manifests.objects import KINDS, from_plain
from services.waypoint_mgr.routes import Configuration

from .world import DEADLINE_S, World, ads_server, at, grpc_route, kubernetes_service, mesh_service, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

ADDRESS = "127.0.4.1"
V1, V2, NONE = ({"name": name, "port": 80} for name in ("v1", "v2", "none"))


class Named(grpc.GenericRpcHandler):
    """Answers each call with a name, what it was asked for, and one header."""

    def __init__(self, name: str) -> None:
        self._name = name

    def service(self, details: Any) -> Any:
        async def answer(_: bytes, context: Any) -> bytes:
            seen = dict(context.invocation_metadata() or ())
            return f"{self._name} {details.method} {seen.get('x-added', '-')}".encode()

        return grpc.unary_unary_rpc_method_handler(answer)


@asynccontextmanager
async def backend(name: str) -> AsyncIterator[Endpoint]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Named(name),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Endpoint("127.0.0.1", port)
    await server.stop(grace=None)


class Caller:
    def __init__(self, target: str, made: Configuration) -> None:
        self._target = target
        self.made = made

    async def call(
        self, method: str, metadata: Sequence[tuple[str, str]] = (), times: int = 1
    ) -> Counter[str]:
        """Answers, or the names of the statuses instead."""
        found: Counter[str] = Counter()
        async with grpc.aio.insecure_channel(self._target) as channel:
            for _ in range(times):
                try:
                    said = await channel.unary_unary(method)(b"", metadata=metadata, timeout=DEADLINE_S)
                    found[said.decode()] += 1
                except grpc.aio.AioRpcError as error:
                    found[error.code().name] += 1
        return found


@asynccontextmanager
async def routed(folder: Path, *rules: dict[str, Any], **spec: Any) -> AsyncIterator[Caller]:
    """No port of a service says what it carries: the route does."""
    async with AsyncExitStack() as opened:
        server = await opened.enter_async_context(ads_server(folder / "ads"))
        envoy = await opened.enter_async_context(waypoint(server, folder))
        world = World()
        own = await opened.enter_async_context(backend("own"))
        user = mesh_service("shop", "web", {envoy.port: [own]}, [ADDRESS])
        world.add_user(user, kubernetes_service("shop", "web", {"port": envoy.port}))
        for name in ("v1", "v2"):
            endpoint = await opened.enter_async_context(backend(name))
            world.add_backend(mesh_service("shop", name, {80: [endpoint]}))
        world.routes.append(grpc_route("shop", "r", {"rules": list(rules), **spec}))
        made = world.configuration()
        await envoy.apply(made)
        await envoy.ready()
        yield Caller(f"[{at(ADDRESS)}]:{envoy.port}", made)


def method(**said: str) -> dict[str, Any]:
    return {"method": said}


async def test_service_method_and_header_choose(folder: Path) -> None:
    cart = method(service="shop.Cart")
    regular = method(type="RegularExpression", service=r"old\..*", method="Get.*")
    either = method(type="RegularExpression", service="new|newer", method="Go|Run")
    rules = [
        {"matches": [method(service="shop.Cart", method="Add")], "backendRefs": [V1]},
        {"matches": [cart], "backendRefs": [V2]},
        {"matches": [method(method="Ping")], "backendRefs": [V1]},
        {"matches": [regular], "backendRefs": [V2]},
        {"matches": [either], "backendRefs": [V1]},
        {"matches": [method(service="best.Thing")], "backendRefs": [V2]},
        {"matches": [cart | {"headers": [{"name": "x-canary", "value": "yes"}]}], "backendRefs": [V1]},
    ]
    async with routed(folder, *rules) as caller:
        for asked, expected in {
            "/shop.Cart/Add": "v1",
            "/shop.Cart/Remove": "v2",
            "/shop.Cartoon/Add": "UNIMPLEMENTED",
            "/any.Thing/Ping": "v1",
            "/best.Thing/Ping": "v2",
            "/old.Thing/GetAll": "v2",
            "/old.Thing/SetAll": "UNIMPLEMENTED",
            "/new/Run": "v1",
            "/newer/Go": "v1",
            "/new": "UNIMPLEMENTED",
        }.items():
            (said,) = await caller.call(asked)
            assert said.split()[0] == expected, asked
        (said,) = await caller.call("/shop.Cart/Remove", [("x-canary", "yes")])
        assert said.split()[0] == "v1"


async def test_weights_split_and_headers_are_added(folder: Path) -> None:
    modifier = {"set": [{"name": "x-added", "value": "a"}]}
    add = {"type": "RequestHeaderModifier", "requestHeaderModifier": modifier}
    split = {"filters": [add], "backendRefs": [V1 | {"weight": 3}, V2 | {"weight": 1}]}
    async with routed(folder, split) as caller:
        found = await caller.call("/a.B/C", times=200)
        assert found.keys() == {"v1 /a.B/C a", "v2 /a.B/C a"}
        assert 110 < found["v1 /a.B/C a"] < 190


async def test_what_has_no_backend_is_unavailable_and_told(folder: Path) -> None:
    nowhere = {"matches": [method(service="a.B")], "backendRefs": [NONE]}
    half = {"matches": [method(service="c.D")], "backendRefs": [V1, NONE]}
    nobody = {"matches": [method(service="e.F")]}
    async with routed(folder, nowhere, half, nobody) as caller:
        assert (await caller.call("/a.B/C")).keys() == {"UNAVAILABLE"}
        found = await caller.call("/c.D/E", times=60)
        assert found.keys() == {"UNAVAILABLE", "v1 /c.D/E -"}
        assert (await caller.call("/e.F/G")).keys() == {"UNAVAILABLE"}
        conditions = {(str(c.of), c.type): (c.status, c.reason) for c in caller.made.conditions}
        assert conditions == {
            ("GRPCRoute shop/r", "Accepted"): (True, "Accepted"),
            ("GRPCRoute shop/r", "ResolvedRefs"): (False, "BackendNotFound"),
        }


async def test_of_a_services_route_no_host_is_asked(folder: Path) -> None:
    async with routed(folder, {"backendRefs": [V1]}, hostnames=["elsewhere.example"]) as caller:
        assert (await caller.call("/a.B/C")).keys() == {"v1 /a.B/C -"}


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"matches": [method()]}, "one or both of service and method must be given"),
        ({"matches": [method(service="a/b")]}, "service must be a name of protobuf's: 'a/b'"),
        ({"matches": [method(method="a-b")]}, "method must be a name of protobuf's: 'a-b'"),
        (
            {"filters": [{"type": "URLRewrite", "urlRewrite": {"hostname": "a.example"}}]},
            "filter URLRewrite is none of a GRPCRoute",
        ),
    ],
)
async def test_what_is_no_grpc_route_is_told_by_its_field(rule: dict[str, Any], told: str) -> None:
    plain = {"metadata": {"name": "r"}, "spec": {"rules": [rule]}}
    with pytest.raises(msgspec.ValidationError) as raised:
        from_plain(plain, KINDS["gateway.networking.k8s.io", "GRPCRoute"])
    assert told in str(raised.value)
    assert "$.spec.rules[0]" in str(raised.value)
