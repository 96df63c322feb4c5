"""Who is behind a list of endpoints, and what keeps the others out of it."""

from __future__ import annotations

from typing import Any

import msgspec

from pykmesh.contracts.address import Families, decode_address
from pykmesh.proto import workload_pb2
from services.map_writer import lookup
from services.map_writer.desired import PortId, Rules
from services.map_writer.locality import Locality
from services.map_writer.mesh import Mesh, Touched

NAME = "shop/web.shop.svc.cluster.local"
PORT = PortId(NAME, 80, 4)


def mesh(*workloads: workload_pb2.Workload, mode: int = 0, scopes: tuple[int, ...] = ()) -> Mesh:
    found = Mesh(Locality("eu", "a"))
    service = workload_pb2.Service(
        name="web",
        namespace="shop",
        hostname="web.shop.svc.cluster.local",
        addresses=[workload_pb2.NetworkAddress(address=bytes([10, 96, 0, 1]))],
        ports=[workload_pb2.Port(service_port=80)],
        load_balancing=workload_pb2.LoadBalancing(mode=mode, routing_preference=scopes),
    )
    for address in (
        workload_pb2.Address(service=service),
        *(workload_pb2.Address(workload=workload) for workload in workloads),
    ):
        decoded = decode_address(address.SerializeToString())
        found.put(decoded.uid if hasattr(decoded, "uid") else decoded.name, decoded, Touched())
    return found


def workload(name: str, *, port: int = 8080, zone: str = "a", **fields: Any) -> workload_pb2.Workload:
    made = workload_pb2.Workload(
        uid=f"Kubernetes//Pod/shop/{name}",
        name=name,
        namespace="shop",
        addresses=[bytes([10, 0, 0, len(name)])],
        locality=workload_pb2.Locality(region="eu", zone=zone),
    )
    for field, value in fields.items():
        if field == "capacity":
            made.capacity.value = value
        elif field == "addresses":
            made.addresses[:] = value
        else:
            setattr(made, field, value)
    made.services[NAME].ports.add(service_port=80, target_port=port)
    return made


def unused(found: Mesh) -> dict[str, str | None]:
    said = lookup.members(found, {PORT.id: PORT}, Rules(), PORT.id)
    assert said is not None
    assert (said["service"], said["port"], said["family"]) == (NAME, 80, 4)
    return {member["name"].removeprefix("shop/"): member["unused"] for member in said["members"]}


def test_each_obstacle_is_named() -> None:
    found = mesh(
        workload("good"),
        workload("sick", status=1),
        workload("light", capacity=0),
        workload("elsewhere", network="n2"),
        workload("portless", port=0),
        workload("six", addresses=[bytes(16)]),
        workload("both", status=1, network="n2"),
    )
    assert unused(found) == {
        "good": None,
        "sick": "unhealthy",
        "light": "weight 0",
        "elsewhere": "in network n2, not (none)",
        "portless": "serves no port 80",
        "six": "has no IPv4 address",
        "both": "unhealthy; in network n2, not (none)",
    }


def test_who_is_too_far_is_told_how_far() -> None:
    found = mesh(workload("near"), workload("far", zone="b"), mode=2, scopes=(1, 2))
    assert unused(found) == {"near": None, "far": "too far: 1 of 2 match, 2 are needed"}
    assert unused(mesh(workload("far", zone="b"), mode=2, scopes=(1, 2))) == {"far": None}
    assert unused(mesh(workload("far", zone="b"), mode=1, scopes=(1, 2))) == {
        "far": "too far: 1 of 2 match, 2 are needed"
    }
    found = mesh(workload("near", zone="b"), workload("nearer", zone="b", capacity=0), mode=2, scopes=(1, 2))
    assert unused(found) == {"near": None, "nearer": "weight 0"}


def test_members_at_one_address_are_told_apart_by_their_ports() -> None:
    first = workload("one", addresses=[bytes([10, 5, 0, 5])])
    same = workload("two", addresses=[bytes([10, 5, 0, 5])])
    other = workload("three", addresses=[bytes([10, 5, 0, 5])], port=8081)
    found = mesh(first, same, other)
    assert unused(found) == {"one": None, "two": None, "three": None}
    said = lookup.members(found, {PORT.id: PORT}, Rules(), PORT.id)
    assert said is not None
    assert {m["name"]: m["port"] for m in said["members"]} == {
        "shop/one": 8080, "shop/two": 8080, "shop/three": 8081,
    }  # fmt: skip


def test_a_family_that_the_service_has_not_is_named() -> None:
    found, six = mesh(workload("four")), msgspec.structs.replace(PORT, family=6)
    found.services[NAME] = msgspec.structs.replace(found.services[NAME], families=Families.V4)
    said = lookup.members(found, {six.id: six}, Rules(), six.id)
    assert said is not None
    assert [m["unused"] for m in said["members"]] == ["the service has no IPv6"]


def test_services_and_workloads_are_found_by_each_of_their_names() -> None:
    found = mesh(workload("web-1"), workload("web-10"))
    for name in (NAME, "web.shop.svc.cluster.local", "web.shop"):
        (said,) = lookup.services(found, name)
        assert (said["service"], said["addresses"], said["ports"]) == (NAME, [["", "10.96.0.1"]], [80])
    assert lookup.services(found, "web") == []
    for name in ("shop/web-1", "Kubernetes//Pod/shop/web-1"):
        (said,) = lookup.workloads(found, name)
        assert (said["name"], said["addresses"]) == ("shop/web-1", ["10.0.0.5"])
    assert lookup.workloads(found, "shop/web") == []


def test_a_copy_of_a_mesh_stays_as_it_was() -> None:
    found = mesh(workload("web-1"))
    before = found.as_it_is()
    found.remove("Kubernetes//Pod/shop/web-1", Touched())
    found.put(
        NAME, decode_address(workload_pb2.Address(workload=workload("x")).SerializeToString()), Touched()
    )
    assert unused(before) == {"web-1": None}
    assert [*before.workloads] == ["Kubernetes//Pod/shop/web-1"]
    assert before.count_members(NAME) == 1
