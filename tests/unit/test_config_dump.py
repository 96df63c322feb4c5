"""The dump is what istioctl's reader takes, type by type, and says what the recording says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pykmesh.contracts.messages import ResourceType
from pykmesh.proto import workload_pb2
from services.xds_client.config_dump import config_dump
from services.xds_client.protocol import Reading, parse
from services.xds_client.store import Held, Store
from tests.control import recordings
from tests.control.recordings import RECORDINGS

VERSIONS = ("istiod-1.25.5", "istiod-1.31-eed52ebb66ad")
SCENARIOS = ("basics", "service-entries", "reconnect", "waypoints", "policies")
Port = int


class Camel(msgspec.Struct, rename="camel"):
    """A structure of istioctl's reader, strict where JSON into Go is: a wrong type is an error."""


class Gateway(Camel):
    destination: str


class Locality(Camel):
    region: str
    zone: str
    subzone: str


class Workload(Camel):
    uid: str
    workload_ips: list[str]
    protocol: str
    name: str
    namespace: str
    service_account: str
    workload_name: str
    workload_type: str
    canonical_name: str
    canonical_revision: str
    cluster_id: str
    trust_domain: str
    locality: Locality
    node: str
    network: str
    status: str
    hostname: str
    capacity: int
    authorization_policies: list[str]
    waypoint: Gateway | None = None
    network_gateway: Gateway | None = None


class LoadBalancer(Camel):
    mode: str
    routing_preferences: list[str]
    health_policy: str


class Endpoint(Camel):
    workload_uid: str
    service: str
    port: dict[Port, Port]


class Service(Camel):
    name: str
    namespace: str
    hostname: str
    vips: list[str]
    ports: dict[str, int]
    endpoints: dict[str, Endpoint]
    subject_alt_names: list[str]
    load_balancer: LoadBalancer | None = None
    waypoint: Gateway | None = None
    ip_families: str = ""


class Policy(Camel):
    name: str
    namespace: str
    scope: str
    action: str


class Dump(Camel):
    workloads: list[Workload]
    services: list[Service]
    policies: list[Policy]
    certificates: list[None]
    workload_state: dict[str, Any]
    unreadable: list[str]


def read(held: dict[ResourceType, dict[str, Held]]) -> Dump:
    return msgspec.json.decode(msgspec.json.encode(config_dump(held)), type=Dump)


def words(*texts: str) -> dict[str, str]:
    return {text.upper().replace("_", ""): text for text in texts}


TYPES = words("deployment", "cronjob", "pod", "job")
FAMILIES = {"AUTOMATIC": "", "IPV4_ONLY": "IPv4", "IPV6_ONLY": "IPv6", "DUAL": "Dual"}


def gateway(said: str | None) -> str | None:
    """The recording has the port behind the destination."""
    return None if said is None else said.rpartition(":")[0]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_recording_is_dumped_as_it_says(version: str, scenario: str) -> None:
    store = Store()
    for step in recordings.steps(RECORDINGS / version / scenario):
        for message in step.messages:
            reading = Reading(parse(message.data))
            store.remove(reading.type, reading.removed)
            for part in reading.parts():
                store.put(reading.type, part)
        dump = read(store.held)
        assert dump.unreadable == []
        assert_says(dump, step.state)


def assert_says(dump: Dump, state: dict[str, Any]) -> None:
    workloads = {each.uid: each for each in dump.workloads}
    assert workloads.keys() == state["workloads"].keys()
    for uid, said in state["workloads"].items():
        found = workloads[uid]
        for name in ("name", "namespace", "network", "node", "canonical_name", "canonical_revision"):
            assert getattr(found, name) == said.get(name, ""), (uid, name)
        assert found.workload_ips == said["addresses"]
        assert found.protocol == {"NONE": "TCP"}.get(said["tunnel_protocol"], said["tunnel_protocol"])
        assert found.status.upper() == said["status"]
        assert found.workload_type == TYPES[said["workload_type"]]
        assert found.trust_domain == (said["trust_domain"] or "cluster.local")
        assert found.service_account == (said["service_account"] or "default")
        assert found.cluster_id == said["cluster_id"]
        assert found.authorization_policies == said["authorization_policies"]
        assert (found.waypoint and found.waypoint.destination) == gateway(said["waypoint"])
        assert {"region": found.locality.region, "zone": found.locality.zone} == {
            "region": "", "zone": "", **{k: v for k, v in said.get("locality", {}).items() if k != "subzone"},
        }  # fmt: skip
    services = {f"{each.namespace}/{each.hostname}": each for each in dump.services}
    assert services.keys() == state["services"].keys()
    for name, said in state["services"].items():
        service = services[name]
        assert service.name == said["name"]
        assert service.vips == said["vips"]
        assert service.ports == {str(p["service_port"]): p["target_port"] for p in said["ports"]}
        assert service.ip_families == FAMILIES[said["ip_families"]]
        usable = {each["uid"]: each for each in said["endpoints"] if each["usable"]}
        assert usable.keys() <= service.endpoints.keys()
        for uid, each in usable.items():
            assert service.endpoints[uid].workload_uid == uid
            ports = service.endpoints[uid].port
            assert {str(port): target for port, target in ports.items() if target} == each["ports"]
        assert (service.waypoint and service.waypoint.destination) == gateway(said["waypoint"])
    assert {f"{each.namespace}/{each.name}" for each in dump.policies} == state["policies"].keys()
    for each in dump.policies:
        said = state["policies"][f"{each.namespace}/{each.name}"]
        assert each.action.upper() == said["action"]
        assert words("Global", "Namespace", "WorkloadSelector")[said["scope"].replace("_", "")] == each.scope


def test_what_is_rare_has_ztunnels_words_too() -> None:
    balancing = workload_pb2.LoadBalancing(mode=2, routing_preference=[6, 1, 2], health_policy=1)
    service = workload_pb2.Address(
        service=workload_pb2.Service(
            name="web",
            namespace="shop",
            hostname="web.example",
            load_balancing=balancing,
            addresses=[workload_pb2.NetworkAddress(network="n1", address=bytes([10, 0, 0, 0]), length=16)],
            waypoint=workload_pb2.GatewayAddress(
                hostname=workload_pb2.NamespacedHostname(namespace="shop", hostname="wp.example"),
                hbone_mtls_port=15008,
            ),
        )
    )
    workload = workload_pb2.Workload(uid="u", status=1, network_mode=1, addresses=[bytes(15) + b"\1"])
    workload.services["shop/web.example"].ports.add(service_port=80, target_port=8080)
    workload.waypoint.address.address = bytes([10, 96, 0, 1])
    workload.capacity.value = 0
    values = {"shop/web.example": service, "u": workload_pb2.Address(workload=workload)}
    held = {name: Held("", value.SerializeToString()) for name, value in values.items()}
    broken = b"\x0a\x02\x0a\x09"
    dump = read({ResourceType.ADDRESS: {**held, "z": Held("", broken)}, ResourceType.AUTHORIZATION: {}})
    assert dump.unreadable == ["z"]
    (found,), (web,) = dump.workloads, dump.services
    assert (found.status, found.workload_ips, found.capacity) == ("Unhealthy", ["::1"], 0)
    assert found.waypoint == Gateway("/10.96.0.1")
    assert web.waypoint == Gateway("shop/wp.example")
    assert web.vips == ["n1/10.0.0.0/16"]
    assert web.load_balancer == LoadBalancer("Failover", ["Network", "Region", "Zone"], "AllowAll")
    assert web.endpoints == {"u": Endpoint("u", "shop/web.example", {80: 8080})}


def test_several_waypoints_are_there_with_their_weights_and_the_heaviest_where_istioctl_looks() -> None:
    service = workload_pb2.Service(name="web", namespace="shop", hostname="web.example")
    for name, weight in (("old", 10), ("new", 90), ("off", 0)):
        waypoint = service.weighted_waypoints.add(weight=weight)
        waypoint.destination.hostname.namespace = "shop"
        waypoint.destination.hostname.hostname = f"{name}.example"
    value = workload_pb2.Address(service=service).SerializeToString()
    held = {ResourceType.ADDRESS: {"shop/web.example": Held("", value)}, ResourceType.AUTHORIZATION: {}}
    (web,) = config_dump(held)["services"]
    assert [(each["destination"], each["weight"]) for each in web["weightedWaypoints"]] == [
        ("shop/old.example", 10),
        ("shop/new.example", 90),
    ]
    assert web["waypoint"]["destination"] == "shop/new.example"
    service.waypoint.hostname.namespace, service.waypoint.hostname.hostname = "shop", "old.example"
    value = workload_pb2.Address(service=service).SerializeToString()
    held[ResourceType.ADDRESS] = {"shop/web.example": Held("", value)}
    assert config_dump(held)["services"][0]["waypoint"]["destination"] == "shop/old.example"
