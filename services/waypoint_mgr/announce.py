"""Tells the control plane which instances waypoints have: each has a Service, each instance an EndpointSlice.

That is how every node learns of them, by the workload API as of all else. A waypoint's Service has the
port HANDOFF_PORT, by which data planes tell it from one of Istio's own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from pykmesh.contracts.waypoints import HANDOFF_PORT
from pykmesh.manifests.objects import GATEWAY_NAME, Gateway

PORT_NAME: Final = "handoff"
SUFFIX: Final = ".yaml"


class Place(NamedTuple):
    """Where an instance takes connections."""

    instance: str
    address: str
    port: int


def objects(waypoint: Gateway, places: Iterable[Place]) -> list[dict[str, Any]]:
    """As manifests. The Service is there also where no instance is: its traffic is then refused by name."""
    labels = {GATEWAY_NAME: waypoint.name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": waypoint.name, "namespace": waypoint.namespace, "labels": labels},
        "spec": {
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"name": PORT_NAME, "port": HANDOFF_PORT}],
        },
    }
    return [service, *(_slice(waypoint, labels, place) for place in places)]


def _slice(waypoint: Gateway, labels: dict[str, str], place: Place) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": place.instance,
            "namespace": waypoint.namespace,
            "labels": {**labels, "kubernetes.io/service-name": waypoint.name},
        },
        "addressType": f"IPv{ipaddress.ip_address(place.address).version}",
        "endpoints": [{"addresses": [place.address]}],
        "ports": [{"name": PORT_NAME, "port": place.port}],
    }


class Announcements:
    """A file for each waypoint, there at once and whole."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, waypoints: Mapping[str, list[dict[str, Any]] | None]) -> None:
        """Makes the files say this and nothing else. None: the file stays as it is. OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for name, found in waypoints.items():
            if found is None:
                continue
            path = self._directory / f"{name}{SUFFIX}"
            text = yaml.safe_dump_all(found, sort_keys=False)
            if path.exists() and path.read_text() == text:
                continue
            temporary = self._directory / f".{name}.new"
            temporary.write_text(text)
            temporary.rename(path)
        for path in self._directory.glob(f"*{SUFFIX}"):
            if path.name.removesuffix(SUFFIX) not in waypoints:
                path.unlink()
