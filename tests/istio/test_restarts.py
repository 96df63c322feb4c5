"""istiod goes and comes back while traffic flows."""

from __future__ import annotations

from typing import Any

import pytest

from tests.istio.conftest import Mesh
from tests.istio.control_plane import ControlPlane
from tests.istio.namespace import Namespace
from tests.istio.traffic import answers, at, workload
from tests.mesh.manifests import Object, pod, service
from tests.mesh.node import finish, probe, until

MANY = 60


def far_pods(count: int) -> list[Object]:
    """Pods that nobody talks to."""
    return [pod(f"far-{n}", f"10.200.1.{n}", f"fdaa::{n:x}", app="far") for n in range(1, count + 1)]


def client_status(mesh: Mesh) -> dict[str, Any]:
    found: dict[str, Any] = mesh.node.status()["processes"]["xds_client"]
    return found


def until_connected_anew(mesh: Mesh, before: dict[str, Any]) -> dict[str, Any]:
    """To istiod, by a stream that is not the one of before, and with a first answer to each type."""

    def is_new() -> dict[str, Any] | None:
        said = client_status(mesh)
        answered = said["acks"] - before["acks"] >= 2
        return said if said["connected"] and said["streams"] > before["streams"] and answered else None

    found: dict[str, Any] = until(is_new, "connected anew")
    return found


@pytest.fixture
def known(mesh: Mesh, namespace: Namespace) -> Namespace:
    """A namespace with a service of two pods, and many other pods; the mesh knows all."""
    first, second, _ = mesh.web
    namespace.apply(service("web", app="web", ports={80: 8080}), workload(first), workload(second))
    namespace.apply(service("far", app="far", ports={80: 8080}), *far_pods(MANY))
    mesh.node.until_endpoints(namespace.host("web"), at(8080, first, second))
    until(lambda: len(mesh.node.endpoints(namespace.host("far"))) == 2 * MANY, "all of them")
    return namespace


def test_a_restart_fails_no_connection_and_repeats_little_of_what_is_held(
    mesh: Mesh, control_plane: ControlPlane, known: Namespace
) -> None:
    before, prober = client_status(mesh), probe(mesh.client, known.vips("web")[0], 80)
    control_plane.stop_istiod()
    until(lambda: not client_status(mesh)["connected"], "disconnected")
    assert len(mesh.node.endpoints(known.host("far"))) == 2 * MANY
    control_plane.start_istiod()
    after = until_connected_anew(mesh, before)
    known.apply(workload(mesh.web[2]))
    mesh.node.until_endpoints(known.host("web"), at(8080, *mesh.web))
    found = finish(prober)
    assert found["failed"] == 0, found["errors"]
    assert set(found["answers"]) >= {mesh.web[0].name, mesh.web[1].name}
    assert after["bytes"] - before["bytes"] < MANY * 100, "istiod compared the versions that the client named"
    assert after["nacks"] == before["nacks"]


def test_what_goes_while_istiod_is_away_is_gone_when_it_is_back(
    mesh: Mesh, control_plane: ControlPlane, known: Namespace
) -> None:
    before, (address, _) = client_status(mesh), known.vips("web")
    prober = probe(mesh.client, address, 80)
    control_plane.stop_istiod()
    gone = known.vips("far")
    known.delete("Service", "far")
    known.delete("Pod", mesh.web[1].name, *(found["metadata"]["name"] for found in far_pods(MANY)))
    control_plane.start_istiod()
    until_connected_anew(mesh, before)
    mesh.node.until_endpoints(known.host("web"), at(8080, mesh.web[0]))
    for source in ("xds", "state", "bpf"):
        text = mesh.node.cli("get", "services", "--from", source, "-o", "json").stdout
        assert not any(vip in text for vip in gone), source
    assert answers(mesh.client, address) == {mesh.web[0].name}
    found = finish(prober)
    assert found["failed"] == 0, found["errors"]


def test_an_istiod_without_ambient_is_named_while_traffic_goes_on(
    mesh: Mesh, control_plane: ControlPlane, known: Namespace
) -> None:
    prober = probe(mesh.client, known.vips("web")[0], 80)
    control_plane.stop_istiod()
    control_plane.start_istiod(PILOT_ENABLE_AMBIENT="false")
    try:
        wanted = "ztunnel requires PILOT_ENABLE_AMBIENT=true"
        until(lambda: wanted in str(client_status(mesh)["errors"]), "told")
    finally:
        control_plane.stop_istiod()
        control_plane.start_istiod()
    until(lambda: client_status(mesh)["connected"], "connected")
    found = finish(prober)
    assert found["failed"] == 0, found["errors"]
