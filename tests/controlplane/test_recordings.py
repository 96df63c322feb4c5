"""Fed with the objects of a recorded cluster, the translation says what istiod said of it.

Compared after every step: all services and workloads, all of their fields but

- `waypoint`, `weighted_waypoints` and `application_tunnel`, which come of Gateways, and
- `authorization_policies`, which come of PeerAuthentications and AuthorizationPolicies:

the control plane reads neither kind. Policies themselves are resources of another type.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pykmesh.controlplane.dialect import Dialect
from pykmesh.controlplane.settings import MeshSettings
from pykmesh.controlplane.translate import translate
from pykmesh.proto import discovery_pb2, workload_pb2

from .view import Plain, view
from .world import World

RECORDINGS = Path(__file__).parents[1] / "data" / "recordings"
VERSIONS = {"istiod-1.25.5": Dialect.V1_25, "istiod-1.31-eed52ebb66ad": Dialect.V1_31}
SCENARIOS = ("basics", "service-entries", "reconnect", "policies", "waypoints", "waypoint-status")
LEFT_OUT = {
    "services": ("waypoint", "weighted_waypoints"),
    "workloads": ("waypoint", "application_tunnel", "authorization_policies"),
}
KUBERNETES = "default/kubernetes.default.svc.cluster.local"


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("version", VERSIONS)
def test_after_each_step_the_same_services_and_workloads_are_said(version: str, scenario: str) -> None:
    folder = RECORDINGS / version / scenario
    expected = _expected(folder)
    target_port = expected[0]["services"][KUBERNETES]["ports"][0]["target_port"]
    world, mesh = World(target_port), MeshSettings(dialect=VERSIONS[version])
    for operations, step in zip(_steps(folder), expected, strict=True):
        for operation in operations:
            world.play(operation)
        seen = view(translate(world.cluster, mesh))
        for kind, left_out in LEFT_OUT.items():
            assert seen[kind] == _without(step[kind], left_out), (
                f"{kind} after step {step['step']} {step['name']}"
            )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_mesh_of_ten_thousand_pods_is_said_alike(version: str) -> None:
    """The recording holds the state's hash only, so nothing can be left out; it has no policy or Gateway."""
    folder = RECORDINGS / version / "scale"
    expected = _expected(folder)
    world, mesh = World(_target_port_in_stream(folder)), MeshSettings(dialect=VERSIONS[version])
    last = expected[-1]["step"]
    for operations, step in zip(_steps(folder), expected, strict=True):
        for operation in operations:
            world.play(operation)
        if step["step"] in (1, 2, last):  # each takes seconds; the changes between are of one kind
            assert _digest(view(translate(world.cluster, mesh))) == step["sha256"], step["name"]


def _digest(seen: dict[str, dict[str, Plain]]) -> str:
    for service in seen["services"].values():
        service |= {"waypoint": None, "weighted_waypoints": []}
    for workload in seen["workloads"].values():
        workload |= {"waypoint": None, "authorization_policies": []}
    text = json.dumps({**seen, "policies": {}}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _steps(folder: Path) -> list[list[Plain]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    files = sorted((folder / "steps").iterdir())
    return [yaml.load(file.read_text(), loader) for file in files]  # noqa: S506 (both loaders are safe)


def _expected(folder: Path) -> list[Plain]:
    plain = folder / "expect.json"
    text = plain.read_text() if plain.exists() else gzip.decompress((folder / "expect.json.gz").read_bytes())
    steps: list[Plain] = json.loads(text)["steps"]
    return steps


def _without(resources: dict[str, Plain], fields: tuple[str, ...]) -> dict[str, Plain]:
    return {
        name: {field: value for field, value in resource.items() if field not in fields}
        for name, resource in resources.items()
    }


def _target_port_in_stream(folder: Path) -> int:
    """The API server's own port, which each recording has its own of."""
    with gzip.open(folder / "stream.jsonl.gz", "rt") as lines:
        for event in map(json.loads, lines):
            if event["dir"] == "recv" and (port := _kubernetes_port(event)):
                return port
    raise AssertionError(f"{KUBERNETES} is not in {folder}")


def _kubernetes_port(event: dict[str, Any]) -> int:
    response = discovery_pb2.DeltaDiscoveryResponse.FromString(base64.b64decode(event["b64"]))
    for resource in response.resources:
        if resource.name == KUBERNETES:
            address = workload_pb2.Address.FromString(resource.resource.value)
            return address.service.ports[0].target_port
    return 0
