"""What names stand for, by the cases of tests/data/dns.yaml, and what map_writer answers dns_proxy."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pykmesh.contracts import messages
from pykmesh.contracts.address import Families, Service, Workload, decode_address
from pykmesh.contracts.bulk import Ordinary
from pykmesh.contracts.messages import VERSION, DnsOutcome, DnsReply, DnsRequest
from pykmesh.contracts.waypoints import HANDOFF_PORT
from pykmesh.kernel.records import ip_from_text, ip_to_text
from pykmesh.proto import workload_pb2
from services.map_writer.desired import Rules
from services.map_writer.directory import Directory
from services.map_writer.dns import ADDRESSES_MAX, UPSTREAMS_MAX, Dns, look_up
from services.map_writer.follower import Follower
from services.map_writer.mesh import Mesh, Touched
from services.map_writer.planner import Held, Limits, Planner
from tests.control.resources import Resource, host, pod, pod_message, service, service_message
from tests.control.scripted_ads import resource
from tests.unit.mesh_model import NAMES, Maps, Tables, change

WORLD: dict[str, Any] = yaml.safe_load((Path(__file__).parent.parent / "data" / "dns.yaml").read_text())
DOMAIN: str = WORLD["domain"]


def service_of(said: dict[str, Any]) -> Service:
    namespace, _, hostname = said["name"].partition("/")
    message = workload_pb2.Address()
    found = message.service
    found.name, found.namespace, found.hostname = hostname.partition(".")[0], namespace, hostname
    for text in said.get("addresses", ()):
        network, _, address = text.partition("/") if text.startswith("remote/") else ("", "", text)
        place = ipaddress.ip_network(address)
        entry = found.addresses.add(network=network, address=place.network_address.packed)
        if "/" in address:
            entry.length = place.prefixlen
    found.ip_families = Families[said.get("families", "AUTOMATIC")].value
    found.canonical = said.get("canonical", False)
    found.visibility = workload_pb2.Service.Visibility.Value("NAMESPACE" if said.get("hidden") else "PUBLIC")
    found.load_balancing.health_policy = 1 if said.get("allows_unhealthy") else 0  # type: ignore[assignment]
    decoded = decode_address(message.SerializeToString())
    assert isinstance(decoded, Service)
    return decoded


def workload_of(said: dict[str, Any]) -> Workload:
    message = workload_pb2.Address()
    found = message.workload
    found.uid, found.namespace = said["uid"], said.get("namespace", "shop")
    found.network = said.get("network", "")
    found.addresses.extend(ipaddress.ip_address(address).packed for address in said.get("addresses", ()))
    found.status = 0 if said.get("healthy", True) else 1  # type: ignore[assignment]
    found.network_mode = 1 if said.get("host_network") else 0  # type: ignore[assignment]
    for name in said.get("services", ()):
        found.services[name].SetInParent()
    decoded = decode_address(message.SerializeToString())
    assert isinstance(decoded, Workload)
    return decoded


@pytest.fixture(scope="module")
def world() -> Mesh:
    mesh = Mesh()
    for said in WORLD["services"]:
        mesh.put(said["name"], service_of(said), Touched())
    for said in WORLD["workloads"]:
        mesh.put(said["uid"], workload_of(said), Touched())
    return mesh


@pytest.mark.parametrize("case", WORLD["cases"])
def test_a_name_stands_for_what_the_case_says(world: Mesh, case: str) -> None:
    said = WORLD["cases"][case]
    client = world.workload(said.get("client", "client"))
    found = look_up(world, Directory(), client, said["ask"], DOMAIN, is_6=said.get("type", "A") == "AAAA")
    if said.get("forward"):
        assert found is None
    else:
        assert found is not None
        assert sorted(map(ip_to_text, found.addresses)) == said["answer"]
        assert found.alias == said.get("alias", "")


def test_of_a_large_headless_service_a_part_is_drawn_and_its_workloads_stay_undecoded() -> None:
    mesh, ordinary = Mesh(), Ordinary()
    pods = [
        pod_message(f"p{n}", f"10.1.{n // 250}.{n % 250}", services=["web"]).SerializeToString()
        for n in range(2000)
    ]
    assert all(ordinary.take(pods))
    mesh.put_ordinary([*ordinary.groups()], Touched())
    mesh.put(host("web"), service_of({"name": host("web")}), Touched())
    client = workload_of({"uid": "client"})
    draws = [look_up(mesh, Directory(), client, "web", DOMAIN, is_6=False) for _ in range(2)]
    assert all(draw is not None and len(set(draw.addresses)) == ADDRESSES_MAX for draw in draws)
    assert draws[0] != draws[1]
    assert all(isinstance(workload, bytes) for workload in mesh.workloads.values())


@given(st.lists(st.integers(0, 2**32), max_size=60), st.lists(st.booleans(), min_size=60, max_size=60))
def test_a_directory_that_follows_knows_what_a_new_one_knows(seeds: list[int], asks: list[bool]) -> None:
    mesh, directory = Mesh(), Directory()
    hostnames = sorted({name.partition("/")[2] for name in NAMES})
    for seed, is_asked in zip(seeds, asks, strict=False):
        name, resource = change(seed)
        touched = Touched()
        if resource is None:
            mesh.remove(name, touched)
        elif isinstance(resource, Service | Workload):
            mesh.put(name, resource, touched)
        directory.follow(mesh, touched.services)
        if is_asked:
            for hostname in hostnames:
                known = [s.name for s in directory.services(mesh, hostname)]
                assert len(set(known)) == len(known)
                assert set(known) == {name for name in mesh.services if name.partition("/")[2] == hostname}


def test_services_of_one_hostname_come_and_go() -> None:
    mesh, directory = Mesh(), Directory()
    names = [f"{namespace}/x.example.com" for namespace in ("a", "b", "c")]

    def known() -> set[str]:
        return {found.name for found in directory.services(mesh, "x.example.com")}

    assert known() == set()
    for number in range(3):
        mesh.put(names[number], service_of({"name": names[number]}), Touched())
        directory.follow(mesh, [names[number], names[0]])
        assert known() == set(names[: number + 1])
    for number in range(3):
        mesh.remove(names[number], Touched())
        directory.follow(mesh, [names[number]])
        assert known() == set(names[number + 1 :])


class Asked:
    """map_writer's answers, in a mesh of some resources that the maps hold."""

    def __init__(self, *resources: Resource, synced: bool = True, refuses_policies: bool = False) -> None:
        self.follower = Follower()
        self.follower.synced = synced
        for found in resources:
            self.follower.mesh.put(found.name, decode_address(found.resource.value), Touched())
        maps = Maps(Limits(100, 100, 100))
        maps.apply(Planner(Held(), maps.limits, Rules("", refuses_policies)).sweep(self.follower.mesh))
        self._dns = Dns(self.follower, Tables(maps.maps), Directory(), DOMAIN)

    async def __call__(self, client: str, server: str, name: str = "") -> DnsReply:
        request = DnsRequest(VERSION, "", [ip_from_text(client)], ip_from_text(server), name, is_6=False)
        return messages.decode(DnsReply, await self._dns.answer(messages.encode(request)))


CLIENT, SERVER = "10.1.0.9", "10.96.0.53"
MESH = (
    pod("client", CLIENT),
    service("web", "10.96.0.1"),
    service("names", SERVER, ports={53: 5353}),
    pod("n1", "10.1.0.1", services=["names"]),
    service("empty", "10.96.0.54", ports={53: 5353}),
)


@pytest.mark.anyio
async def test_a_known_client_gets_an_answer_and_the_way_to_its_server() -> None:
    reply = await Asked(*MESH)(CLIENT, SERVER, "web")
    assert (reply.outcome, reply.addresses) == (DnsOutcome.ANSWER, [ip_from_text("10.96.0.1")])
    assert reply.upstreams == [(ip_from_text("10.1.0.1"), 5353)]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("server", "expected"),
    {"10.9.9.9": None, "10.96.0.54": [], "10.96.0.1": []}.items(),
    ids=["no service", "a service without endpoints", "a service without the port"],
)
async def test_a_server_is_reached_as_what_it_is(server: str, expected: list[Any] | None) -> None:
    reply = await Asked(*MESH)(CLIENT, server)
    assert (reply.outcome, reply.upstreams) == (DnsOutcome.FORWARD, expected)


def names(
    *addresses: str, name: str = "names", namespace: str = "shop", port: int = 53, **fields: Any
) -> Resource:
    """A service that serves names. `fields` are the message's."""
    message = service_message(name, ports={port: 5353}, namespace=namespace)
    for text in addresses:
        place = ipaddress.ip_network(text)
        found = message.service.addresses.add(address=place.network_address.packed)
        if "/" in text:
            found.length = place.prefixlen
    message.service.MergeFrom(workload_pb2.Service(**fields))
    return resource(host(name, namespace), message.SerializeToString())


def by_way_of(name: str) -> workload_pb2.GatewayAddress:
    hostname = workload_pb2.NamespacedHostname(namespace="shop", hostname=f"{name}.shop.svc.cluster.local")
    return workload_pb2.GatewayAddress(hostname=hostname)


def pod_by_waypoint() -> Resource:
    message = pod_message("names", SERVER)
    message.workload.waypoint.CopyFrom(by_way_of("waypoint"))
    return resource("Kubernetes//Pod/shop/names", message.SerializeToString())


PASSES = workload_pb2.LoadBalancing(mode=workload_pb2.LoadBalancing.PASSTHROUGH)
HIDDEN: Any = workload_pb2.Service.Visibility.Value("NAMESPACE")
N1, N2 = pod("n1", "10.1.0.1", services=["names"]), pod("n2", "10.1.0.2", services=["other"])
WAYPOINT = (
    service("waypoint", "10.96.0.15", ports={HANDOFF_PORT: 15019}),
    pod("w1", "10.1.0.15", services=["waypoint"]),
)
AT_N1, AT_N2 = [(ip_from_text("10.1.0.1"), 5353)], [(ip_from_text("10.1.0.2"), 5353)]
SERVERS: dict[str, tuple[list[Any] | None, list[Resource]]] = {
    "a service that passes all through": (None, [names(SERVER, load_balancing=PASSES), N1]),
    "one that passes through and has no such port": (None, [names(SERVER, load_balancing=PASSES, port=80)]),
    "one that would pass through, with a waypoint": (
        [],
        [names(SERVER, load_balancing=PASSES, waypoint=by_way_of("waypoint")), N1],
    ),
    "one with a waypoint that takes its traffic": (
        [],
        [names(SERVER, waypoint=by_way_of("waypoint")), N1, *WAYPOINT],
    ),
    "a workload": (None, [pod("names", SERVER)]),
    "a workload with a waypoint": (None, [pod_by_waypoint()]),
    "a workload with a policy": ([], [pod("names", SERVER, policies=["shop/p"])]),
    "in a range": (AT_N1, [names("10.96.0.0/16"), N1]),
    "in a range, with a waypoint": ([], [names("10.96.0.0/16", waypoint=by_way_of("waypoint")), N1]),
    "in a range that passes all through": (None, [names("10.96.0.0/16", load_balancing=PASSES)]),
    "in two ranges": (AT_N2, [names("10.96.0.0/16"), names("10.96.0.0/24", name="other"), N1, N2]),
    "in a range, and another service's address": (
        [],
        [names("10.96.0.0/16"), names(SERVER, name="other", port=80), N1, N2],
    ),
    "in a range, and a workload's address": (AT_N1, [names("10.96.0.0/16"), pod("names", SERVER), N1]),
    "another service for the client's namespace": (
        AT_N1,
        [names(SERVER, visibility=HIDDEN), N1, names(SERVER, name="aa", namespace="bank")],
    ),
    "a service that the client's namespace does not see": (
        None,
        [names(SERVER, name="aa", namespace="bank", visibility=HIDDEN)],
    ),
}


@pytest.mark.anyio
@pytest.mark.parametrize("case", SERVERS)
async def test_a_server_is_reached_where_the_programs_would_send_the_client(case: str) -> None:
    expected, resources = SERVERS[case]
    asked = Asked(pod("client", CLIENT), *resources, refuses_policies=True)
    assert (await asked(CLIENT, SERVER)).upstreams == expected


@pytest.mark.anyio
async def test_of_many_endpoints_of_a_server_some_are_drawn() -> None:
    many = [pod(f"n{number}", f"10.1.1.{number}", services=["names"]) for number in range(80)]
    asked = Asked(pod("client", CLIENT), names(SERVER), *many)
    first, second = [(await asked(CLIENT, SERVER)).upstreams for _ in range(2)]
    assert first is not None
    assert len(set(first)) == UPSTREAMS_MAX
    assert first != second


@pytest.mark.anyio
async def test_who_is_no_workload_gets_no_answer_but_the_way() -> None:
    asked = Asked(*MESH)
    reply = await asked("10.1.0.77", SERVER, "web")
    assert (reply.outcome, len(reply.upstreams or ())) == (DnsOutcome.UNKNOWN_CLIENT, 1)
    assert (await asked("10.1.0.77", SERVER)).outcome is DnsOutcome.FORWARD


@pytest.mark.anyio
async def test_a_mesh_that_is_not_whole_answers_nothing() -> None:
    assert (await Asked(*MESH, synced=False)(CLIENT, SERVER, "web")).outcome is DnsOutcome.NOT_READY
