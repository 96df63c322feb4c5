"""Tells the control plane where waypoints are: each has a Service, each node's front an EndpointSlice.

That is how every node learns of them, by the workload API as of all else. A waypoint's Service has the
port HANDOFF_PORT, by which data planes tell it from one of Istio's own. To the embedded control plane it is
said in files, here; to an API server by cluster_writer.py.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import yaml

from pykmesh.contracts.waypoints import HANDOFF_PORT
from pykmesh.files import write_whole
from pykmesh.manifests.objects import GATEWAY_NAME, USE_WAYPOINT, Gateway, ObjectRef
from services.waypoint_mgr.attachments import Condition, Listener

PORT_NAME: Final = "handoff"
SUFFIX: Final = ".yaml"
NAME_MAX: Final = 200


class Place(NamedTuple):
    """Where an instance takes connections."""

    instance: str
    address: str
    port: int


class Announced(msgspec.Struct, frozen=True):
    """A waypoint, by its Gateway. `manifests` None: it is not known yet what runs; what was said stays."""

    ref: ObjectRef
    uid: str
    hostname: str
    manifests: list[dict[str, Any]] | None
    is_reachable: bool = False
    """The mesh knows that somebody takes connections there."""
    listeners: tuple[Listener, ...] | None = None
    """None: it is not known yet what is said of routes."""


class Said(msgspec.Struct, frozen=True):
    waypoints: tuple[Announced, ...] = ()
    routes: Mapping[ObjectRef, tuple[Condition, ...]] = {}
    """All there are, with what waypoints say of them."""


class Announcer(Protocol):
    def say(self, said: Said) -> None:
        """Takes what is so. OSError when that cannot be told for some of it; it is for the rest."""


def objects(waypoint: Gateway, places: Iterable[Place]) -> list[dict[str, Any]]:
    """As manifests. The Service is there also where no instance is: its traffic is then refused by name."""
    labels = {GATEWAY_NAME: waypoint.name}
    own = {**labels, USE_WAYPOINT: "none"}  # it goes by way of nobody, whatever its namespace does
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": waypoint.name, "namespace": waypoint.namespace, "labels": own},
        "spec": {
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"name": PORT_NAME, "port": HANDOFF_PORT, "protocol": "TCP"}],
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
        "endpoints": [{"addresses": [place.address], "conditions": {"ready": True}}],
        "ports": [{"name": PORT_NAME, "port": place.port, "protocol": "TCP"}],
    }


class Announcements:
    """A file for each waypoint, there at once and whole."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def say(self, said: Said) -> None:
        """Makes the files say this and nothing else. The folder has no statuses."""
        self._directory.mkdir(parents=True, exist_ok=True)
        errors: list[str] = []
        paths = {each.ref: self._directory / f"{_file_name(each.ref)}{SUFFIX}" for each in said.waypoints}
        for each in said.waypoints:
            try:
                if each.manifests is not None:
                    _write(paths[each.ref], yaml.safe_dump_all(each.manifests, sort_keys=False))
            except OSError as error:
                errors.append(f"{each.ref}: {error}")
        for path in set(self._directory.glob(f"*{SUFFIX}")) - set(paths.values()):
            path.unlink(missing_ok=True)
        if errors:
            raise OSError("; ".join(errors))


def _file_name(waypoint: ObjectRef) -> str:
    """A digest of one that is too long."""
    name = f"{waypoint.namespace}_{waypoint.name}"  # no name has a _
    if len(name) <= NAME_MAX:
        return name
    return f"{name[: NAME_MAX - 33]}-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        write_whole(path, text)
