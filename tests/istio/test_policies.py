"""Policies as istiod sends them, and one that it never sends."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.istio.api_server import ApiServer
from tests.istio.conftest import Mesh
from tests.istio.control_plane import ControlPlane
from tests.istio.namespace import Namespace
from tests.istio.traffic import workload
from tests.mesh.manifests import Object
from tests.mesh.node import Node, until

NEVER_SENT = "converted_peer_authentication_but-a-port"


def peer_authentication(name: str, mode: str, **spec: object) -> Object:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": name},
        "spec": {"mtls": {"mode": mode}, **spec},
    }


@pytest.fixture
def strict_mesh(control_plane: ControlPlane) -> Iterator[ApiServer]:
    """All of the mesh wants mutual TLS."""
    strict = peer_authentication("default", "STRICT")
    strict["metadata"]["namespace"] = "istio-system"
    control_plane.api.apply(strict)
    try:
        yield control_plane.api
    finally:
        control_plane.api.delete(strict)


def missing(node: Node) -> dict[str, int]:
    found: dict[str, int] = node.status()["processes"]["map_writer"]["policies_missing"]
    return found


def metric(node: Node, name: str) -> float:
    """A gauge of map_writer."""
    with urllib.request.urlopen(
        f"http://127.0.0.1:{node.instance.ports.map_writer}/metrics", timeout=10
    ) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return next(s.value for family in families for s in family.samples if s.name == name)


def test_a_policy_that_istiod_names_and_never_sends_is_told(
    mesh: Mesh, namespace: Namespace, strict_mesh: ApiServer
) -> None:
    server = mesh.web[0]
    namespace.apply(workload(server))
    until(lambda: mesh.node.status()["processes"]["map_writer"]["policies"], "the mesh's policy")
    assert missing(mesh.node) == {}
    permissive = {"selector": {"matchLabels": {"app": "web"}}, "portLevelMtls": {"8081": {"mode": "STRICT"}}}
    namespace.apply(peer_authentication("but-a-port", "PERMISSIVE", **permissive))
    policy = f"{namespace.name}/{NEVER_SENT}"
    until(lambda: missing(mesh.node) == {policy: 1}, "the policy that is missing")
    assert metric(mesh.node, "mesh_policies_missing") == 1
    assert f"POLICY NOT SENT: {policy}" in mesh.node.cli("status").stdout
    (told,) = mesh.node.json("get", "workloads", "-n", namespace.name)["workloads"]
    assert told["policies_missing"] == [policy]
    namespace.delete("PeerAuthentication")
    until(lambda: not missing(mesh.node), "no policy missing")
    assert "POLICY NOT SENT" not in mesh.node.cli("status").stdout
