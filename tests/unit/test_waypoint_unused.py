"""What is said of waypoints and counts nowhere is told, with the reason."""

from __future__ import annotations

from pykmesh.manifests.objects import Gateway
from pykmesh.manifests.parse import parse
from services.waypoint_mgr.source import Objects
from services.waypoint_mgr.unused import unused
from tests.waypoint.world import DOMAIN

OBJECTS = """
apiVersion: v1
kind: Service
metadata: {name: shop, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: plain, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop}
spec: {gatewayClassName: pykmesh-waypoint}
"""
ROUTE = """
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: it, namespace: {namespace}}}
spec:
  parentRefs: [{parents}]
  rules: [{{backendRefs: [{{name: shop, port: 80}}]}}]
"""
SHOP = "{kind: Service, group: '', name: shop}"
OF_NO_GROUP = "{kind: Service, name: shop}"
VIRTUAL = """
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: it, namespace: {namespace}}}
spec:
  hosts: [{host}]
  exportTo: [{export}]
  http: [{{directResponse: {{status: 418}}}}]
"""
RULE = """
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: it, namespace: shop}}
spec: {{host: {host}, {rest}}}
"""


def why(text: str) -> str:
    """Of the one object beside those that there always are; "" where it counts."""
    found = parse((OBJECTS + text).encode(), "a.yaml")
    assert not found.errors
    objects = Objects.of((each.object for each in found.objects), DOMAIN)
    names = [f"shop/{name}.shop.svc.{DOMAIN}" for name in ("shop", "plain")]
    said = unused(objects, names[:1], names, DOMAIN)
    assert len(said) < 2
    return next(iter(said.values()), "")


def route(*parents: str, namespace: str = "shop") -> str:
    return ROUTE.format(parents=", ".join(parents), namespace=namespace)


def test_routes_are_for_what_goes_by_way_of_a_waypoint() -> None:
    assert why(route(SHOP)) == ""
    assert why(route("{kind: Gateway, name: wp}")) == ""
    assert why(route(SHOP, "{kind: Gateway, name: edge}")) == "", "the other parent is somebody else's"
    assert why(route("{kind: Gateway, name: edge}")) == "Gateway shop/edge is no waypoint"
    assert why(route("{kind: Service, group: '', name: nobody}")) == "there is no Service shop/nobody"
    elsewhere = "there is no gateway.networking.k8s.io/Service shop/shop"
    assert why(route(OF_NO_GROUP)) == elsewhere, "the group that an API server fills in"
    plain = "{kind: Service, group: '', name: plain}"
    assert why(route(plain)) == "Service shop/plain goes by way of no waypoint"
    assert why(route(SHOP, namespace="other")) == "there is no Service other/shop"


def virtual(host: str, *, namespace: str = "shop", export: str = "'*'") -> str:
    return VIRTUAL.format(host=host, namespace=namespace, export=export)


def test_virtual_services_are_for_hosts_that_go_by_way_of_a_waypoint() -> None:
    assert why(virtual("shop")) == ""
    assert why(virtual(f"shop.shop.svc.{DOMAIN}", namespace="other")) == ""
    told = "there is no host that goes by way of a waypoint"
    assert why(virtual("plain")) == f"{told}: plain"
    assert why(virtual("shop.shop")) == f"{told}: shop.shop"
    hidden = virtual(f"shop.shop.svc.{DOMAIN}", namespace="other", export=".")
    assert why(hidden).startswith("exportTo lets it be seen by no host that goes by way of a waypoint")


def test_destination_rules_are_for_hosts_that_a_waypoint_speaks_to() -> None:
    assert why(RULE.format(host="plain", rest="")) == ""
    assert why(RULE.format(host="nobody", rest="")).startswith("there is no host that a waypoint speaks to")
    selector = "workloadSelector: {matchLabels: {app: a}}"
    assert why(RULE.format(host="shop", rest=selector)) == "workloadSelector: it is for sidecars"


def test_a_service_in_a_waypoints_place_is_told_and_its_own_is_not() -> None:
    waypoint = f"shop/wp.shop.svc.{DOMAIN}"
    for labels, is_anothers in (
        ("{}", True),
        ("{gateway.networking.k8s.io/gateway-name: other}", True),
        ("{gateway.networking.k8s.io/gateway-name: wp}", False),
    ):
        there = f"""
---
apiVersion: v1
kind: Service
metadata: {{name: wp, namespace: shop, labels: {labels}}}
spec: {{clusterIP: 10.96.0.3, ports: [{{port: 80}}]}}
"""
        found = parse((OBJECTS + there).encode(), "a.yaml")
        objects = Objects.of((each.object for each in found.objects), DOMAIN)
        assert objects.is_anothers(waypoint) == is_anothers
    found = parse(OBJECTS.encode(), "a.yaml")
    assert not Objects.of((each.object for each in found.objects), DOMAIN).is_anothers(waypoint)


def test_what_guards_stays_while_it_may_be_in_a_file_that_cannot_be_read() -> None:
    guards = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {action: DENY, targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: wp}], rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: a, namespace: shop}
spec:
  targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: wp}]
  jwtRules: [{issuer: i, jwks: "{}"}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: d, namespace: shop}
spec: {host: shop, trafficPolicy: {tls: {mode: SIMPLE}}}
"""

    def objects(text: str) -> Objects:
        found = parse((OBJECTS + text).encode(), "a.yaml")
        assert not found.errors
        return Objects.of((each.object for each in found.objects), DOMAIN)

    before, now = objects(guards), objects("")
    assert now.with_guards_of(before) == before
    assert before.with_guards_of(before) == before
    assert before.with_guards_of(now) == before


def test_what_is_for_others_alone_is_told() -> None:
    edge = virtual("shop").replace("hosts: [shop]", "hosts: [shop]\n  gateways: [ingress/edge]")
    assert why(edge) == "it is for the gateways ingress/edge alone"
    both = virtual("shop").replace("hosts: [shop]", "hosts: [shop]\n  gateways: [ingress/edge, mesh]")
    assert why(both) == ""
    assert (
        why(virtual("shop").replace("hosts: [shop]", "")) == "it has no hosts, and no other delegates to it"
    )
    elsewhere = RULE.format(host=f"shop.shop.svc.{DOMAIN}", rest="").replace(
        "namespace: shop", "namespace: guest"
    )
    assert why(elsewhere).startswith("there is no host of its namespace that a waypoint speaks to")
    root = elsewhere.replace("namespace: guest", "namespace: istio-system")
    assert why(root) == ""


def test_what_a_waypoint_passes_over_of_its_gateway_is_told() -> None:
    listeners = """
  listeners:
  - {name: a, port: 15008, protocol: HBONE}
  - {name: a, port: 443, protocol: HTTPS, hostname: x.example, tls: {mode: Terminate}}
  addresses: [{value: 10.0.0.1}]
  infrastructure: {labels: {a: b}}
"""
    text = OBJECTS.replace(
        "spec: {gatewayClassName: pykmesh-waypoint}", "spec:\n  gatewayClassName: pykmesh-waypoint"
    )
    found = parse((text.rstrip() + listeners).encode(), "a.yaml")
    assert not found.errors
    (gateway,) = (each.object for each in found.objects if isinstance(each.object, Gateway))
    assert gateway.misread == [
        f"spec.{what} is passed over"
        for what in (
            "addresses",
            "infrastructure",
            "listeners: several are called a",
            "listeners[a].hostname",
            "listeners[a].tls",
            "listeners[a].protocol HTTPS",
        )
    ]
    misspelt = text.rstrip() + listeners.replace("infrastructure", "infra")
    assert [error.field for error in parse(misspelt.encode(), "a.yaml").errors] == ["spec.infra"]
