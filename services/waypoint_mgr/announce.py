"""Tells the control plane which instances waypoints have: each has a Service, each instance an EndpointSlice.

That is how every node learns of them, by the workload API as of all else. A waypoint's Service has the
port HANDOFF_PORT, by which data planes tell it from one of Istio's own.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from pykmesh.contracts.waypoints import HANDOFF_PORT
from pykmesh.manifests.objects import GATEWAY_NAME, Gateway

PORT_NAME: Final = "handoff"
SUFFIX: Final = ".yaml"
NAME_MAX: Final = 200


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
        """Makes the files say this and nothing else. None: the file stays as it is.

        OSError when that cannot be done for one of them; it is for the others.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        errors: list[str] = []
        paths = {name: self._directory / f"{_file_name(name)}{SUFFIX}" for name in waypoints}
        for name, found in waypoints.items():
            try:
                if found is not None:
                    _write(paths[name], yaml.safe_dump_all(found, sort_keys=False))
            except OSError as error:
                errors.append(f"{name}: {error}")
        for path in set(self._directory.glob(f"*{SUFFIX}")) - set(paths.values()):
            path.unlink(missing_ok=True)
        if errors:
            raise OSError("; ".join(errors))


def _file_name(waypoint: str) -> str:
    """Of a waypoint's `namespace/name`; a digest of one that is too long."""
    name = waypoint.replace("/", "_")  # which no name has
    if len(name) <= NAME_MAX:
        return name
    return f"{name[: NAME_MAX - 33]}-{hashlib.blake2b(waypoint.encode(), digest_size=16).hexdigest()}"


def _write(path: Path, text: str) -> None:
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.rename(path)
