"""What a waypoint is told to do, and what authors of routes are told: without an Envoy."""

from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import pytest

from pykmesh.contracts.handoff import service_secret, told_address
from pykmesh.contracts.waypoints import Endpoint, MeshService, ServicePort
from pykmesh.kernel.records import ip_from_text
from pykmesh.manifests.objects import (
    KINDS,
    AuthorizationPolicy,
    DestinationRule,
    ObjectRef,
    Protocol,
    Service,
    VirtualService,
    from_plain,
)
from pykmesh.manifests.parse import parse
from services.waypoint_mgr.attachments import Mesh
from services.waypoint_mgr.encode import (
    CLUSTER_TYPE,
    ENDPOINT_TYPE,
    LISTENER_TYPE,
    ROUTE_TYPE,
    EncodeError,
    encode,
)
from services.waypoint_mgr.envoy import Port
from services.waypoint_mgr.policies import Clients
from services.waypoint_mgr.protocols import AppProtocol, protocol_of
from services.waypoint_mgr.routes import ACCESS_LOG, Configuration
from services.waypoint_mgr.schema import make, schema
from services.waypoint_mgr.source import Destination, Objects, Policy, Virtual
from tests.waypoint.world import (
    DOMAIN,
    SECRET,
    World,
    gateway,
    grpc_route,
    http_route,
    kubernetes_service,
    mesh_service,
    named,
    tcp_route,
)

V1 = [{"name": "v1", "port": 80}]
TO_GATEWAY = {"name": "waypoint", "namespace": "shop"}


def shop(*ports: dict[str, Any], vips: tuple[str, ...] = ("10.96.0.1",)) -> World:
    """The Service web with these ports, and v1."""
    ports = ports or ({"port": 80, "name": "http"},)
    world = World()
    listed = {port["port"]: [Endpoint("10.0.0.1", 8080)] for port in ports}
    world.add_user(mesh_service("shop", "web", listed, vips), kubernetes_service("shop", "web", *ports))
    world.add_backend(mesh_service("shop", "v1", {80: [Endpoint("10.0.0.2", 8080, 3)]}))
    return world


def port(number: int, service: str = "web") -> Port:
    return Port(named("shop", service), number)


def chains(configuration: Configuration) -> dict[str, tuple[list[str], int]]:
    """By name: the addresses and the port that it is for."""
    return {
        chain["name"]: (
            [one["addressPrefix"] for one in chain["filterChainMatch"]["prefixRanges"]],
            chain["filterChainMatch"]["destinationPort"],
        )
        for chain in configuration.chains
    }


ALIKE = ("1fd::1:0:0", "1fd::1")
SUM = struct.pack("<5Q", 0, *[1 << 32] * 4)
"""A secret under which they are: the sum of the address's parts, in an order in which these are the same."""


def said(configuration: Configuration) -> list[str]:
    return [f"{one.type}={one.status} {one.reason}" for one in configuration.conditions]


def test_each_port_has_a_chain_for_all_its_addresses() -> None:
    world = shop({"port": 80, "name": "http"}, {"port": 9, "name": "tcp"}, vips=("10.96.0.1", "fd96::1"))
    made = world.configuration()
    told = [told_address(ip_from_text(vip), SECRET) for vip in ("10.96.0.1", "fd96::1")]
    assert chains(made) == {port(80).cluster: (told, 80), port(9).cluster: (told, 9)}
    lengths = [one["prefixLen"] for one in made.chains[0]["filterChainMatch"]["prefixRanges"]]
    assert lengths == [48, 48]
    assert made.protocols == {port(80): AppProtocol.HTTP, port(9): AppProtocol.TCP}
    assert made.routes.keys() == {port(80).cluster}
    assert made.clusters.keys() == made.assignments.keys() == {port(80).cluster, port(9).cluster}


def test_a_udp_port_has_none() -> None:
    assert not shop({"port": 53, "name": "dns", "protocol": "UDP"}).configuration().chains


def test_a_service_without_addresses_has_no_chain_and_no_routes() -> None:
    made = shop(vips=()).configuration()
    assert not made.chains
    assert not made.routes


def test_of_two_services_with_one_address_and_port_the_first_by_name_keeps_it() -> None:
    world = shop()
    world.add_user(
        mesh_service("shop", "also", {80: [], 81: []}, ["10.96.0.1"]),
        kubernetes_service("shop", "also", {"port": 80}, {"port": 81}),
    )
    made = world.configuration()
    assert chains(made).keys() == {port(80, "also").cluster, port(81, "also").cluster}
    assert made.conflicts == (f"{named('shop', 'web')}: 10.96.0.1 port 80 is {named('shop', 'also')}'s",)


def test_a_user_without_a_kubernetes_service_is_opaque() -> None:
    world = World()
    world.users.append(MeshService("shop/db.example.com", ["10.96.0.7"], []))
    world.users.append(mesh_service("shop", "x", {80: []}, ["10.96.0.8"]))
    assert world.configuration().protocols == {port(80, "x"): AppProtocol.TCP}


def test_endpoints_keep_their_weights() -> None:
    world = shop()
    world.routes.append(http_route("shop", "r", {"rules": [{"backendRefs": V1}]}))
    (lb_endpoint,) = world.configuration().assignments[port(80, "v1").cluster]["endpoints"][0]["lbEndpoints"]
    assert lb_endpoint["loadBalancingWeight"] == 3
    assert lb_endpoint["endpoint"]["address"]["socketAddress"] == {"address": "10.0.0.2", "portValue": 8080}


PROTOCOLS = {
    ("http", ""): AppProtocol.HTTP,
    ("http-web", ""): AppProtocol.HTTP,
    ("HTTP", ""): AppProtocol.HTTP,
    ("http2", ""): AppProtocol.HTTP2,
    ("grpc-api", ""): AppProtocol.HTTP2,
    ("grpc-web", ""): AppProtocol.HTTP2,
    ("", "h2c"): AppProtocol.HTTP2,
    ("", "kubernetes.io/h2c"): AppProtocol.HTTP2,
    ("", "kubernetes.io/ws"): AppProtocol.HTTP,
    ("", "kubernetes.io/wss"): AppProtocol.TCP,
    ("http", "tcp"): AppProtocol.TCP,
    ("tcp", "http"): AppProtocol.HTTP,
    ("https", ""): AppProtocol.TCP,
    ("mysql", ""): AppProtocol.TCP,
    ("web", ""): AppProtocol.TCP,
    ("", ""): AppProtocol.TCP,
}


@pytest.mark.parametrize(("name", "app_protocol"), PROTOCOLS)
def test_a_port_carries_what_istio_says_that_it_does(name: str, app_protocol: str) -> None:
    service = kubernetes_service("shop", "web", {"port": 80, "name": name, "appProtocol": app_protocol})
    expected = PROTOCOLS[name, app_protocol]
    assert protocol_of(service, 80, AppProtocol.TCP) is expected
    for routed_as in (AppProtocol.HTTP, AppProtocol.HTTP2):
        routed = routed_as if expected is AppProtocol.TCP else expected
        assert protocol_of(service, 80, routed_as) is routed


def test_http2_goes_to_endpoints_as_such() -> None:
    made = shop({"port": 80, "name": "grpc"}).configuration()
    (options,) = made.clusters[port(80).cluster]["typedExtensionProtocolOptions"].values()
    assert options["explicitHttpConfig"] == {"http2ProtocolOptions": {}}


def test_a_route_of_the_gateway_is_for_http_services_without_routes_of_their_own() -> None:
    world = shop({"port": 80, "name": "http"}, {"port": 9, "name": "tcp"})
    world.add_user(
        mesh_service("shop", "own", {80: []}, ["10.96.0.2"]),
        kubernetes_service("shop", "own", {"port": 80, "name": "http"}),
    )
    to_own = {"group": "", "kind": "Service", "name": "own"}
    world.routes += [
        http_route("shop", "all", {"parentRefs": [TO_GATEWAY], "rules": [{"backendRefs": V1}]}),
        http_route("shop", "own", {"parentRefs": [to_own], "rules": [{"backendRefs": V1}]}),
    ]
    made = world.configuration()
    names = {name: routes["virtualHosts"][0]["routes"][0]["name"] for name, routes in made.routes.items()}
    assert names == {port(80).cluster: "shop/all/0", port(80, "own").cluster: "shop/own/0"}
    assert made.protocols[port(9)] is AppProtocol.TCP
    assert said(made) == ["Accepted=True Accepted", "ResolvedRefs=True ResolvedRefs"] * 2


@pytest.mark.parametrize(("name", "is_told"), [("", True), ("tcp", True), ("http", False)])
def test_a_route_of_the_gateway_that_is_for_no_port_is_told_so(name: str, is_told: bool) -> None:
    world = shop({"port": 80, "name": name})
    world.routes.append(
        http_route("shop", "all", {"parentRefs": [TO_GATEWAY], "rules": [{"backendRefs": V1}]})
    )
    told = [one.message for one in world.configuration().conditions if one.type == "PartiallyInvalid"]
    assert bool(told) == is_told
    assert all(one.startswith("it is for no port: none that goes this way carries HTTP") for one in told)
    world.users.clear()
    assert said(world.configuration())[2:] == [], "nothing goes this way yet"


def test_an_endpoint_is_left_out_after_as_many_errors_as_are_said() -> None:
    world = shop()
    rule = {"host": "web", "trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 3}}}
    made = from_plain({"metadata": {"name": "d", "namespace": "shop"}, "spec": rule}, DestinationRule)
    assert isinstance(made, DestinationRule)
    world.destinations.append(Destination.of(made, DOMAIN))
    found = world.configuration().clusters[port(80).cluster]["outlierDetection"]
    assert (found["consecutive5xx"], found["enforcingConsecutive5xx"]) == (3, 100)


def test_a_listener_that_the_gateway_does_not_have_is_no_parent() -> None:
    world = shop()
    for name, parent in (("a", {"sectionName": "other"}), ("b", {"port": 1}), ("c", {"port": 15019})):
        world.routes.append(http_route("shop", name, {"parentRefs": [TO_GATEWAY | parent]}))
    accepted = [text for text in said(world.configuration()) if text.startswith("Accepted")]
    assert accepted == ["Accepted=False NoMatchingParent"] * 2 + ["Accepted=True Accepted"]


def test_what_is_attached_elsewhere_is_not_spoken_of() -> None:
    world = shop()
    others = [
        {"name": "ingress"},
        {"group": "", "kind": "Service", "name": "elsewhere"},
        {"group": "networking.istio.io", "kind": "ServiceEntry", "name": "web"},
    ]
    world.routes.append(http_route("shop", "r", {"parentRefs": others}))
    assert not world.configuration().conditions


ENTRY = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside, namespace: shop}
spec:
  hosts: [api.example, www.example]
  ports: [{number: 80, name: web, protocol: HTTP}, {number: 443, name: tls, protocol: TLS}]
  resolution: STATIC
  endpoints: [{address: 10.9.0.1}]
"""
OUTSIDE = {"group": "networking.istio.io", "kind": "ServiceEntry", "name": "outside"}


def entries() -> World:
    """The hosts of a ServiceEntry go by way of the waypoint."""
    world, found = World(), parse(ENTRY.encode(), "entry.yaml")
    world.services = dict(Objects.of((each.object for each in found.objects), DOMAIN).services)
    for number, host in enumerate(("api.example", "www.example"), 1):
        ports = [ServicePort(each, [Endpoint("10.9.0.1", each)]) for each in (80, 443)]
        world.users.append(MeshService(f"shop/{host}", [f"10.96.9.{number}"], ports))
    return world


def test_a_service_entrys_ports_carry_what_it_says_and_its_routes_are_for_all_its_hosts() -> None:
    world = entries()
    world.add_backend(mesh_service("shop", "v1", {80: [Endpoint("10.0.0.2", 8080)]}))
    rule = {"matches": [{"path": {"value": "/v1"}}], "backendRefs": V1}
    world.routes = [
        http_route("shop", "r", {"parentRefs": [{**OUTSIDE, "sectionName": "web"}], "rules": [rule]})
    ]
    made = world.configuration()
    assert said(made) == ["Accepted=True Accepted", "ResolvedRefs=True ResolvedRefs"]
    for host in ("api.example", "www.example"):
        assert made.protocols[Port(f"shop/{host}", 80)] is AppProtocol.HTTP
        assert made.protocols[Port(f"shop/{host}", 443)] is AppProtocol.TCP
        ((route,),) = [
            each["routes"] for each in made.routes[Port(f"shop/{host}", 80).cluster]["virtualHosts"]
        ]
        assert route["route"]["cluster"] == port(80, "v1").cluster


def test_the_oldest_entry_of_a_host_counts_and_a_kubernetes_service_before_it() -> None:
    young = ENTRY.replace("name: outside", "name: a, creationTimestamp: '2026-01-02T00:00:00Z'")
    old = ENTRY.replace("name: outside", "name: b, creationTimestamp: '2026-01-01T00:00:00Z'")
    udp = old.replace("protocol: HTTP", "protocol: UDP").replace("api.example", "v1.shop.svc.cluster.local")
    service = "apiVersion: v1\nkind: Service\nmetadata: {name: v1, namespace: shop}"
    texts = "---\n".join((young.replace("protocol: HTTP", "protocol: TCP"), udp, service))
    parsed = parse(texts.encode(), "all.yaml")
    assert not parsed.errors
    services = Objects.of((each.object for each in parsed.objects), DOMAIN).services
    assert {name: each.name for name, each in services.items()} == {
        "shop/api.example": "a",
        "shop/www.example": "b",
        "shop/v1.shop.svc.cluster.local": "v1",
    }
    assert [port.protocol for port in services["shop/www.example"].spec.ports] == [Protocol.UDP, Protocol.TCP]


def test_of_a_host_in_several_namespaces_a_kubernetes_service_is_meant_before_an_entry() -> None:
    world, host = entries(), named("shop", "v1").partition("/")[2]
    world.add_backend(mesh_service("shop", "v1", {80: [Endpoint("10.0.0.2", 8080)]}))
    stolen = MeshService(f"aaa/{host}", [], [ServicePort(80, [Endpoint("10.66.0.1", 80)])])
    world.known[stolen.name] = stolen
    world.services[stolen.name] = world.services["shop/api.example"]
    backend = {"group": "networking.istio.io", "kind": "Hostname", "name": host, "port": 80}
    spec = {"parentRefs": [OUTSIDE], "rules": [{"backendRefs": [backend]}]}
    world.routes = [http_route("shop", "r", spec), http_route("elsewhere", "r", spec)]
    made = world.configuration()
    assert port(80, "v1").cluster in made.clusters
    assert not any("aaa" in name for name in made.clusters)


@pytest.mark.parametrize(
    ("name", "number", "told"),
    [
        ("www.example", 80, "ResolvedRefs=True ResolvedRefs"),
        ("www.example", 81, "ResolvedRefs=False BackendNotFound"),
        ("other.example", 80, "ResolvedRefs=False BackendNotFound"),
    ],
)
def test_a_host_is_a_backend(name: str, number: int, told: str) -> None:
    world = entries()
    backend = {"group": "networking.istio.io", "kind": "Hostname", "name": name, "port": number}
    world.routes = [http_route("shop", "r", {"parentRefs": [OUTSIDE], "rules": [{"backendRefs": [backend]}]})]
    assert told in said(world.configuration())


def test_an_entry_that_is_not_exported_to_a_namespace_is_no_backend_there() -> None:
    plain = {"hosts": ["www.example"], "ports": [{"number": 80, "name": "http"}]}
    found: dict[str, Service] = {}
    for namespace, export in (("aaa", ["."]), ("egress", ["*"])):
        made = from_plain(
            {"metadata": {"name": "e", "namespace": namespace}, "spec": {**plain, "exportTo": export}},
            KINDS["networking.istio.io", "ServiceEntry"],
        )
        found |= Objects.of([made], DOMAIN).services
    known = {name: MeshService(name, [], [ServicePort(80, [])]) for name in found}
    mesh = Mesh([], known, found, DOMAIN, {})
    assert mesh.at_host("www.example", "shop", 80, 0) == Port("egress/www.example", 80)
    assert mesh.at_host("www.example", "aaa", 80, 0) == Port("aaa/www.example", 80)


@pytest.mark.parametrize(("port_name", "is_tcp"), [("tcp", True), ("http", False)])
@pytest.mark.parametrize("by", ["rule", "service", "header"])
def test_clients_keep_to_an_endpoint(by: str, port_name: str, *, is_tcp: bool) -> None:
    world = shop({"port": 80, "name": port_name})
    if by == "service":
        plain = {"sessionAffinity": "ClientIP", "ports": [{"port": 80, "name": port_name}]}
        metadata = {"name": "web", "namespace": "shop"}
        made = from_plain({"metadata": metadata, "spec": plain}, KINDS["", "Service"])
        assert isinstance(made, Service)
        world.services[named("shop", "web")] = made
    else:
        hashes = {"useSourceIp": True} if by == "rule" else {"httpHeaderName": "x-user"}
        rule = {"host": "web", "trafficPolicy": {"loadBalancer": {"consistentHash": hashes}}}
        found = from_plain({"metadata": {"name": "d", "namespace": "shop"}, "spec": rule}, DestinationRule)
        assert isinstance(found, DestinationRule)
        world.destinations.append(Destination.of(found, DOMAIN))
    made_of = world.configuration()
    assert made_of.clusters[port(80).cluster]["lbPolicy"] == "RING_HASH"
    told = [one.message for one in made_of.destinations if one.type == "PartiallyInvalid"]
    assert told == (
        ["not honoured: loadBalancer.consistentHash of TCP port 80 (but useSourceIp)"]
        if by == "header" and is_tcp
        else []
    )
    if is_tcp:
        assert ('"sourceIp"' in json.dumps(made_of.chains)) == (by != "header")
    else:
        assert ("sourceIp" in json.dumps(made_of.routes)) == (by != "header")


def test_routes_that_are_wrong_in_themselves_are_named_as_refused() -> None:
    world = shop()
    bad = {"matches": [{"path": {"type": "RegularExpression", "value": "("}}]}
    world.routes.append(http_route("shop", "bad", {"rules": [bad]}))
    nowhere = {"group": "", "kind": "Service", "name": "web", "port": 1}
    world.routes.append(http_route("shop", "nowhere", {"parentRefs": [nowhere]}))
    assert world.configuration().refused == {ObjectRef("HTTPRoute", "shop", "bad")}


def test_a_route_with_two_parents_here_counts_once_a_port() -> None:
    world = shop()
    parent = {"group": "", "kind": "Service", "name": "web"}
    world.routes.append(
        http_route(
            "shop", "r", {"parentRefs": [parent, parent | {"port": 80}], "rules": [{"backendRefs": V1}]}
        )
    )
    (routes,) = world.configuration().routes.values()
    assert len(routes["virtualHosts"][0]["routes"]) == 1


def test_an_access_log_is_written_only_if_asked_for() -> None:
    def logs(world: World) -> list[Any]:
        (chain,) = world.configuration().chains
        every = chain["filters"][0]["typedConfig"]["accessLog"]
        return [one for one in every if one["name"] == "envoy.access_loggers.stdout"]

    world = shop()
    assert not logs(world)
    world.gateway = gateway({ACCESS_LOG: "true"})
    assert logs(world)


@pytest.mark.parametrize(
    ("redirect", "port"),
    [
        ({"scheme": "https"}, None),
        ({"scheme": "https", "port": 443}, None),
        ({"scheme": "https", "port": 8443}, 8443),
        ({"port": 8080}, 8080),
        ({"hostname": "example.org"}, None),
    ],
)
def test_a_redirect_from_the_default_port_says_no_default_port(
    redirect: dict[str, Any], port: int | None
) -> None:
    world = shop()
    rule = {"filters": [{"type": "RequestRedirect", "requestRedirect": redirect}]}
    world.routes = [http_route("shop", "r", {"rules": [rule]})]
    (made,) = world.configuration().routes.values()
    assert made["virtualHosts"][0]["routes"][0]["redirect"].get("portRedirect") == port


def test_statistics_name_the_service_without_dots() -> None:
    (chain,) = shop().configuration().chains
    assert chain["filters"][0]["typedConfig"]["statPrefix"] == "shop/web_shop_svc_cluster_local|80"


ROUTE = (
    "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r}\nspec:\n  rules:\n  - "
)
REFUSED = {
    "a path that is not absolute": (
        "matches: [{path: {value: a}}]",
        "matches[0].path: value must be an absolute",
    ),
    "a path with a double slash": (
        "matches: [{path: {value: /a//b}}]",
        "matches[0].path: value must not contain '//'",
    ),
    "a path with a query": (
        "matches: [{path: {value: '/a?b'}}]",
        "matches[0].path: value must be of the characters",
    ),
    "a path that climbs": (
        "matches: [{path: {type: Exact, value: /a/..}}]",
        "matches[0].path: value must not contain '/..'",
    ),
    "an unknown kind of match": (
        "matches: [{path: {type: Glob, value: /}}]",
        "matches[0].path.type: Invalid enum value",
    ),
    "a header that is none": (
        "matches: [{headers: [{name: 'a b', value: c}]}]",
        "matches[0].headers[0].name: Expected",
    ),
    "a value with a line break": (
        r'matches: [{headers: [{name: a, value: "b\nc"}]}]',
        "matches[0].headers[0].value: Expected",
    ),
    "a method in small letters": ("matches: [{method: get}]", "matches[0].method: Invalid enum value"),
    "a backend without a port": ("backendRefs: [{name: a}]", "backendRefs[0]: port must be given"),
    "a weight below 0": ("backendRefs: [{name: a, port: 1, weight: -1}]", "backendRefs[0].weight: Expected"),
    "a filter without its settings": (
        "filters: [{type: URLRewrite}]",
        "filters[0]: type URLRewrite goes with its own",
    ),
    "a filter with another's settings": (
        "filters: [{type: URLRewrite, urlRewrite: {}, requestRedirect: {}}]",
        "filters[0]: type URLRewrite goes with its own",
    ),
    "a filter twice": (
        "filters: [{type: URLRewrite, urlRewrite: {}}, {type: URLRewrite, urlRewrite: {}}]",
        "filter URLRewrite cannot be repeated",
    ),
    "a redirect with backends": (
        "{filters: [{type: RequestRedirect, requestRedirect: {}}], backendRefs: [{name: a, port: 1}]}",
        "RequestRedirect must not be used together with backendRefs",
    ),
    "a redirect with a rewrite": (
        "filters: [{type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {}}]",
        "RequestRedirect and URLRewrite cannot be used together",
    ),
    "a prefix replaced without one": (
        (
            "{matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, urlRewrite: "
            "{path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]}"
        ),
        "replacePrefixMatch needs exactly one match",
    ),
    "a path modifier of the other type": (
        "filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replacePrefixMatch: /}}}]",
        "filters[0].urlRewrite.path: type ReplaceFullPath goes with replaceFullPath",
    ),
    "a status that redirects nowhere": (
        "filters: [{type: RequestRedirect, requestRedirect: {statusCode: 200}}]",
        "filters[0].requestRedirect: statusCode must be",
    ),
    "a duration without a unit": ("timeouts: {request: '5'}", "timeouts.request: Expected"),
    "a try longer than all": (
        "timeouts: {request: 1s, backendRequest: 1m}",
        "timeouts: backendRequest must not be",
    ),
    "a mirror for more than all": (
        "filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, percent: 101}}]",
        "filters[0].requestMirror.percent: Expected",
    ),
}


@pytest.mark.parametrize(("rule", "error"), REFUSED.values(), ids=REFUSED)
def test_a_rule_that_its_crd_refuses_is_refused(rule: str, error: str) -> None:
    (found,) = parse((ROUTE + rule).encode(), "f.yaml").errors
    assert str(found).startswith("f.yaml:6: spec.rules[0]")
    assert error in str(found)


HTTP_OPTIONS = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
MISTAKES = {
    "an unknown field": ({"name": "a", "colour": 1}, "Cluster.colour: Cluster has no such field"),
    "one within another": (
        {"edsClusterConfig": {"edsConfig": {"adz": {}}}},
        "Cluster.edsClusterConfig.edsConfig.adz: ConfigSource has no such field",
    ),
    "one within an Any": (
        {"typedExtensionProtocolOptions": {"x": {"@type": HTTP_OPTIONS, "a": 1}}},
        "Cluster.typedExtensionProtocolOptions[x](HttpProtocolOptions).a: HttpProtocolOptions has no such",
    ),
    "an unknown type": (
        {"typedExtensionProtocolOptions": {"x": {"@type": f"{CLUSTER_TYPE}s"}}},
        "envoy.config.cluster.v3.Clusters: Envoy has no such message",
    ),
    "an enum's value": ({"lbPolicy": "SOME"}, "Cluster.lbPolicy: 'SOME' is no ClusterLbPolicy"),
    "a text for a number": ({"maintenance": 1}, "Cluster.maintenance"),
    "a number out of range": (
        {"perConnectionBufferLimitBytes": -1},
        "Cluster.perConnectionBufferLimitBytes: -1 is no",
    ),
    "a duration": ({"connectTimeout": "soon"}, "Cluster.connectTimeout: 'soon' is no Duration"),
    "a list": ({"healthChecks": {}}, "Cluster.healthChecks: expected a list"),
    "two of a oneof": (
        {"type": "EDS", "clusterType": {}},
        "Cluster.clusterType: cannot be given beside type",
    ),
}


@pytest.mark.parametrize(("message", "error"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_message_is_named_by_its_field(message: dict[str, Any], error: str) -> None:
    with pytest.raises(EncodeError) as raised:
        encode(CLUSTER_TYPE, message)
    assert error in str(raised.value)


def test_the_bytes_are_those_that_the_classes_read() -> None:
    from envoy_data_plane.envoy.config.cluster.v3 import Cluster
    from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
    from envoy_data_plane.envoy.config.listener.v3 import Listener
    from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration

    assert make() == schema(), "another envoy-data-plane: make build"
    world = shop({"port": 80, "name": "http"}, {"port": 9, "name": "tcp"})
    filters = [
        {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "a", "value": "é%"}]}},
        {"type": "RequestMirror", "requestMirror": {"backendRef": V1[0], "percent": 0}},
    ]
    rule = {
        "filters": filters,
        "timeouts": {"request": "1500ms"},
        "backendRefs": V1 * 2,
        "retry": {"attempts": 0},
    }
    world.routes.append(http_route("shop", "r", {"rules": [rule]}))
    made = world.configuration()
    messages = [(Cluster, CLUSTER_TYPE, one) for one in made.clusters.values()]
    messages += [(ClusterLoadAssignment, ENDPOINT_TYPE, one) for one in made.assignments.values()]
    messages += [(RouteConfiguration, ROUTE_TYPE, one) for one in made.routes.values()]
    messages += [(Listener, LISTENER_TYPE, made.listener("0.0.0.0", 15019))]
    for kind, type_url, message in messages:
        assert kind.parse(encode(type_url, message)).to_dict() == kind.from_dict(message).to_dict()


def test_an_address_that_a_service_has_twice_has_one_chain() -> None:
    """Two that are told alike, as these of IPv6 are, are one, too."""
    world = shop(vips=("10.96.0.1", "10.96.0.1", *ALIKE))
    world.clients = Clients(service_secret=SUM)
    (chain,) = world.configuration().chains
    ranges = [one["addressPrefix"] for one in chain["filterChainMatch"]["prefixRanges"]]
    assert len(ranges) == len(set(ranges)) == 2


def test_of_two_services_whose_addresses_are_told_alike_neither_is_served() -> None:
    """By chance, since nobody can choose so."""
    world = shop(vips=ALIKE[:1])
    world.clients = Clients(service_secret=SUM)
    (web,) = world.users
    evil = mesh_service("aaa", "evil", {80: [], 81: []}, [*ALIKE[1:]])
    world.users = [msgspec.structs.replace(each, owned=each.vips) for each in (evil, web)]
    made = world.configuration()
    assert chains(made).keys() == {Port(named("aaa", "evil"), 81).cluster}
    assert sorted(made.conflicts) == sorted(
        f"{name}: {vip} port 80 cannot be told from an address of another service: nobody is served there"
        for name, vip in zip((named("shop", "web"), named("aaa", "evil")), ALIKE, strict=True)
    )


def test_who_does_not_know_the_secret_cannot_choose_an_address_that_is_told_like_another() -> None:
    """What is alike under one secret is not under others."""
    addresses, secrets = [*map(ip_from_text, ALIKE)], [service_secret(bytes([n]) * 32) for n in range(50)]
    alike = [len({told_address(ip, secret) for ip in addresses}) == 1 for secret in (SUM, *secrets)]
    assert alike == [True, *[False] * 50]


@pytest.mark.parametrize(
    ("action", "block", "is_met"),
    [
        ("DENY", "fd34::/64", True),
        ("ALLOW", "fd34::/64", False),
        ("DENY", "10.1.0.0/16", None),
        ("DENY", "::ffff:10.1.0.0/112", None),
    ],
)
def test_of_addresses_of_a_family_that_envoy_never_sees_a_policy_is_the_stricter(
    action: str, block: str, is_met: bool | None
) -> None:
    world = shop()
    spec = {
        "targetRefs": [{"kind": "Service", "name": "web"}],
        "action": action,
        "rules": [{"from": [{"source": {"ipBlocks": [block]}}]}],
    }
    obj = {"metadata": {"name": "p", "namespace": "shop"}, "spec": spec}
    made = from_plain(obj, KINDS["security.istio.io", "AuthorizationPolicy"])
    assert isinstance(made, AuthorizationPolicy)
    world.policies = [Policy.of(made, DOMAIN, {})]
    world.clients = Clients(family=4, service_secret=SECRET)
    found = world.configuration()
    said = [one for one in found.policies if one.type == "PartiallyInvalid"]
    assert bool(said) is (is_met is not None)
    seen = {"directRemoteIp": {"addressPrefix": "10.1.0.0", "prefixLen": 16}}
    wanted = {True: {"any": True}, False: {"notId": {"any": True}}, None: seen}[is_met]
    assert f"'principals': [{wanted}]" in str(found.chains)


def test_an_address_is_its_owners_whatever_the_names() -> None:
    world = shop()
    (web,) = world.users
    evil = mesh_service("aaa", "evil", {80: []}, web.vips)
    world.users = [evil, msgspec.structs.replace(web, owned=web.vips)]
    made = world.configuration()
    assert chains(made).keys() == {port(80).cluster}
    assert "aaa/evil" in made.conflicts[0]


TO_V1 = {"backendRefs": [{"name": "v1", "port": 80}]}


def virtual(namespace: str, *hosts: str) -> Virtual:
    spec = {
        "hosts": list(hosts),
        "http": [{"route": [{"destination": {"host": "steal.evil.svc.cluster.local"}}]}],
    }
    plain = {"metadata": {"name": "a", "namespace": namespace}, "spec": spec}
    made = from_plain(plain, KINDS["networking.istio.io", "VirtualService"])
    assert isinstance(made, VirtualService)
    return Virtual.of(made, DOMAIN)


def leads_to(configuration: Configuration, service: str = "web") -> str:
    (host,) = configuration.routes[port(80, service).cluster]["virtualHosts"]
    cluster = host["routes"][0]["route"]["cluster"]
    assert isinstance(cluster, str)
    return cluster.rpartition("|")[2] or cluster


def stolen() -> World:
    world = shop()
    world.add_backend(mesh_service("evil", "steal", {80: [Endpoint("10.9.9.9", 80)]}))
    return world


@pytest.mark.parametrize("host", ["web.shop.svc.cluster.local", "*.shop.svc.cluster.local", "*"])
@pytest.mark.parametrize(("namespace", "counts"), [("evil", False), ("shop", True), ("istio-system", True)])
def test_nobody_else_says_by_a_virtual_service_how_a_namespaces_services_are_reached(
    namespace: str, counts: bool, host: str
) -> None:
    world = stolen()
    straight = leads_to(world.configuration())
    world.virtuals.append(virtual(namespace, host))
    made = world.configuration()
    assert (leads_to(made) != straight) == counts
    told = [one.message for one in made.virtuals if one.type == "PartiallyInvalid"]
    assert bool(told) != counts
    assert counts or "of another namespace than the service" in told[0]


def test_of_virtual_services_a_namespaces_own_goes_before_the_root_namespaces() -> None:
    world = stolen()
    world.add_backend(mesh_service("shop", "v2", {80: [Endpoint("10.0.0.3", 80)]}))
    own = virtual("shop", "web.shop.svc.cluster.local")
    world.virtuals += [virtual("istio-system", "web.shop.svc.cluster.local"), own]
    said = {one.of: one.message for one in world.configuration().virtuals if one.type == "PartiallyInvalid"}
    assert own.ref not in said
    assert len(said) == 1


@pytest.mark.parametrize(("lets_in", "is_accepted"), [("Same", False), ("All", True)])
def test_a_strangers_route_on_the_gateway_is_for_the_strangers_own_services_at_the_most(
    lets_in: str, is_accepted: bool
) -> None:
    world = stolen()
    straight = leads_to(world.configuration())
    world.gateway = gateway(lets_in=lets_in)
    ports = {80: [Endpoint("10.9.9.8", 80)]}
    world.add_user(
        mesh_service("evil", "own", ports, ("10.96.9.9",)),
        kubernetes_service("evil", "own", {"port": 80, "name": "http"}),
    )
    spec = {
        "parentRefs": [{"name": "waypoint", "namespace": "shop"}],
        "rules": [{"backendRefs": [{"name": "steal", "port": 80}]}],
    }
    world.routes.append(http_route("evil", "grab", spec))
    made = world.configuration()
    assert said(made)[0] == (
        "Accepted=True Accepted" if is_accepted else "Accepted=False NotAllowedByListeners"
    )
    assert leads_to(made) == straight
    own = made.routes[Port(named("evil", "own"), 80).cluster]["virtualHosts"][0]["routes"][0]["route"][
        "cluster"
    ]
    assert ("steal" in own) == is_accepted


@pytest.mark.parametrize(("kind", "is_accepted"), [("GRPCRoute", False), ("HTTPRoute", True)])
def test_a_listener_takes_the_kinds_of_routes_that_it_names(kind: str, is_accepted: bool) -> None:
    world = stolen()
    world.gateway = gateway(kinds=[{"kind": kind}])
    spec = {"parentRefs": [{"name": "waypoint"}], "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]}
    world.routes = [http_route("shop", "all", spec)]
    assert said(world.configuration())[0] == (
        "Accepted=True Accepted" if is_accepted else "Accepted=False NotAllowedByListeners"
    )


@pytest.mark.parametrize("is_user", [False, True])
def test_a_backend_of_a_grpc_route_is_spoken_to_as_grpc_also_where_it_is_asked_by_way_of_the_waypoint(
    is_user: bool,
) -> None:
    world = shop({"port": 80})
    if is_user:
        own = mesh_service("shop", "v1", {80: [Endpoint("10.0.0.2", 80)]}, ("10.96.0.2",))
        world.add_user(own, kubernetes_service("shop", "v1", {"port": 80}))
    world.routes.append(grpc_route("shop", "g", {"rules": [{"backendRefs": [{"name": "v1", "port": 80}]}]}))
    made = world.configuration()
    options = made.clusters[port(80, "v1").cluster]["typedExtensionProtocolOptions"]
    (spoken,) = options.values()
    assert spoken["explicitHttpConfig"].keys() == {"http2ProtocolOptions"}
    assert not is_user or made.protocols[port(80, "v1")] is AppProtocol.TCP


def test_of_two_that_cannot_both_be_for_a_port_one_is_and_the_other_is_told() -> None:
    """The older TCPRoute (of a folder the first by name), and by their kinds: gRPC, HTTP, TCP (GEP-1294)."""
    to_v1, at_80 = {"name": "v1", "port": 80}, {"group": "", "kind": "Service", "name": "web", "port": 80}
    for protocol, routes in (
        ("tcp", [tcp_route("shop", name, to_v1) for name in ("a", "b")]),
        (
            "",
            [
                grpc_route("shop", "a", {"rules": [TO_V1]}),
                http_route("shop", "b", {"rules": [TO_V1]}, "2020"),
            ],
        ),
        (
            "",
            [
                http_route("shop", "a", {"parentRefs": [at_80], "rules": [TO_V1]}),
                tcp_route("shop", "b", to_v1, parentRefs=[at_80]),
            ],
        ),
    ):
        world = shop({"port": 80, "name": protocol})
        world.routes = routes
        made = world.configuration()
        told = {(one.of.name, one.type): one for one in made.conditions}
        assert told["a", "Accepted"].status
        refused = told["b", "Accepted"]
        assert (refused.status, refused.reason) == (False, "Conflicted")
        assert refused.message == f"port 80 goes by {routes[0].ref}, which goes before"


def test_one_that_is_for_some_of_its_ports_alone_is_told_which_not() -> None:
    world = shop({"port": 80, "name": "http"}, {"port": 81, "name": "http-b"})
    parent = {"kind": "Service", "group": "", "name": "web"}
    world.routes = [
        grpc_route("shop", "a", {"parentRefs": [parent | {"port": 80}], "rules": [TO_V1]}),
        http_route("shop", "b", {"parentRefs": [parent], "rules": [TO_V1]}),
    ]
    made = world.configuration()
    (told,) = [one for one in made.conditions if one.type == "PartiallyInvalid"]
    assert (told.of.name, told.message) == ("b", f"port 80 goes by {world.routes[0].ref}, which goes before")
    assert "v1" in str(made.routes[port(81).cluster])
