"""What goes through an Envoy beside plain HTTP/1.1, and both families of addresses."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import grpc.aio
import pytest

from pykmesh.contracts.waypoints import Endpoint
from services.waypoint_mgr.encode import ROUTE_TYPE, encode, resources
from services.waypoint_mgr.regexes import error_in

from .backends import DEADLINE_S, Backend, ask
from .test_instance import canary
from .world import World, ads_server, at, http_route, kubernetes_service, mesh_service, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

ECHO = "/test.Echo/Say"
UPGRADE = b"GET /chat HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@asynccontextmanager
async def grpc_server() -> AsyncIterator[Endpoint]:
    """Answers with what it was asked."""

    async def say(request: bytes, _: object) -> bytes:
        return request

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(say)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Say": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Endpoint("127.0.0.1", port)
    await server.stop(grace=None)


async def test_grpc_goes_through_and_is_routed_by_its_method(folder: Path) -> None:
    async with (
        grpc_server() as endpoint,
        ads_server(folder / "ads") as server,
        waypoint(server, folder) as envoy,
    ):
        world = World()
        world.add_user(
            mesh_service("shop", "web", {envoy.port: []}, ["127.0.1.3"]),
            kubernetes_service("shop", "web", {"port": envoy.port, "name": "grpc"}),
        )
        world.add_backend(mesh_service("shop", "echo", {80: [endpoint]}))
        world.services["shop/echo.shop.svc.cluster.local"] = kubernetes_service(
            "shop", "echo", {"port": 80, "appProtocol": "kubernetes.io/h2c"}
        )
        match = {"path": {"type": "Exact", "value": ECHO}}
        rule = {"matches": [match], "backendRefs": [{"name": "echo", "port": 80}]}
        world.routes.append(http_route("shop", "r", {"rules": [rule]}))
        await envoy.apply(world.configuration())
        await envoy.ready()
        async with grpc.aio.insecure_channel(f"[{at('127.0.1.3')}]:{envoy.port}") as channel:
            assert await channel.unary_unary(ECHO)(b"hello", timeout=DEADLINE_S) == b"hello"
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary("/test.Echo/Other")(b"", timeout=DEADLINE_S)
            assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


@contextmanager
def upgrading() -> Iterator[Endpoint]:
    """A server that takes an upgrade, and then repeats what it hears."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                heard = b""
                while b"\r\n\r\n" not in heard:
                    heard += connection.recv(4096)
                connection.sendall(UPGRADED)
                connection.sendall(connection.recv(4096))

        thread = threading.Thread(target=serve)
        thread.start()
        yield Endpoint("127.0.0.1", listening.getsockname()[1])
        thread.join(DEADLINE_S)


async def test_websockets_go_through(folder: Path) -> None:
    with upgrading() as endpoint:
        async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
            world = World()
            world.add_user(
                mesh_service("shop", "web", {envoy.port: [endpoint]}, ["127.0.1.4"]),
                kubernetes_service("shop", "web", {"port": envoy.port, "name": "http"}),
            )
            await envoy.apply(world.configuration())
            await envoy.ready()

            def converse() -> tuple[bytes, bytes]:
                with socket.create_connection((at("127.0.1.4"), envoy.port), timeout=DEADLINE_S) as sock:
                    sock.sendall(UPGRADE)
                    answer = b""
                    while b"\r\n\r\n" not in answer:
                        answer += sock.recv(4096)
                    sock.sendall(b"ping")
                    return answer.split(b"\r\n", 1)[0], sock.recv(4)

            assert await anyio.to_thread.run_sync(converse) == (b"HTTP/1.1 101 Switching Protocols", b"ping")


async def test_services_of_both_families_come_in_at_one_listener(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        world = canary(backends, envoy.port)
        (web,) = world.users
        world.users = [
            mesh_service("shop", "web", {envoy.port: web.ports[0].endpoints}, ["127.0.1.5", "::1"])
        ]
        server.publish(envoy.spec.node_id, resources(world.configuration(), "::", envoy.port))
        with anyio.fail_after(DEADLINE_S):
            assert (await server.settled(envoy.spec.node_id)).is_current
        await envoy.ready()
        for address in ("127.0.1.5", "::1"):
            answer = await anyio.to_thread.run_sync(lambda address=address: ask(at(address), envoy.port))
            assert answer.status == 200


TAKEN = ("/a/[^/]+", r"\d{3}-\w*?", "(?i)abc", "(?P<n>a|b)+", r"[[:alpha:]]\.", r"([0-9a-f]{4}-){3}x{12}",
         "/tenants/[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/items", ".{1000}" * 8, "(?:a|bc|d){500}",
         "/[a-z0-9-]{1,63}(/[^/]{1,63}){0,9}", r"(?i)[\w.]{999}", "a{*}b{")  # fmt: skip
REFUSED = ("(", "a**", "[b-a]", "(?=a)", "(?<!a)b", r"(a)\1", "(?P<n>a)(?P=n)", "(?>a)", "a++", "a{1001}",
           "[[:foo:]]", "(?P<é>x)", "(?x)a", "(?#c)", r"a\Z", r"[\b]", r"\é", "(a{100}){100}",
           ".{1000}" * 17, "[a-z_]{999}" * 17, r"(?:\W{10}){99}" * 8, "(?:(?:x{30}y?){30})" * 40)  # fmt: skip


async def test_envoy_takes_and_refuses_the_same_regular_expressions(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        good = canary(backends, envoy.port).configuration()
        await envoy.apply(good)
        (name,) = good.routes

        async def is_refused(*patterns: str) -> bool:
            routes = [
                {"match": {"safeRegex": {"regex": one}}, "directResponse": {"status": 200}}
                for one in patterns
            ]
            hosts = [{"name": "a", "domains": ["*"], "routes": routes}]
            changed = dict(resources(good, "::", envoy.port))
            changed[ROUTE_TYPE] = {name: encode(ROUTE_TYPE, {"name": name, "virtualHosts": hosts})}
            server.publish(envoy.spec.node_id, changed)
            with anyio.fail_after(DEADLINE_S):
                return bool((await server.settled(envoy.spec.node_id)).refusals)

        assert not any(map(error_in, TAKEN))
        assert not await is_refused(*TAKEN)
        for pattern in REFUSED:
            assert error_in(pattern)
            assert await is_refused(pattern), pattern
