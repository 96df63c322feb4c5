"""AuthorizationPolicies, case by case: who asks what of a service through a real Envoy; who is refused."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import random
import socket
import socketserver
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
import pytest
import yaml

from pykmesh.contracts.handoff import ID_BYTES, NOBODY, Identity
from pykmesh.contracts.waypoints import Endpoint, account_name
from pykmesh.manifests.objects import (
    AuthorizationPolicy,
    ObjectRef,
    RequestAuthentication,
    from_plain,
)
from services.waypoint_mgr.attachments import Condition
from services.waypoint_mgr.policies import Clients, names_in, unenforced
from services.waypoint_mgr.source import DRY_RUN, Authentication, Objects, Policy

from .backends import DEADLINE_S, Backend
from .world import (
    DOMAIN,
    SECRET,
    World,
    ads_server,
    at,
    gateway,
    kubernetes_service,
    mesh_service,
    named,
    refusal_aside,
    waypoint,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

CASES: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent.parent / "data/waypoint/policies.yaml").read_text()
)
IPV6_FREEBIND = 78
"""linux/in6.h"""
TO_WEB = [{"kind": "Service", "name": "web"}]


def an_id(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=ID_BYTES).digest()


def client(name: str) -> Identity:
    """Of namespace/account."""
    namespace, _, account = name.partition("/")
    return Identity(an_id(namespace), an_id(account_name(namespace, account))) if account else NOBODY


def clients_of(policies: list[Policy]) -> Clients:
    names = names_in(policies)
    return Clients(
        {n: an_id(n) for n in names.namespaces},
        {p: an_id(p) for p in names.accounts},
        service_secret=SECRET,
    )


def policy(namespace: str, name: str, spec: dict[str, Any]) -> Policy:
    """For the Service web, if it does not say otherwise."""
    annotations = {DRY_RUN: "true"} if spec.pop("dryRun", False) else {}
    targets = {} if {"selector", "targetRef"} & spec.keys() else {"targetRefs": TO_WEB}
    plain = {
        "metadata": {"name": name, "namespace": spec.pop("namespace", namespace), "annotations": annotations},
        "spec": {**targets, **spec},
    }
    made = from_plain(plain, AuthorizationPolicy)
    assert isinstance(made, AuthorizationPolicy)
    return Policy.of(made, DOMAIN, {})


def with_port(value: Any, port: int, here: str) -> Any:
    """A case's texts, with what it cannot know."""
    if isinstance(value, dict):
        return {key: with_port(item, port, here) for key, item in value.items()}
    if isinstance(value, list):
        return [with_port(item, port, here) for item in value]
    return value.replace("PORT", str(port)).replace("HERE", here) if isinstance(value, str) else value


class Guarded:
    """All cases at once, each in a namespace of its own."""

    def __init__(self, port: int, conditions: tuple[Condition, ...]) -> None:
        self.port = port
        self.conditions = conditions

    def ask(self, case: int, request: dict[str, Any]) -> int:
        who = client(request.get("as", "shop/web").replace("HERE", namespace(case)))
        host = request.get("host", "web").replace("PORT", str(self.port))
        headers = {"Host": host, **request.get("headers", {})}
        connection = http.client.HTTPConnection(at(address(case), who), self.port, timeout=DEADLINE_S)
        try:
            if "from" in request:
                connection.sock = connected(at(address(case), who), self.port, request["from"])
            connection.request(request.get("method", "GET"), request.get("path", "/"), headers=headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()


def connected(address: str, port: int, source: str) -> socket.socket:
    """From an address that is no interface's."""
    sock = socket.socket(socket.AF_INET6)
    sock.settimeout(DEADLINE_S)
    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    sock.bind((source, 0))
    sock.connect((address, port))
    return sock


def namespace(case: int) -> str:
    return f"case-{case}"


def address(case: int) -> str:
    return f"127.0.6.{case + 1}"


@pytest.fixture(scope="module")
async def guarded(
    one_event_loop: None, tmp_path_factory: pytest.TempPathFactory, backends: dict[str, Backend]
) -> AsyncIterator[Guarded]:
    folder, world = tmp_path_factory.mktemp("w"), World()
    async with ads_server(folder / "ads") as server, waypoint(server, folder, "e") as envoy:
        for case, said in enumerate(CASES):
            here = namespace(case)
            world.add_user(
                mesh_service(here, "web", {envoy.port: [backends["own"].endpoint]}, [address(case)]),
                kubernetes_service(here, "web", {"port": envoy.port, "name": "http"}),
            )
            world.policies += [
                policy(here, f"policy-{number}", with_port(spec, envoy.port, here))
                for number, spec in enumerate(said.get("policies", []))
            ]
        world.clients = clients_of(world.policies)
        made = world.configuration()
        status = await envoy.apply(made)
        assert not status.refusals
        assert await refusal_aside(made) == ""
        await envoy.ready()
        yield Guarded(envoy.port, made.policies)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case["case"] for case in CASES])
async def test_a_request_is_let_through_or_refused_as_the_policies_say(case: int, guarded: Guarded) -> None:
    for status, key in ((200, "ok"), (403, "denied")):
        for request in CASES[case].get(key, []):
            said = await anyio.to_thread.run_sync(guarded.ask, case, request)
            assert said == status, request
    told = {
        f"{one.type}={one.status}": one.message
        for one in guarded.conditions
        if one.of.namespace == namespace(case) and one.type != "Accepted"
    }
    expected = CASES[case].get("told", {})
    assert told.keys() == expected.keys()
    for key, part in expected.items():
        assert part in told[key]


async def test_each_policy_of_the_waypoint_is_accepted(guarded: Guarded) -> None:
    accepted = {one.of for one in guarded.conditions if one.type == "Accepted" and one.status}
    cases = {case["case"]: number for number, case in enumerate(CASES)}
    there = namespace(cases["a principal"])
    assert ObjectRef("AuthorizationPolicy", there, "policy-0") in accepted
    nobodys = namespace(cases["one for the class elsewhere is nobody's"])
    assert ObjectRef("AuthorizationPolicy", nobodys, "policy-0") not in accepted


class Greeter(socketserver.BaseRequestHandler):
    """Speaks first, then says what it hears."""

    def handle(self) -> None:
        self.request.sendall(b"hello ")
        self.request.sendall(self.request.recv(100))


@contextmanager
def greeting() -> Iterator[Endpoint]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greeter) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield Endpoint("127.0.0.1", server.server_address[1])
        finally:
            server.shutdown()


FROM_SHOP = {"from": [{"source": {"namespaces": ["shop"]}}]}
BUT_ONE = {"from": [{"source": {"notPrincipals": ["cluster.local/ns/shop/sa/web"]}}]}
FROM_HERE = {"from": [{"source": {"ipBlocks": ["::/0"], "namespaces": ["shop"]}}]}
FROM_THERE = {"from": [{"source": {"ipBlocks": ["192.0.2.1"]}}]}
GETS = {"to": [{"operation": {"methods": ["GET"]}}]}


@pytest.mark.parametrize(
    ("action", "rule", "served"),
    [
        ("ALLOW", FROM_SHOP, {"shop/web", "shop/x"}),
        ("DENY", FROM_SHOP, {"bank/x"}),
        ("ALLOW", BUT_ONE, {"shop/x", "bank/x"}),
        ("DENY", BUT_ONE, {"shop/web"}),
        ("ALLOW", FROM_HERE, {"shop/web", "shop/x"}),
        ("DENY", FROM_THERE, {"shop/web", "shop/x", "bank/x", "nobody"}),
        ("ALLOW", GETS, set()),
        ("DENY", GETS, set()),
    ],
)
async def test_of_a_port_that_is_no_http_connections_are_refused_before_a_server_speaks(
    folder: Path, action: str, rule: dict[str, Any], served: set[str]
) -> None:
    world = World()
    with greeting() as endpoint:
        async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
            world.add_user(
                mesh_service("shop", "web", {envoy.port: [endpoint]}, ["127.0.7.1", "::7"]),
                kubernetes_service("shop", "web", {"port": envoy.port, "name": "tcp"}),
            )
            world.policies = [policy("shop", "only", {"action": action, "rules": [rule]})]
            world.clients = clients_of(world.policies)
            status = await envoy.apply(world.configuration())
            assert not status.refusals
            await envoy.ready()

            def hears(vip: str, who: str) -> bytes:
                heard = b""
                sock = socket.create_connection((at(vip, client(who)), envoy.port), DEADLINE_S)
                with sock, contextlib.suppress(ConnectionError):
                    heard = sock.recv(6)
                    sock.sendall(b"you")
                    heard += sock.recv(6)
                return heard

            for who in ("shop/web", "shop/x", "bank/x", "nobody"):
                for vip in ("127.0.7.1", "::7"):
                    heard = await anyio.to_thread.run_sync(hears, vip, who)
                    assert heard == (b"hello you" if who in served else b""), who


async def test_a_condition_that_must_be_asked_is_asked_at_the_first_byte(folder: Path) -> None:
    world = World()
    with greeting() as endpoint:
        async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
            world.add_user(
                mesh_service("shop", "web", {envoy.port: [endpoint]}, ["127.0.7.1"]),
                kubernetes_service("shop", "web", {"port": envoy.port, "name": "tcp"}),
            )
            world.policies = [policy("shop", "only", {"rules": [FROM_THERE]})]
            await envoy.apply(world.configuration())
            await envoy.ready()

            def answer() -> bytes:
                sock = socket.create_connection((at("127.0.7.1"), envoy.port), DEADLINE_S)
                with sock, contextlib.suppress(ConnectionError):
                    sock.recv(6)
                    sock.sendall(b"you")
                    return sock.recv(6)
                return b""

            assert await anyio.to_thread.run_sync(answer) == b""


def a_policy(policy_name: str, **target: str) -> Policy:
    targets = [{"kind": "Service", **target}] if target else []
    return policy("shop", policy_name, {"targetRefs": targets})


def test_a_policy_that_nobody_enforces_is_told() -> None:
    waypoints = {named("shop", "waypoint"): gateway()}
    gate = {"group": "gateway.networking.k8s.io", "kind": "Gateway"}
    policies = (
        a_policy("reached", name="web"),
        a_policy("past", name="direct"),
        a_policy("waypoint", **gate, name="waypoint"),
        a_policy("no-waypoint", **gate, name="nobody"),
        a_policy("of-workloads"),
        policy("shop", "two", {"targetRefs": [*TO_WEB, {"kind": "Service", "name": "wbe"}]}),
        policy("shop", "class", {"targetRefs": [{**gate, "kind": "GatewayClass", "name": "istio-waypoint"}]}),
    )
    objects = Objects(waypoints=waypoints, policies=policies)
    found = unenforced(objects, {named("shop", "waypoint"): [named("shop", "web")]})
    assert {ref.name for ref in found} == {"past", "no-waypoint", "of-workloads", "two", "class"}
    assert found[ObjectRef("AuthorizationPolicy", "shop", "two")].endswith(named("shop", "wbe"))
    assert "targetRefs" in found[ObjectRef("AuthorizationPolicy", "shop", "of-workloads")]


def test_tokens_that_nobody_checks_are_told_too() -> None:
    def of(name: str, **spec: Any) -> Authentication:
        plain = {"metadata": {"name": name, "namespace": "shop"}, "spec": spec}
        made = from_plain(plain, RequestAuthentication)
        assert isinstance(made, RequestAuthentication)
        return Authentication.of(made, DOMAIN, {})

    found = unenforced(
        Objects(
            waypoints={named("shop", "waypoint"): gateway()},
            authentications=(
                of("reached", targetRefs=TO_WEB),
                of("past", targetRefs=[{"kind": "Service", "name": "direct"}]),
                of("of-workloads", selector={"matchLabels": {"app": "web"}}),
            ),
        ),
        {named("shop", "waypoint"): [named("shop", "web")]},
    )
    assert {str(ref) for ref in found} == {
        "RequestAuthentication shop/past",
        "RequestAuthentication shop/of-workloads",
    }


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"rules": [{"form": []}]}, "unknown field `form`"),
        ({"rules": [{"from": [{"source": {}}]}]}, "a source must say something"),
        ({"rules": [{"from": [{"source": {"principal": ["x"]}}]}]}, "unknown field `principal`"),
        ({"rules": [{"to": [{"operation": {}}]}]}, "an operation must say something"),
        ({"rules": [{"when": [{"key": "source.namespace"}]}]}, "one or both of values and notValues"),
        ({"rules": [{"when": [{"key": "source.name", "values": ["x"]}]}]}, "key is not known"),
        ({"rules": [{"when": [{"key": "request.headers[x y]", "values": ["x"]}]}]}, "key is not known"),
        ({"rules": [{"from": [{"source": {"ipBlocks": ["1.2.3"]}}]}]}, "Not an IP address"),
        ({"rules": [{"to": [{"operation": {"ports": ["http"]}}]}]}, "ports"),
        ({"action": "PERMIT"}, "Invalid enum value"),
        ({"targetRefs": [{"kind": "Deployment", "name": "x"}]}, "no target of policies"),
        ({"selector": {}, "targetRefs": [{"kind": "Service", "name": "x"}]}, "at most one of"),
        ({"targetRefs": [{"kind": "Service", "name": "x", "namespace": "other"}]}, "another namespace"),
    ],
)
def test_a_policy_that_is_wrong_is_refused_by_the_field(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        from_plain({"metadata": {"name": "x"}, "spec": spec}, AuthorizationPolicy)


NASTY = [
    "*",
    "**",
    "x*",
    "*x",
    "a b",
    "é",
    "\t",
    "{x}",
    "/",
    "//",
    "a" * 300,
    "%",
    "\\",
    "()[+",
    "::1",
    "1.2.3.4",
]
FIELDS = {
    "source": ["principals", "notPrincipals", "namespaces", "notNamespaces", "requestPrincipals"],
    "operation": ["hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"],
}
KEYS = ["request.headers[x-a]", "request.headers[:method]", "source.ip", "destination.ip", "destination.port",
        "source.principal", "source.namespace", "connection.sni", "request.auth.claims[a]"]  # fmt: skip


def drawn(draw: random.Random) -> dict[str, Any]:
    """Some rule that may be written."""

    def part(kind: str) -> dict[str, Any]:
        return {kind: {draw.choice(FIELDS[kind]): draw.sample(NASTY, draw.randrange(1, 4)) for _ in range(2)}}

    def when() -> dict[str, Any]:
        return {"key": draw.choice(KEYS), draw.choice(["values", "notValues"]): draw.sample(NASTY, 2)}

    return {
        "from": [part("source") for _ in range(draw.randrange(3))],
        "to": [part("operation") for _ in range(draw.randrange(3))],
        "when": [when() for _ in range(draw.randrange(3))],
    }


@pytest.mark.parametrize("name", ["http", "tcp"])
async def test_whatever_a_policy_says_envoy_takes(folder: Path, name: str) -> None:
    """One that it refused would keep all others of the waypoint as they were."""
    draw, world = random.Random(name), World()
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        for number in range(60):
            here = f"n-{number}"
            vips = [f"127.0.9.{number + 1}", f"fd96::{number + 1:x}"]
            world.add_user(
                mesh_service(here, "web", {80: []}, vips),
                kubernetes_service(here, "web", {"port": 80, "name": name}),
            )
            for action in ("ALLOW", "DENY"):
                rules = [drawn(draw) for _ in range(3)]
                world.policies.append(policy(here, action.lower(), {"action": action, "rules": rules}))
        world.clients = clients_of(world.policies)
        status = await envoy.apply(world.configuration())
        assert not status.refusals
        assert status.is_current
