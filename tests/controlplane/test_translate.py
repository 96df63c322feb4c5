"""What the recordings do not show: the settings, rarer fields, and where the releases differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pykmesh.controlplane.dialect import Dialect
from pykmesh.controlplane.settings import MeshSettings
from pykmesh.controlplane.translate import Cluster, translate
from pykmesh.manifests.objects import KINDS, from_plain
from pykmesh.proto import workload_pb2 as wire

from .manifest_texts import pod, service, service_entry

LB = wire.LoadBalancing
WEB = "shop/web.shop.svc.cluster.local"
POD = "Kubernetes//Pod/shop/web-1"


def _resources(*manifests: dict[str, Any], **settings: Any) -> Mapping[str, wire.Address]:
    objects = [
        from_plain(manifest, KINDS[manifest["apiVersion"].rpartition("/")[0], manifest["kind"]])
        for manifest in manifests
    ]
    return translate(Cluster.of(objects), MeshSettings(**settings))


def _pod(**fields: Any) -> dict[str, Any]:
    made = pod("web-1", podIP="10.244.0.1")
    made["metadata"] |= fields.pop("metadata", {})
    return {**made, **fields}


def _workload(*manifests: dict[str, Any], uid: str = POD, **settings: Any) -> wire.Workload:
    return _resources(*manifests, **settings)[uid].workload


def test_cluster_trust_domain_network_and_domain_are_said_everywhere() -> None:
    resources = _resources(
        service("web", clusterIP="10.96.0.1"),
        _pod(),
        cluster_id="edge",
        trust_domain="example.org",
        network="net-1",
        domain="k8s.test",
    )
    workload = resources["edge//Pod/shop/web-1"].workload
    assert (workload.cluster_id, workload.trust_domain, workload.network) == ("edge", "example.org", "net-1")
    assert resources["shop/web.shop.svc.k8s.test"].service.addresses[0].network == "net-1"


HEALTH = {
    "nothing said": ({}, {}, wire.HEALTHY),
    "ready": ({"conditions": [{"type": "Ready", "status": "True"}]}, {}, wire.HEALTHY),
    "not ready": ({"conditions": [{"type": "Ready", "status": "False"}]}, {}, wire.UNHEALTHY),
    "only scheduled": ({"conditions": [{"type": "PodScheduled", "status": "True"}]}, {}, wire.UNHEALTHY),
    "terminating": ({}, {"deletionTimestamp": "2026-01-01T00:00:00Z"}, wire.UNHEALTHY),
}


@pytest.mark.parametrize(("status", "metadata", "health"), HEALTH.values(), ids=HEALTH)
def test_health_of_a_pod(status: dict[str, Any], metadata: dict[str, Any], health: int) -> None:
    assert _workload(_pod(status={"podIP": "10.0.0.1", **status}, metadata=metadata)).status == health


def test_how_a_pod_is_reached() -> None:
    assert _workload(_pod()).tunnel_protocol == wire.NONE
    redirected = _workload(_pod(metadata={"annotations": {"ambient.istio.io/redirection": "enabled"}}))
    assert (redirected.tunnel_protocol, redirected.native_tunnel) == (wire.HBONE, False)
    native = _workload(_pod(metadata={"labels": {"networking.istio.io/tunnel": "http"}}))
    assert (native.tunnel_protocol, native.native_tunnel) == (wire.HBONE, True)


OWNERS = {
    "Deployment": ("ReplicaSet", "web-5d6f", ("web", wire.DEPLOYMENT), "web"),
    "Job": ("Job", "backup", ("backup", wire.JOB), "backup"),
    "CronJob": ("Job", "backup-28573920", ("backup", wire.CRONJOB), "backup"),
    "StatefulSet": ("StatefulSet", "db", ("web-1", wire.POD), "db"),
}


@pytest.mark.parametrize(("kind", "name", "older", "newer"), OWNERS.values(), ids=OWNERS)
def test_the_owner_names_the_workload(kind: str, name: str, older: tuple[str, int], newer: str) -> None:
    metadata = {
        "generateName": f"{name}-",
        "labels": {"pod-template-hash": "5d6f"},
        "ownerReferences": [{"kind": kind, "name": name, "controller": True}],
    }
    said = _workload(_pod(metadata=metadata), dialect=Dialect.V1_25)
    assert (said.workload_name, said.workload_type) == older
    said = _workload(_pod(metadata=metadata))
    assert (said.workload_name, said.workload_type) == (newer, wire.POD)


DISTRIBUTIONS = {
    "PreferClose": (4, [LB.NETWORK, LB.REGION, LB.ZONE]),
    "PreferSameNode": (0, [LB.NETWORK, LB.REGION, LB.ZONE, LB.SUBZONE, LB.NODE]),
    "Nonsense": (0, []),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_traffic_distribution_is_said_by_field_annotation_or_namespace(distribution: str) -> None:
    older, newer = DISTRIBUTIONS[distribution]
    annotations = {"networking.istio.io/traffic-distribution": distribution}
    by_field = [service("web", trafficDistribution=distribution)]
    annotated = service("web")
    annotated["metadata"]["annotations"] = annotations
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": "shop", "annotations": annotations},
    }
    for manifests in (by_field, [annotated], [service("web"), namespace]):
        lb = _resources(*manifests)[WEB].service.load_balancing
        assert list(lb.routing_preference) == newer
        assert lb.mode == (LB.FAILOVER if newer else LB.UNSPECIFIED_MODE)
    lb = _resources(*by_field, dialect=Dialect.V1_25)[WEB].service.load_balancing
    assert len(lb.routing_preference) == older


PROTOCOLS = {
    "http": wire.HTTP11,
    "http-web": wire.HTTP11,
    "HTTP": wire.HTTP11,
    "grpc-api": wire.GRPC,
    "grpc-web": wire.UNKNOWN,
    "http2": wire.HTTP2,
    "https": wire.TLS,
    "tls-a": wire.TLS,
    "tcp": wire.TCP,
    "redis": wire.UNKNOWN,
    "web": wire.UNKNOWN,
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_name_of_a_port_says_its_protocol(name: str) -> None:
    resources = _resources(service("web", ports=[{"port": 80, "name": name}]))
    assert resources[WEB].service.ports[0].app_protocol == PROTOCOLS[name]


@pytest.mark.parametrize(
    ("port", "protocol"),
    [
        ({"port": 80, "name": "tcp", "appProtocol": "kubernetes.io/h2c"}, wire.HTTP2),
        ({"port": 80, "name": "http", "protocol": "UDP"}, wire.UNKNOWN),
        ({"port": 3306}, wire.TCP),
        ({"port": 3306, "name": "mysql"}, wire.UNKNOWN),
    ],
)
def test_fields_go_before_the_name_of_a_port(port: dict[str, Any], protocol: int) -> None:
    assert _resources(service("web", ports=[port]))[WEB].service.ports[0].app_protocol == protocol


def test_a_pod_named_in_an_endpoint_slice_serves_its_service() -> None:
    slice_ = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "s", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "endpoints": [{"addresses": ["10.244.0.1"], "targetRef": {"kind": "Pod", "name": "web-1"}}],
        "ports": [{"name": "", "port": 9999}],
    }
    resources = _resources(service("web", selector={}), _pod(), slice_)
    assert resources.keys() == {WEB, POD}
    assert resources[POD].workload.services[WEB].ports[0].target_port == 8080


def test_a_service_is_canonical_and_else_the_oldest_entry_of_a_hostname() -> None:
    entries = [service_entry(name, "x.test", namespace=name) for name in ("b", "a", "c")]
    entries[0]["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z"
    entries[1]["metadata"]["creationTimestamp"] = "2026-01-03T00:00:00Z"
    entries[2]["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    rival = service_entry("a", "web.shop.svc.cluster.local", namespace="bank")
    resources = _resources(*entries, rival, service("web"))
    canonical = {name for name, a in resources.items() if a.HasField("service") and a.service.canonical}
    assert canonical == {"c/x.test", WEB}


def test_of_two_entries_with_one_host_in_a_namespace_the_first_is_served() -> None:
    one = service_entry("a", "x.test", resolution="STATIC", endpoints=[{"address": "192.0.2.1"}])
    two = service_entry("b", "x.test", resolution="STATIC", endpoints=[{"address": "192.0.2.2"}])
    resources = _resources(two, one)
    assert resources["shop/x.test"].service.name == "a"
    assert [a.workload.name for a in resources.values() if a.HasField("workload")] == ["a"]


def test_a_pod_lacks_the_ports_whose_target_it_does_not_name() -> None:
    ports = [{"port": 80, "targetPort": "http"}, {"port": 81, "targetPort": "admin"}, {"port": 82}]
    spec = {"containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]}
    resources = _resources(service("web", ports=ports), _pod(spec=spec))
    assert [port.target_port for port in resources[WEB].service.ports] == [0, 0, 82]
    served = resources[POD].workload.services[WEB].ports
    assert [(port.service_port, port.target_port) for port in served] == [(80, 8080), (82, 82)]


def test_locality_of_a_node_with_subzone() -> None:
    labels = {
        "topology.kubernetes.io/region": "eu",
        "topology.kubernetes.io/zone": "eu-1",
        "topology.istio.io/subzone": "rack-7",
    }
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a", "labels": labels}}
    locality = _workload(node, _pod(spec={"nodeName": "node-a"})).locality
    assert (locality.region, locality.zone, locality.subzone) == ("eu", "eu-1", "rack-7")


def test_an_unknown_release_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown release '1\.4': known are 1\.25, 1\.31"):
        Dialect.named("1.4")
