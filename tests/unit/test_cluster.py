"""What is read of an API server's objects, and what is written on them."""

from __future__ import annotations

import http
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx2
import msgspec
import pytest

from pykmesh.contracts.waypoints import node_of_front, slice_name
from pykmesh.manifests.authorization_policy import Action
from pykmesh.manifests.objects import (
    WAYPOINT_CLASS,
    AuthorizationPolicy,
    DestinationRule,
    Gateway,
    HTTPRoute,
    ObjectRef,
)
from services.waypoint_mgr import cluster
from services.waypoint_mgr.attachments import Condition, Listener, listeners_of
from services.waypoint_mgr.cluster import READ, Cluster, _in_place_of, _read, _ref, resource, status_of
from services.waypoint_mgr.cluster_status import CONTROLLER, gateway_status, route_parents
from services.waypoint_mgr.destinations import Destinations
from services.waypoint_mgr.envoy import Port
from services.waypoint_mgr.protocols import AppProtocol
from services.waypoint_mgr.source import Destination, Objects
from tests.waypoint.world import DOMAIN, gateway, named

BEFORE, NOW = "2026-01-01T00:00:00Z", "2026-02-02T00:00:00Z"
KINDS = {kind.name: kind for kind in READ}
SERVICE = {"group": "", "kind": "Service", "name": "shop"}
OTHERS = {"parentRef": SERVICE, "controllerName": "istio.io/mesh-controller", "conditions": []}


def policy(version: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p", "namespace": "shop", "resourceVersion": version}, "spec": spec}


def route(*parents: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": "r", "namespace": "shop", "generation": 7}
    return {"metadata": metadata, "spec": {"parentRefs": [SERVICE]}, "status": {"parents": [*parents]}}


def said(kind: str, *, status: bool = True) -> Condition:
    of, parent = ObjectRef("HTTPRoute", "shop", "r"), ObjectRef("Service", "shop", "shop")
    return Condition(of, parent, kind, status, kind, generation=7)


def ours(kind: str, status: str, since: str) -> dict[str, Any]:
    condition = {
        "type": kind,
        "status": status,
        "reason": kind,
        "message": "",
        "observedGeneration": 7,
        "lastTransitionTime": since,
    }
    return {"parentRef": SERVICE, "controllerName": CONTROLLER, "conditions": [condition]}


def test_a_policy_that_never_could_be_read_refuses_all_at_its_targets() -> None:
    kind = KINDS["AuthorizationPolicy"]
    target = {"kind": "Service", "group": "", "name": "shop"}
    plain = policy("1", action="ALLOW", rules=[{"nobody": "knows"}], targetRefs=[target])
    found = _read(kind, _ref(kind, plain), plain, None)
    assert "nobody" in found.error
    assert denied(plain) == ["shop"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([{"kind": "Service", "name": "web"}, {"kind": "Pod", "name": "b"}], ["web"]),
        ([{"kind": "Service", "name": "web"}, {"kind": "Service", "name": "b", "namespace": "x"}], ["web"]),
        ([{"kind": "Pod", "name": "b"}], ["wp", "wp2"]),
        ([7], ["wp", "wp2"]),
        ([], []),
    ],
)
def test_it_does_so_where_its_targets_can_be_read_else_at_its_namespaces_waypoints(
    targets: list[Any], expected: list[str]
) -> None:
    assert denied(policy("1", action="ALLOW", rules=[{"nobody": "knows"}], targetRefs=targets)) == expected


def denied(plain: dict[str, Any], kind: str = "AuthorizationPolicy") -> list[str]:
    """Whose clients a policy refuses, all of them."""
    gateways = [ObjectRef("Gateway", *each) for each in (("shop", "wp"), ("shop", "wp2"), ("other", "wp3"))]
    made = _in_place_of(ObjectRef(kind, "shop", "p"), plain, gateways)
    assert isinstance(made, AuthorizationPolicy)
    assert made.spec.action is Action.DENY
    assert [rule.from_ for rule in made.spec.rules] == [()]
    return [each.name for each in made.spec.targets]


def test_one_that_could_counts_as_it_was_until_it_can_be_read_again() -> None:
    kind = KINDS["AuthorizationPolicy"]
    good = policy("1", action="ALLOW", targetRefs=[{"kind": "Service", "group": "", "name": "shop"}])
    first = _read(kind, _ref(kind, good), good, None)
    broken = policy("2", action="NONE")
    second = _read(kind, _ref(kind, broken), broken, first)
    assert (second.object, second.version) == (first.object, "2")
    assert second.error.startswith("AuthorizationPolicy shop/p: ")
    assert _read(
        kind, _ref(kind, good), good | {"metadata": good["metadata"] | {"resourceVersion": "3"}}, second
    ) == (first._replace(plain=good | {"metadata": good["metadata"] | {"resourceVersion": "3"}}, version="3"))


@pytest.mark.parametrize(
    ("spec", "host"),
    [
        ({"host": "web", "trafficPolicy": {"tls": {"mode": "SIMPLE"}, "loadBalancer": 7}}, "web"),
        ({"host": "web", "subsets": [{"name": 1, "trafficPolicy": {"tls": {"mode": "SIMPLE"}}}]}, "web"),
        ({"host": "web", "trafficPolicy": {"loadBalancer": 7}}, ""),
        ({"host": 1, "trafficPolicy": {"tls": {"mode": "SIMPLE"}}}, ""),
        ("nothing", ""),
    ],
)
def test_who_is_to_be_spoken_to_in_tls_by_a_rule_that_cannot_be_read_is_not_spoken_to(
    spec: Any, host: str
) -> None:
    made = _in_place_of(ObjectRef("DestinationRule", "shop", "d"), {"spec": spec}, ())
    assert (made is not None) == bool(host)
    if isinstance(made, DestinationRule):
        assert made.spec.host == host
        rules = Destinations(gateway(), [Destination.of(made, DOMAIN)])
        assert rules.encryption(Port(named("shop", "web"), 80), AppProtocol.HTTP).is_closed


@pytest.mark.parametrize(
    "of_target", [{"group": "", "kind": "Service", "name": "web"}, {"group": "x", "kind": "Y", "name": "web"}]
)
def test_a_backend_whose_tls_policy_cannot_be_read_is_not_spoken_to(of_target: dict[str, str]) -> None:
    ref = ObjectRef("BackendTLSPolicy", "shop", "b")
    plain = {"spec": {"targetRefs": [of_target, 7], "validation": 5}}
    made = _in_place_of(ref, plain, ())
    assert made is not None
    rules = Destinations(gateway(), [], Objects.of([made], DOMAIN).backend_tls)
    is_closed = rules.encryption(Port(named("shop", "web"), 80), AppProtocol.HTTP).is_closed
    assert is_closed == (of_target["group"] == "")


def test_tokens_whose_rules_cannot_be_read_are_asked_of_nobody_for_nobody_gets_in() -> None:
    target = {"kind": "Service", "group": "", "name": "web"}
    assert denied(policy("1", jwtRules=[{"who": "knows"}], targetRefs=[target]), "RequestAuthentication") == [
        "web"
    ]


def test_a_field_that_is_not_known_is_told_and_the_rest_counts() -> None:
    kind = KINDS["HTTPRoute"]
    plain = {**route(), "spec": {"rules": [{"matches": [{"path": {"value": "/a"}}], "backends": []}]}}
    found = _read(kind, _ref(kind, plain), plain, None)
    assert found.object is not None
    assert found.error == "HTTPRoute shop/r: not known here: .spec.rules[0].backends"


def test_a_route_that_cannot_be_read_is_told_and_missing() -> None:
    kind = KINDS["HTTPRoute"]
    plain = {**route(), "spec": {"rules": [{"timeouts": {"request": "soon"}}]}}
    found = _read(kind, _ref(kind, plain), plain, None)
    assert found.object is None
    assert "soon" in found.error or "timeouts" in found.error


def test_conditions_are_of_the_generation_that_was_read() -> None:
    plain = route(ours("Accepted", "True", BEFORE))
    plain["metadata"]["generation"] = 8
    (found,) = route_parents(plain, [said("Accepted")], NOW)
    assert found["conditions"][0]["observedGeneration"] == 7


def test_a_parent_of_another_group_is_another() -> None:
    plain = route()
    plain["spec"]["parentRefs"] = [SERVICE | {"group": "example.com"}]
    assert not route_parents(plain, [said("Accepted")], NOW)


def test_what_others_say_of_a_route_stays_and_what_stays_so_keeps_its_time() -> None:
    plain = route(OTHERS, ours("Accepted", "True", BEFORE))
    assert route_parents(plain, [said("Accepted")], NOW) == [OTHERS, ours("Accepted", "True", BEFORE)]
    changed = route_parents(plain, [said("Accepted", status=False)], NOW)
    assert changed == [OTHERS, ours("Accepted", "False", NOW)]


def test_what_is_said_of_a_route_no_more_goes() -> None:
    assert route_parents(route(OTHERS, ours("Accepted", "True", BEFORE)), [], NOW) == [OTHERS]


@pytest.mark.parametrize("namespace", ["other", ""])
def test_a_parent_is_one_of_its_namespace(namespace: str) -> None:
    plain = route()
    plain["spec"]["parentRefs"] = [SERVICE | {"namespace": namespace}]
    assert bool(route_parents(plain, [said("Accepted")], NOW)) == (namespace == "")


def test_a_gateway_has_addresses_once_it_is_reachable_and_keeps_them() -> None:
    plain: dict[str, Any] = {"metadata": {"generation": 2}}
    first = gateway_status(plain, ["10.0.0.1"], "wp.shop", None, is_reachable=False, now=BEFORE)
    assert first["addresses"] == []
    assert [(c["type"], c["status"]) for c in first["conditions"]] == [
        ("Accepted", "True"),
        ("Programmed", "False"),
    ]
    second = gateway_status(
        plain | {"status": first}, ["10.0.0.1"], "wp.shop", None, is_reachable=True, now=NOW
    )
    assert [each["value"] for each in second["addresses"]] == ["10.0.0.1", "wp.shop"]
    assert [c["lastTransitionTime"] for c in second["conditions"]] == [BEFORE, NOW]
    third = gateway_status(plain | {"status": second}, [], "wp.shop", None, is_reachable=False, now="later")
    assert third == second, "another node may reach it"


def test_each_listener_of_a_gateway_says_what_it_takes_and_how_many_it_has() -> None:
    kinds = [{"kind": "GRPCRoute"}, {"kind": "TLSRoute"}]
    listeners = [
        {"name": "mesh", "port": 15008, "protocol": "HBONE"},
        {
            "name": "grpc",
            "port": 15009,
            "protocol": "HBONE",
            "allowedRoutes": {"namespaces": {"from": "All"}, "kinds": kinds},
        },
    ]
    spec = {"gatewayClassName": WAYPOINT_CLASS, "listeners": listeners}
    found = msgspec.convert({"metadata": {"name": "wp", "namespace": "shop"}, "spec": spec}, Gateway)
    parent = ObjectRef("Gateway", "shop", "wp")
    routes = [
        Condition(ObjectRef(kind, namespace, "r"), parent, "Accepted", accepted, "", section=section)
        for kind, namespace, accepted, section in (
            ("HTTPRoute", "shop", True, ""),
            ("HTTPRoute", "shop", False, "mesh"),
            ("TCPRoute", "shop", True, "mesh"),
            ("GRPCRoute", "other", True, ""),
            ("GRPCRoute", "shop", True, "grpc"),
        )
    ]
    mesh, grpc = listeners_of(found, [*routes, said("Accepted")], {})
    assert mesh == Listener("mesh", ("GRPCRoute", "HTTPRoute", "TCPRoute"), are_kinds_known=True, routes=2)
    assert grpc == Listener("grpc", ("GRPCRoute",), are_kinds_known=False, routes=2)
    plain: dict[str, Any] = {"metadata": {"generation": 2}}
    status = gateway_status(plain, ["10.0.0.1"], "wp.shop", [mesh, grpc], is_reachable=True, now=NOW)
    for each, name, refs in zip(status["listeners"], ("mesh", "grpc"), ("True", "False"), strict=True):
        assert (each["name"], each["attachedRoutes"]) == (name, 2)
        assert {c["type"]: c["status"] for c in each["conditions"]} == {
            "Accepted": "True",
            "Programmed": "True",
            "Conflicted": "False",
            "ResolvedRefs": refs,
        }
    plain["status"] = status
    later = gateway_status(plain, ["10.0.0.1"], "wp.shop", [mesh, grpc], is_reachable=True, now="later")
    assert later == status
    del plain["status"]
    assert "listeners" not in gateway_status(plain, [], "wp.shop", None, is_reachable=True, now=NOW)


def test_a_gateway_whose_service_cannot_be_made_says_why() -> None:
    found = gateway_status(
        {"metadata": {}}, [], "wp.shop", None, is_reachable=False, why="it is another's", now=NOW
    )
    assert found["conditions"][1]["message"] == "it is another's"
    assert found["conditions"][1]["status"] == "False"


def test_every_kind_is_read_into_the_type_of_its_name() -> None:
    assert HTTPRoute.__name__ in KINDS
    for kind in READ:
        info = resource(kind)._api_info
        assert (info.resource.kind, info.plural) == (kind.name, kind.plural)
        assert status_of(kind)._api_info.action == "status"


def test_a_front_is_known_by_its_node() -> None:
    for node in ("n1", "ip-10-0-0-1.eu-west-1.compute.internal"):
        uid = f"Kubernetes/discovery.k8s.io/EndpointSlice/shop/{slice_name('wp-a1b2c3', node)}/10.0.0.1"
        assert node_of_front(uid) == node
    for uid in ("Kubernetes//Pod/shop/wp.n1", "", "c/discovery.k8s.io/EndpointSlice/shop/wp-a1b2c3/10.0.0.1"):
        assert node_of_front(uid) == ""


class Listed:
    """Nothing, or what the server refuses to list."""

    resourceVersion = "1"  # noqa: N815

    def __init__(self, status: int) -> None:
        self._status = status

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        if self._status != http.HTTPStatus.OK:
            request = httpx2.Request("GET", "http://api/")
            answer = httpx2.Response(self._status, request=request)
            raise httpx2.HTTPStatusError("no", request=request, response=answer)
        for nothing in ():
            yield nothing


class Server:
    """Answers to lists of one kind with this status, to all others with nothing."""

    def __init__(self, kind: str, status: int) -> None:
        self._kind, self._status = kind, status

    def list(self, found: Any, **_: Any) -> Listed:
        is_it = found.__name__ == self._kind
        return Listed(self._status if is_it else http.HTTPStatus.OK)

    async def watch(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        await anyio.sleep_forever()
        yield


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "status", "is_told_of", "is_configured"),
    [
        ("BackendTLSPolicy", 404, [], True),
        ("BackendTLSPolicy", 403, ["kind_not_followed"], True),
        ("AuthorizationPolicy", 404, [], True),
        ("AuthorizationPolicy", 403, ["api_server_not_followed"], False),
        ("BackendTLSPolicy", 500, ["api_server_not_followed"], False),
    ],
)
async def test_who_may_not_list_policies_gets_no_configuration_but_for_those_that_are_optional(
    kind: str, status: int, is_told_of: list[str], is_configured: bool
) -> None:
    told, configured = list[str](), list[Objects]()
    server: Any = Server(kind, status)
    cluster = Cluster(server, "cluster.local", configured.append, lambda event, **_: told.append(event))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cluster.run)
        with anyio.move_on_after(5.0 if is_configured else 0.5):
            while not (configured and told == is_told_of):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert bool(configured) is is_configured
    assert told == is_told_of


class Starting(Server):
    """Has one policy, and then says for good that there is no such kind."""

    def __init__(self) -> None:
        super().__init__("AuthorizationPolicy", http.HTTPStatus.OK)
        self.lists = 0

    def list(self, found: Any, **_: Any) -> Any:
        if found.__name__ != self._kind:
            return Listed(http.HTTPStatus.OK)
        self.lists += 1
        return Policies() if self.lists == 1 else Listed(http.HTTPStatus.NOT_FOUND)

    async def watch(self, found: Any, **_: Any) -> AsyncIterator[Any]:
        if found.__name__ != self._kind:
            await anyio.sleep_forever()
        await anyio.sleep(0.05)
        raise TimeoutError
        yield


class Policies:
    resourceVersion = "1"  # noqa: N815

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        yield {
            "metadata": {"name": "p", "namespace": "shop", "resourceVersion": "1"},
            "spec": {"action": "DENY"},
        }


@pytest.mark.anyio
async def test_a_server_that_forgets_a_kind_is_not_believed_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "RETRY_MAX_S", 0.02)
    monkeypatch.setattr(cluster, "GONE_S", 1.0)
    told, configured, server = list[str](), list[Objects](), Starting()
    found = Cluster(server, "cluster.local", configured.append, lambda event, **_: told.append(event))  # type: ignore[arg-type]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.run)
        with anyio.fail_after(5):
            while server.lists < 4:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert [len(each.policies) for each in configured] == [1] * len(configured)
        assert "api_server_not_followed" in told
        with anyio.fail_after(5):
            while configured[-1].policies:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()


def test_each_port_of_a_parent_is_told_what_is_of_it() -> None:
    plain = route()
    plain["spec"]["parentRefs"] = [SERVICE | {"port": 80}, SERVICE | {"port": 999}, SERVICE]
    told = [
        msgspec.structs.replace(said("Accepted", status=status), port=port)
        for port, status in ((80, True), (999, False))
    ]
    found = route_parents(plain, told, NOW)
    assert [(each["parentRef"]["port"], each["conditions"][0]["status"]) for each in found] == [
        (80, "True"),
        (999, "False"),
    ]
