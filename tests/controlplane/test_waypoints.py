"""Whom a waypoint's Gateway lets in, and what services are said to go by way of."""

from __future__ import annotations

from typing import Any

import pytest

from pykmesh.controlplane.settings import MeshSettings
from pykmesh.controlplane.translate import Cluster, translate
from pykmesh.manifests.objects import KINDS, Gateway, Object, from_plain

Plain = dict[str, Any]
MESH = MeshSettings()


def read(group: str, kind: str, name: str, namespace: str = "default", **parts: Any) -> Object:
    metadata = {"name": name, "namespace": namespace, **parts.pop("metadata", {})}
    return from_plain({"metadata": metadata, **parts}, KINDS[group, kind])


def gateway(*allowed: Plain | None, namespace: str = "infra") -> Object:
    """With a listener for each; None: one that says nothing of it."""
    listeners = [
        {"name": f"l{number}", "port": 15008, "protocol": "HBONE"}
        | ({"allowedRoutes": {"namespaces": namespaces}} if namespaces is not None else {})
        for number, namespaces in enumerate(allowed)
    ]
    spec = {"gatewayClassName": "istio-waypoint", "listeners": listeners}
    return read("gateway.networking.k8s.io", "Gateway", "wp", namespace, spec=spec)


IN_A_OR_B = {"key": "team", "operator": "In", "values": ["a", "b"]}


@pytest.mark.parametrize(
    ("allowed", "namespace", "labels", "expected"),
    [
        ([], "infra", {}, True),
        ([], "shop", {}, False),
        ([None], "shop", {}, False),
        ([{"from": "Same"}], "shop", {}, False),
        ([{"from": "None"}], "shop", {}, False),
        ([{"from": "All"}], "shop", {}, True),
        ([{"from": "Selector"}], "shop", {}, False),
        ([{"from": "Selector", "selector": {}}], "shop", {}, True),
        ([{"from": "Same"}, {"from": "All"}], "shop", {}, True),
        ([{"from": "Selector", "selector": {"matchLabels": {"team": "a"}}}], "shop", {"team": "a"}, True),
        ([{"from": "Selector", "selector": {"matchLabels": {"team": "a"}}}], "shop", {"team": "b"}, False),
        ([{"from": "Selector", "selector": {"matchExpressions": [IN_A_OR_B]}}], "shop", {"team": "b"}, True),
        ([{"from": "Selector", "selector": {"matchExpressions": [IN_A_OR_B]}}], "shop", {}, False),
        (
            [{"from": "Selector", "selector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}}}],
            "shop",
            {},
            True,
        ),
    ],
)
def test_namespaces_are_let_in_by_any_listener(
    allowed: list[Plain | None], namespace: str, labels: dict[str, str], expected: bool
) -> None:
    found = gateway(*allowed)
    assert isinstance(found, Gateway)
    assert found.lets_in(namespace, labels) is expected


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ({"from": "All"}, "wp.infra.svc.cluster.local"),
        ({"from": "Same"}, "not-allowed--.infra.svc.cluster.local"),
    ],
)
def test_a_service_that_is_not_let_in_goes_by_way_of_nobody(allowed: Plain, expected: str) -> None:
    labels = {"istio.io/use-waypoint": "wp", "istio.io/use-waypoint-namespace": "infra"}
    spec = {"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 80}]}
    web = read("", "Service", "web", "shop", metadata={"labels": labels}, spec=spec)
    found = translate(Cluster.of([gateway(allowed), web]), MESH)
    said = found["shop/web.shop.svc.cluster.local"].service
    assert said is not None
    assert said.waypoint.hostname.namespace == "infra"
    assert said.waypoint.hostname.hostname == expected


@pytest.mark.parametrize("of", ["pod", "namespace"])
def test_a_workload_that_asks_for_a_gateway_that_there_is_not_is_not_let_past_it(of: str) -> None:
    """A label of its namespace is about services."""
    label = {"istio.io/use-waypoint": "wp"}
    namespace = read("", "Namespace", "shop", metadata={"labels": label if of == "namespace" else {}})
    spec = {"nodeName": "n"}
    labels = label if of == "pod" else {}
    pod = read("", "Pod", "web", "shop", metadata={"labels": labels}, spec=spec, status={"podIP": "10.0.0.1"})
    found = translate(Cluster.of([namespace, pod]), MESH)
    (workload,) = (each.workload for each in found.values())
    assert workload.HasField("waypoint") is (of == "pod")


def test_a_waypoints_own_service_goes_by_way_of_none_though_its_namespace_names_it() -> None:
    labels = {"istio.io/use-waypoint": "wp"}
    namespace = read("", "Namespace", "infra", metadata={"labels": labels})
    own = labels | {"gateway.networking.k8s.io/gateway-name": "wp"}
    spec = {"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 15019}]}
    service = read("", "Service", "wp", "infra", metadata={"labels": own}, spec=spec)
    found = translate(Cluster.of([gateway(None), namespace, service]), MESH)
    said = found["infra/wp.infra.svc.cluster.local"].service
    assert said is not None
    assert not said.HasField("waypoint")
