"""One control plane and one mesh for all tests of this folder; a Kubernetes namespace for each."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import NamedTuple

import pytest

from pykmesh.demo.pods import Pod
from tests.istio import binaries
from tests.istio.control_plane import ControlPlane
from tests.istio.namespace import NODE, Namespace
from tests.mesh.manifests import Object, pod
from tests.mesh.node import Node, serve

_NUMBERS = itertools.count(1)


class Mesh(NamedTuple):
    """A node that follows istiod, with an enrolled client and three servers that tests make pods of.

    The API server's waypoints run in the pod `waypoint`.
    """

    node: Node
    client: Pod
    web: list[Pod]
    waypoint: Pod


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """istiod runs with its assertions on: it ends where a client misuses the protocol, and must not."""
    found = binaries.find()
    if found is None:
        pytest.skip(f"no istiod and kube-apiserver in {binaries.FOLDER}: make istio-tools")
    with ControlPlane(found, tmp_path_factory.mktemp("control-plane")) as plane:
        yield plane
        assert plane.istiod.is_running, f"istiod ended:\n{plane.istiod.tail()}"


@pytest.fixture(scope="session")
def mesh(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    node = Node(
        tmp_path_factory.mktemp("mesh"),
        "--xds-address",
        control_plane.xds_address,
        "--node-name",
        NODE,
        subnet=9,
    )
    for name, zone in ((NODE, "a"), ("n2", "b")):
        control_plane.api.apply(_node(name, zone))
    clients = Namespace(control_plane.api, "clients")
    try:
        with node.network as network:
            client, waypoint = network.add("client", 10), network.add("waypoint", 11)
            web = [network.add(f"web-{i}", 20 + i) for i in (1, 2, 3)]
            for server in web:
                serve(server, "--http", "8080", "--http", "8081", "--udp", "9090")
            clients.apply(pod("client", str(client.address4), str(client.address6), app="client"))
            listens = ("--waypoint-address", str(waypoint.address4), "--waypoint-netns", str(waypoint.netns))
            node.start("--kubeconfig", str(control_plane.kubeconfig), *listens)
            node.enroll(client)
            yield Mesh(node, client, web, waypoint)
            said = node.status()["processes"]["xds_client"]
            assert (said["connected"], said["nacks"]) == (True, 0), said
    finally:
        clients.end()
        node.end()


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[Namespace]:
    found = Namespace(control_plane.api, f"t{next(_NUMBERS)}")
    try:
        yield found
    finally:
        found.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the control plane wrote is shown with a failure."""
    report = yield
    plane = item.funcargs.get("control_plane")
    if report.failed and isinstance(plane, ControlPlane):
        report.sections.append(("control plane", plane.logs()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped, each reason once."""
    skipped = terminalreporter.stats.get("skipped", [])
    for reason in sorted({report.longrepr[2].removeprefix("Skipped: ") for report in skipped}):
        terminalreporter.write_line(f"skipped: {reason}")


def _node(name: str, zone: str) -> Object:
    labels = {"topology.kubernetes.io/region": "eu", "topology.kubernetes.io/zone": zone}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
