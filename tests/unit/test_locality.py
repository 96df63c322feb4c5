"""How near an endpoint is (xds.md 3.3)."""

from __future__ import annotations

from typing import Any

import pytest

from pykmesh.contracts.address import FieldError, Workload, decode_address
from pykmesh.proto.workload_pb2 import Address, LoadBalancing
from services.map_writer.locality import Locality, rank
from services.map_writer.mesh import Mesh, Touched

HERE = Locality("eu", "a", "", "n1", "c1", "")
REGION, ZONE, SUBZONE, NODE, CLUSTER, NETWORK = range(1, 7)


@pytest.mark.parametrize(
    ("scopes", "there", "expected"),
    [
        ((), Locality(), 0),
        ((REGION,), Locality("eu"), 1),
        ((REGION,), Locality("us"), 0),
        ((REGION, ZONE), Locality("eu", "b"), 1),
        ((REGION, ZONE), Locality("us", "a"), 0),
        ((REGION, ZONE, SUBZONE), Locality("eu", "a", ""), 3),
        ((REGION, ZONE, SUBZONE), Locality("eu", "a", "s"), 2),
        ((NODE,), Locality(node="n1"), 1),
        ((NODE,), Locality("eu", "a", "", "n2"), 0),
        ((CLUSTER, NODE), Locality(cluster="c1"), 1),
        ((NETWORK, REGION, ZONE), Locality("eu", "b"), 2),
        ((NETWORK, REGION), Locality("eu", network="other"), 0),
    ],
)
def test_scopes_count_until_the_first_that_differs(
    scopes: tuple[int, ...], there: Locality, expected: int
) -> None:
    assert rank(scopes, HERE, there) == expected


@pytest.mark.parametrize("scope", [0, 7])
def test_a_scope_that_is_not_known_is_refused(scope: int) -> None:
    address = Address()
    address.service.namespace, address.service.hostname = "shop", "web"
    address.service.load_balancing.routing_preference.append(LoadBalancing.Scope.ValueType(scope))
    with pytest.raises(FieldError, match=f"routing_preference: scope {scope} is unknown"):
        decode_address(address.SerializeToString())


@pytest.mark.parametrize(
    ("said", "learned"),
    [
        ({"locality": {"region": "eu", "zone": "a"}}, ("eu", "a", "")),
        ({"locality": {"zone": "a"}}, ("", "a", "")),
        ({"locality": {"region": "eu"}, "node": "n2"}, ("", "", "")),
        ({"locality": {"region": "us"}, "cluster_id": "remote"}, ("", "", "")),
        ({"locality": {"region": "us"}, "network": "net2"}, ("", "", "")),
        ({}, ("", "", "")),
    ],
)
def test_where_this_node_is_only_its_own_workloads_say(
    said: dict[str, Any], learned: tuple[str, str, str]
) -> None:
    mesh = Mesh(Locality(node="n1", cluster="c1"))
    found = decode_address(
        Address(workload={"uid": "a", "node": "n1", "cluster_id": "c1"} | said).SerializeToString()
    )
    assert isinstance(found, Workload)
    mesh.put("a", found, Touched())
    assert mesh.here == Locality(*learned, "n1", "c1")
