from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from pykmesh.demo.pods import Pod
from tests.mesh.manifests import host, pod, service, text
from tests.mesh.node import Node, serve

VIP4, VIP6 = "10.96.0.10", "fd96::10"


class Mesh(NamedTuple):
    """A node with an enrolled client, one that is not, and two endpoints behind a dual-stack service."""

    node: Node
    client: Pod
    stranger: Pod
    web: list[Pod]


def web_manifests(*pods: Pod) -> str:
    workloads = [pod(p.name, str(p.address4), str(p.address6), app="web") for p in pods]
    return text(service("web", VIP4, VIP6, app="web", ports={80: 8080, 9090: 9090}), *workloads)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    node = Node(tmp_path_factory.mktemp("mesh"))
    try:
        with node.network as network:
            client, stranger = network.add("client", 10), network.add("stranger", 11)
            web = [network.add(f"web-{i}", 20 + i) for i in (1, 2)]
            for endpoint in web:
                serve(endpoint, "--http", "8080", "--http", "8081", "--udp", "9090")
            node.write(
                "client", text(pod("client", str(client.address4), str(client.address6), app="client"))
            )
            node.write("web", web_manifests(*web))
            node.start()
            node.enroll(client)
            node.until_endpoints(
                host("web"), {f"{a}:{p}" for w in web for a in (w.address4, w.address6) for p in (8080, 9090)}
            )
            yield Mesh(node, client, stranger, web)
    finally:
        node.end()
