"""What the mesh says of itself: policies, and networks."""

from __future__ import annotations

import pytest

from pykmesh.contracts.address import Policy, Workload, decode_address
from pykmesh.proto.workload_pb2 import Address
from services.map_writer.mesh import Mesh, Touched


def put(mesh: Mesh, name: str, namespace: str, *policies: str, network: str = "") -> Workload:
    said = {"uid": name, "namespace": namespace, "authorization_policies": policies, "network": network}
    message = Address(workload=said | {"addresses": [bytes([10, 0, 0, len(mesh.workloads)])]})
    found = decode_address(message.SerializeToString())
    assert isinstance(found, Workload)
    mesh.put(name, found, Touched())
    return found


def test_a_policy_that_is_only_tried_is_none() -> None:
    mesh = Mesh()
    plain, named, both = put(mesh, "a", "shop"), put(mesh, "b", "shop", "p"), put(mesh, "c", "bank", "p", "q")
    known = (plain, named, both)
    for policies, has in (
        ([Policy("p", None, dry_run=True)], (False, False, True)),  # of q nobody knows anything
        ([Policy("p", None, dry_run=True), Policy("q", None, dry_run=True)], (False, False, False)),
        ([Policy("p", None), Policy("q", None, dry_run=True)], (False, True, True)),
        ([Policy("shop/all", "shop", dry_run=True)], (False, True, True)),
        ([Policy("shop/all", "shop")], (True, True, True)),
        ([Policy("shop/all", "shop"), Policy("p", None, dry_run=True)], (True, True, True)),
        ([Policy("all", "", dry_run=True), Policy("p", None, dry_run=True)], (False, False, True)),
        ([Policy("all", "")], (True, True, True)),
    ):
        for policy in policies:
            mesh.put_policy(policy, Touched())
        assert tuple(map(mesh.has_policy, known)) == has
        assert mesh.unenforced() == sum(has)
        for policy in policies:
            mesh.remove_policy(policy.name, Touched())
        assert mesh.unenforced() == 2


@pytest.mark.parametrize(
    ("networks", "own", "instead"),
    [
        ((), "", []),
        (("",), "", []),
        (("net1",), "", ["net1"]),
        (("net1", ""), "", []),
        (("", ""), "net1", [""]),
        (("net1", "net2"), "net2", []),
    ],
)
def test_a_mesh_that_is_all_in_other_networks_says_so(
    networks: tuple[str, ...], own: str, instead: list[str]
) -> None:
    mesh = Mesh()
    for number, network in enumerate(networks):
        put(mesh, f"w-{number}", "shop", network=network)
    assert mesh.networks_instead(own) == instead
