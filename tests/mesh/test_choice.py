"""Which endpoint a connection gets: by weight, by nearness, and alike otherwise. Real connects, counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pykmesh.demo.pods import Pod
from tests.mesh.manifests import Object, pod, service, text
from tests.mesh.node import Node, python, until

VIP = "240.10.0.1"
# Connected datagram sockets: the kernel shows where each really goes.
DRAW = """
import collections, json, socket
found = collections.Counter()
for _ in range({rounds}):
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(500)]
    for s in sockets: s.connect(({address!r}, 80))
    for line in open("/proc/net/udp").read().splitlines()[1:]:
        address, port = line.split()[2].split(":")
        if int(port, 16): found[socket.inet_ntoa(bytes.fromhex(address)[::-1])] += 1
    for s in sockets: s.close()
print(json.dumps(found))
"""
REFUSED = """
import socket
try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(({address!r}, 81))
except OSError as error: print(type(error).__name__)
"""
# The chi-square statistic that one run in a hundred million exceeds, by degrees of freedom.
UNLIKELY = {1: 33, 2: 37, 3: 40, 4: 43}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Pod]]:
    node = Node(tmp_path_factory.mktemp("choice"), subnet=7)
    try:
        with node.network as network:
            client = network.add("client", 10)
            node.write("nodes", text(_node("n1", "eu", "a"), _node("n2", "eu", "b")))
            node.write("client", text(_on(pod("client", str(client.address4), app="client"), "n1")))
            node.start("--node-name", "n1")
            node.enroll(client)
            yield node, client
    finally:
        node.end()


def test_endpoints_are_drawn_alike(pair: tuple[Node, Pod]) -> None:
    node, client = pair
    addresses = [f"10.9.1.{n}" for n in range(5)]
    node.write("choice", text(entry(*({"address": address} for address in addresses))))
    node.until_endpoints("shop/choice.example", {f"{address}:80" for address in addresses})
    assert_drawn(client, dict.fromkeys(addresses, 1), rounds=200)


@pytest.mark.parametrize(
    "weights", [{"10.9.2.1": 1, "10.9.2.2": 2, "10.9.2.3": 5}, {"10.9.2.1": 99, "10.9.2.4": 1}]
)
def test_endpoints_are_drawn_by_weight(pair: tuple[Node, Pod], weights: dict[str, int]) -> None:
    node, client = pair
    node.write("choice", text(entry(*({"address": a, "weight": w} for a, w in weights.items()))))
    node.until_endpoints("shop/choice.example", {f"{address}:80" for address in weights})
    assert_drawn(client, weights, rounds=40)


def test_the_nearest_are_drawn_and_the_next_when_they_are_gone(pair: tuple[Node, Pod]) -> None:
    node, client = pair
    where = {"10.9.3.1": "eu/a", "10.9.3.2": "eu/a", "10.9.3.3": "eu/b", "10.9.3.4": "us/a"}
    for gone, nearest in ((0, {"10.9.3.1", "10.9.3.2"}), (2, {"10.9.3.3"}), (3, {"10.9.3.4"})):
        left = [{"address": a, "locality": place} for a, place in list(where.items())[gone:]]
        close = entry(*left, annotations={"networking.istio.io/traffic-distribution": "PreferClose"})
        node.write("choice", text(close))
        node.until_endpoints("shop/choice.example", {f"{address}:80" for address in nearest})
        assert_drawn(client, dict.fromkeys(nearest, 1), rounds=4)


def test_a_service_of_its_node_alone_is_refused_where_it_has_no_endpoint(pair: tuple[Node, Pod]) -> None:
    node, client = pair
    local = service("local", "10.96.7.7", app="local", ports={80: 80})
    local["spec"]["internalTrafficPolicy"] = "Local"
    here, there = (
        _on(pod(f"local-{n}", f"10.9.4.{n}", app="local"), name) for n, name in ((1, "n1"), (2, "n2"))
    )
    node.write("local", text(local, here, there))
    node.until_endpoints("shop/local.shop.svc.cluster.local", {"10.9.4.1:80"})
    assert draw(client, "10.96.7.7", rounds=1).keys() == {"10.9.4.1"}
    node.write("local", text(local, there))
    node.until_endpoints("shop/local.shop.svc.cluster.local", set())
    with pytest.raises(AssertionError, match="ConnectionRefused"):
        draw(client, "10.96.7.7", rounds=1)


def test_an_address_of_a_range_is_the_services_that_has_the_longest(pair: tuple[Node, Pod]) -> None:
    node, client = pair
    ranges = {"240.20.0.0/16": "10.9.5.1", "240.20.5.0/24": "10.9.5.2", "240.20.5.9": "10.9.5.3"}
    entries = [
        entry({"address": endpoint}, name=f"range-{n}", address=address)
        for n, (address, endpoint) in enumerate(ranges.items())
    ]
    node.write("choice", text(*entries))
    for n, endpoint in enumerate(ranges.values()):
        node.until_endpoints(f"shop/range-{n}.example", {f"{endpoint}:80"})
    for address, endpoint in {
        "240.20.7.1": "10.9.5.1",
        "240.20.5.8": "10.9.5.2",
        "240.20.5.9": "10.9.5.3",
    }.items():
        assert draw(client, address, rounds=1) == {endpoint: 500}
    assert draw(client, "240.21.0.1", rounds=1) == {"240.21.0.1": 500}
    assert python(client, REFUSED.format(address="240.20.5.8")) == "ConnectionRefusedError"
    node.write("choice", text(entries[0]))
    node.until_endpoints("shop/range-1.example", set())
    assert draw(client, "240.20.5.9", rounds=1) == {"10.9.5.1": 500}
    node.write("choice", text(entry({"address": "10.9.5.1"})))
    node.until_endpoints("shop/range-0.example", set())
    assert draw(client, "240.20.5.9", rounds=1) == {"240.20.5.9": 500}


def test_the_status_says_where_the_node_is(pair: tuple[Node, Pod]) -> None:
    node, _ = pair
    said = until(lambda: node.status()["processes"]["map_writer"]["locality"], "a locality")
    assert (said["region"], said["zone"], said["node"]) == ("eu", "a", "n1")


def draw(client: Pod, address: str, rounds: int) -> dict[str, int]:
    found: dict[str, int] = json.loads(python(client, DRAW.format(address=address, rounds=rounds), 60))
    return found


def assert_drawn(client: Pod, weights: dict[str, int], rounds: int) -> None:
    found = draw(client, VIP, rounds)
    assert found.keys() == weights.keys()
    total, weight = sum(found.values()), sum(weights.values())
    assert total == rounds * 500
    expected = {address: total * share / weight for address, share in weights.items()}
    chi_square = sum((found[a] - expected[a]) ** 2 / expected[a] for a in expected)
    assert chi_square <= UNLIKELY.get(len(weights) - 1, 0), f"{found}, not about {expected}"


def entry(
    *endpoints: dict[str, Any],
    annotations: dict[str, str] | None = None,
    name: str = "choice",
    address: str = VIP,
) -> Object:
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": name, "namespace": "shop", "annotations": annotations or {}},
        "spec": {
            "hosts": [f"{name}.example"],
            "addresses": [address],
            "ports": [{"number": 80, "name": "udp", "protocol": "TCP"}],
            "resolution": "STATIC",
            "endpoints": list(endpoints),
        },
    }


def _node(name: str, region: str, zone: str) -> Object:
    labels = {"topology.kubernetes.io/region": region, "topology.kubernetes.io/zone": zone}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}


def _on(workload: Object, node: str) -> Object:
    workload["spec"]["nodeName"] = node
    return workload
