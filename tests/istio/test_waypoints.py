"""Waypoints of a real API server and istiod: a Gateway becomes an Envoy, and every node learns of it."""

from __future__ import annotations

import errno
from collections import Counter
from typing import Any

import pytest

from pykmesh.demo.pods import Pod
from tests.istio.api_server import ApiError
from tests.istio.conftest import Mesh
from tests.istio.control_plane import ControlPlane
from tests.istio.namespace import Namespace
from tests.istio.traffic import answers, at, refusal, workload
from tests.mesh import waypoints
from tests.mesh.manifests import Object, service
from tests.mesh.node import finish, probe, until
from tests.mesh.waypoints import ask

GATEWAY_API = "gateway.networking.k8s.io/v1"
CONTROLLER = "pykmesh.io/waypoint"
USE = "istio.io/use-waypoint"
SHOPS = {"serves": "shop"}


def gateway(name: str = "wp", of: str = "pykmesh-waypoint") -> Object:
    listener = {"name": "mesh", "port": 15008, "protocol": "HBONE"}
    return {
        "apiVersion": GATEWAY_API,
        "kind": "Gateway",
        "metadata": {"name": name},
        "spec": {"gatewayClassName": of, "listeners": [listener]},
    }


def labelled(found: Object, waypoint: str) -> Object:
    return {**found, "metadata": {**found["metadata"], "labels": {USE: waypoint}}}


def shop(waypoint: str = "wp") -> Object:
    """Every pod of both versions."""
    found = service("shop", app="web", ports={80: 8080})
    found["spec"]["selector"] = SHOPS
    found["spec"]["ports"][0]["name"] = "http"
    return labelled(found, waypoint)


def server(of: Pod, app: str) -> Object:
    found = workload(of, app)
    found["metadata"]["labels"] |= SHOPS
    return found


def version(name: str) -> Object:
    found = service(name, app=name, ports={80: 8080})
    found["spec"]["ports"][0]["name"] = "http"
    return found


def route(**metadata: Any) -> Object:
    """A canary by header, the rest to the first version."""
    canary = {
        "matches": [{"headers": [{"name": "x-canary", "value": "yes"}]}],
        "backendRefs": [{"name": "v2", "port": 80}],
    }
    parent = {"group": "", "kind": "Service", "name": "shop"}
    return {
        "apiVersion": GATEWAY_API,
        "kind": "HTTPRoute",
        "metadata": {"name": "shop", **metadata},
        "spec": {
            "parentRefs": [parent],
            "rules": [canary, {"backendRefs": [{"name": "v1", "port": 80}]}],
        },
    }


def conditions(found: Object) -> dict[str, str]:
    return {each["type"]: each["status"] for each in found.get("conditions", ())}


def parents(namespace: Namespace) -> dict[str, dict[str, str]]:
    """What is said of the route, by who says it."""
    found = namespace.get("HTTPRoute", "shop").get("status", {}).get("parents", ())
    return {each["controllerName"]: conditions(each) for each in found}


def service_of(namespace: Namespace, waypoint: str) -> Object:
    metadata = {"name": waypoint, "namespace": namespace.name}
    return namespace.api.get({"apiVersion": "v1", "kind": "Service", "metadata": metadata})


def asked(mesh: Mesh, namespace: Namespace, header: str = "", count: int = 20) -> Counter[Any]:
    found = waypoints.Mesh(mesh.node, mesh.client, mesh.waypoint)
    return ask(found, count, header, address=namespace.vips("shop")[0])


def until_handed_over(mesh: Mesh, namespace: Namespace) -> None:
    host = namespace.host("shop")
    place = f"{mesh.waypoint.address4}:"
    until(lambda: any(e.startswith(place) for e in mesh.node.endpoints(host)), "the waypoint's way")


def route_to_the_second(mesh: Mesh, namespace: Namespace) -> None:
    """Changes the route; it has come into effect when this returns."""
    changed = route()
    changed["spec"]["rules"] = [{"backendRefs": [{"name": "v2", "port": 80}]}]
    namespace.apply(changed)
    until(lambda: set(asked(mesh, namespace)) == {(200, mesh.web[1].name)}, "the changed route")


@pytest.fixture
def routed(mesh: Mesh, namespace: Namespace) -> Namespace:
    first, second, _ = mesh.web
    namespace.apply(
        shop(),
        version("v1"),
        version("v2"),
        route(),
        gateway(),
        server(first, "v1"),
        server(second, "v2"),
    )
    until_handed_over(mesh, namespace)
    return namespace


def test_a_request_is_routed_and_gateway_and_route_say_so(mesh: Mesh, routed: Namespace) -> None:
    first, second, _ = mesh.web
    until(lambda: set(asked(mesh, routed, "x-canary: yes")) == {(200, second.name)}, "the canary")
    assert set(asked(mesh, routed)) == {(200, first.name)}
    until(lambda: conditions(routed.get("Gateway", "wp")["status"]).get("Programmed") == "True", "programmed")
    status = routed.get("Gateway", "wp")["status"]
    own = service_of(routed, "wp")
    assert [a["value"] for a in status["addresses"]] == [
        *own["spec"]["clusterIPs"],
        f"wp.{routed.name}.svc.cluster.local",
    ]
    (listener,) = until(lambda: routed.get("Gateway", "wp")["status"].get("listeners"), "listeners")
    assert listener["attachedRoutes"] == 0, "the route is the Service's"
    assert [each["kind"] for each in listener["supportedKinds"]] == ["GRPCRoute", "HTTPRoute", "TCPRoute"]
    until(lambda: parents(routed).get(CONTROLLER) == {"Accepted": "True", "ResolvedRefs": "True"}, "accepted")
    wanted = {"apiVersion": GATEWAY_API, "kind": "GatewayClass", "metadata": {"name": "pykmesh-waypoint"}}
    assert conditions(routed.api.get(wanted)["status"]) == {"Accepted": "True"}


def test_a_service_gains_and_loses_its_waypoint_without_a_failed_request(
    mesh: Mesh, routed: Namespace
) -> None:
    first, second, _ = mesh.web
    host, past = routed.host("shop"), at(8080, first, second)
    prober = probe(mesh.client, routed.vips("shop")[0], 80)
    for _ in range(3):
        routed.apply(shop("none"))
        until(lambda: mesh.node.endpoints(host) == past, "past the waypoint")
        routed.apply(shop())
        until_handed_over(mesh, routed)
    counted = finish(prober)
    assert counted["connections"] > 0
    assert counted["failed"] == 0, counted["errors"]


def test_a_canary_among_waypoints_gets_its_share_of_connections(mesh: Mesh, routed: Namespace) -> None:
    """It redirects, the other does not. (Envoy takes a second to close after an answer of its own.)"""
    weighted = shop()
    weighted["metadata"]["labels"]["istio.io/use-waypoint-canary"] = "new"
    weighted["metadata"]["annotations"] = {"istio.io/use-waypoint-canary-weight": "30"}
    redirect = {"type": "RequestRedirect", "requestRedirect": {"hostname": "elsewhere.test"}}
    redirects = {**route(), "metadata": {"name": "new"}}
    redirects["spec"] = {"parentRefs": [{"name": "new"}], "rules": [{"filters": [redirect]}]}
    routed.delete("HTTPRoute", "shop")
    routed.apply(gateway("new"), redirects, weighted)
    until(lambda: len(mesh.node.endpoints(routed.host("shop"), 80)) == 2, "both waypoints")
    found = asked(mesh, routed, count=80)
    assert found.total() == 80
    assert 5 < found[302, ""] < 50, found


def test_versions_are_subsets_of_a_virtual_service(mesh: Mesh, routed: Namespace) -> None:
    """As in Istio's own examples: by the label `version`, which istiod says as the canonical revision."""
    networking = {"apiVersion": "networking.istio.io/v1"}
    pods = [server(pod, "web") for pod in mesh.web[:2]]
    for number, pod in enumerate(pods, 1):
        pod["metadata"]["labels"]["version"] = f"v{number}"
    subsets = [{"name": f"v{n}", "labels": {"version": f"v{n}"}} for n in (1, 2)]
    rule = {**networking, "kind": "DestinationRule", "metadata": {"name": "shop"}}
    to = [{"route": [{"destination": {"host": "shop", "subset": "v2"}}]}]
    service = {**networking, "kind": "VirtualService", "metadata": {"name": "shop"}}
    routed.delete("HTTPRoute", "shop")
    routed.apply(
        *pods,
        {**rule, "spec": {"host": "shop", "subsets": subsets}},
        {**service, "spec": {"hosts": ["shop"], "http": to}},
    )
    until(lambda: set(asked(mesh, routed)) == {(200, mesh.web[1].name)}, "the second version alone")


def test_what_is_meant_for_a_pod_goes_by_way_of_a_waypoint_for_workloads(
    mesh: Mesh, routed: Namespace
) -> None:
    """A policy of its Gateway says so: it refuses what the pod alone would answer."""
    first = mesh.web[0]
    for_all = gateway()
    for_all["metadata"]["labels"] = {"istio.io/waypoint-for": "all"}
    pod = server(first, "v1")
    pod["metadata"]["labels"][USE] = "wp"
    no = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "no"},
        "spec": {
            "targetRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "wp"}],
            "action": "DENY",
            "rules": [{"when": [{"key": "request.headers[x-no]", "values": ["no"]}]}],
        },
    }
    routed.apply(for_all, pod, no)
    found, address = waypoints.Mesh(mesh.node, mesh.client, mesh.waypoint), str(first.address4)

    def answered(header: str = "") -> set[int]:
        return {code for code, _ in ask(found, 1, header, address=address, port=8080)}

    until(lambda: answered("x-no: no") == {403}, "the policy at the pod's own address")
    assert answered() == {200}


def test_killing_waypoint_mgr_costs_nothing_and_what_changed_meanwhile_is_read(
    mesh: Mesh, routed: Namespace
) -> None:
    prober = probe(mesh.client, routed.vips("shop")[0], 80)
    mesh.node.kill("waypoint_mgr")
    route_to_the_second(mesh, routed)
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]


def test_while_the_api_server_is_away_what_it_said_counts(
    mesh: Mesh, routed: Namespace, control_plane: ControlPlane
) -> None:
    prober = probe(mesh.client, routed.vips("shop")[0], 80)
    control_plane.restart_api_server()
    route_to_the_second(mesh, routed)
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]


def test_the_front_of_another_node_is_never_taken(mesh: Mesh, routed: Namespace) -> None:
    """Nobody there would know what a connection is for."""
    metadata = {"labels": {"kubernetes.io/service-name": "wp"}}
    there = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["192.0.2.9"], "conditions": {"ready": True}}],
        "ports": [{"name": "handoff", "port": 15400, "protocol": "TCP"}],
    }
    routed.apply({**there, "metadata": {"name": "wp-a1b2c3.n2", **metadata}})
    until(lambda: "192.0.2.9" in str(mesh.node.json("get", "workloads")), "the front to be known")
    assert {e.partition(":")[0] for e in mesh.node.endpoints(routed.host("shop"))} == {mesh.waypoint.address4}


def test_a_route_that_is_wrong_is_told_so_and_counts_as_it_was(mesh: Mesh, routed: Namespace) -> None:
    _, second, _ = mesh.web
    until(lambda: set(asked(mesh, routed, "x-canary: yes")) == {(200, second.name)}, "the canary")
    broken = route()
    match = {"type": "RegularExpression", "name": "x-canary", "value": "ye(s"}
    broken["spec"]["rules"][0]["matches"] = [{"headers": [match]}]
    routed.apply(broken)
    until(lambda: parents(routed)[CONTROLLER]["Accepted"] == "False", "refused")
    assert set(asked(mesh, routed, "x-canary: yes")) == {(200, second.name)}


def test_a_gateway_that_goes_takes_its_service_along_and_traffic_goes_straight(
    mesh: Mesh, routed: Namespace
) -> None:
    first, second, _ = mesh.web
    routed.delete("Gateway", "wp")
    until(lambda: mesh.node.endpoints(routed.host("shop")) == at(8080, first, second), "past the waypoint")
    address = routed.vips("shop")[0]
    assert answers(mesh.client, address) == {first.name, second.name}

    def is_gone() -> bool:
        with pytest.raises(ApiError, match="404"):
            service_of(routed, "wp")
        return True

    until(is_gone, "the waypoint's own service to go")


def test_somebody_elses_service_of_the_gateways_name_stays_as_it_is(mesh: Mesh, namespace: Namespace) -> None:
    own = service("wp", app="wp", ports={80: 8080})
    namespace.apply(own, gateway())
    before = namespace.get("Service", "wp")
    until(lambda: "somebody else's" in str(namespace.get("Gateway", "wp").get("status")), "the reason")
    namespace.delete("Gateway", "wp")
    name = f"{namespace.name}/wp"

    def waypoints() -> list[str]:
        said = mesh.node.status()["processes"]["waypoint_mgr"]["waypoints"]
        return [each["name"] for each in said]

    until(lambda: name not in waypoints(), "the waypoint to go")
    assert namespace.get("Service", "wp") == before


def test_a_waypoint_of_istios_own_is_refused_by_that_name(mesh: Mesh, namespace: Namespace) -> None:
    own = service("theirs", app="theirs", ports={15008: 15008})
    namespace.apply(shop("theirs"), own, server(mesh.web[0], "v1"), gateway("theirs", "istio-waypoint"))
    address = {"type": "IPAddress", "value": namespace.vips("theirs")[0]}
    namespace.apply({**gateway("theirs", "istio-waypoint"), "status": {"addresses": [address]}})

    def said() -> str:
        found = mesh.node.json("get", "services")["services"]
        return next((str(each) for each in found if each["name"] == namespace.host("shop")), "")

    until(lambda: "waypoint_unsupported" in said(), "the reason")
    assert refusal(mesh.client, namespace.vips("shop")[0]) == errno.ECONNREFUSED
