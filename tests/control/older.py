"""Streams of istiods that there is no recording of, by hand: that of 1.25.5 in an older version's form.

By the history of the API: a version leaves out the fields that came after it, and until 1.23 a waypoint was
said by its address instead of its hostname.
"""

from __future__ import annotations

import copy
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pykmesh.proto import workload_pb2
from tests.control import recordings
from tests.control.recordings import Message, Plain, Step
from tests.control.scripted_ads import ADDRESS, Response

VERSIONS: Final = ("1.24", "1.23", "1.22")
_SINCE_1_25: Final = {"service": ("extensions",), "workload": ("extensions", "capacity")}
_SINCE_1_24: Final = {"workload": ("network_mode",)}
_SINCE_1_23: Final = {"service": ("ip_families",)}


def steps(folder: Path, version: str) -> list[Step]:
    """A recording, as the older version would have sent it, and what must then be."""
    found = list(recordings.steps(folder))
    vips = {
        name: vip.partition("/")[2]
        for step in found
        for name, service in step.state["services"].items()
        for vip in service["vips"][:1]
    }
    return [
        Step(
            f"{version}: {step.name}",
            [_message(message, version, vips) for message in step.messages],
            _state(step.state, version, vips),
        )
        for step in found
    ]


def _left_out(version: str) -> list[dict[str, tuple[str, ...]]]:
    found: list[dict[str, tuple[str, ...]]] = [_SINCE_1_25]
    if version < "1.24":
        found.append(_SINCE_1_24)
    if version < "1.23":
        found.append(_SINCE_1_23)
    return found


def _message(message: Message, version: str, vips: Mapping[str, str]) -> Message:
    if message.type_url != ADDRESS:
        return message
    response = Response.FromString(message.data)
    for resource in response.resources:
        address = workload_pb2.Address.FromString(resource.resource.value)
        kind = address.WhichOneof("type")
        assert kind is not None
        said: Any = getattr(address, kind)
        for fields in _left_out(version):
            for name in fields.get(kind, ()):
                said.ClearField(name)
        if version < "1.24":
            if kind == "service":
                said.load_balancing.ClearField("health_policy")
                if not said.load_balancing.ByteSize():
                    said.ClearField("load_balancing")
            _by_address(said, vips)
        resource.resource.value = address.SerializeToString(deterministic=True)
    return message._replace(data=response.SerializeToString())


def _by_address(said: Any, vips: Mapping[str, str]) -> None:
    if said.waypoint.WhichOneof("destination") == "hostname":
        name = said.waypoint.hostname
        vip = ipaddress.ip_address(vips[f"{name.namespace}/{name.hostname}"])
        said.waypoint.address.address = vip.packed


def _state(state: Plain, version: str, vips: Mapping[str, str]) -> Plain:
    found = copy.deepcopy(state)
    for service in found["services"].values():
        if version < "1.23":
            service["ip_families"] = "AUTOMATIC"
        if version < "1.24":
            service["waypoint"] = _waypoint(service["waypoint"], vips)
            _only_healthy(service, found["workloads"])
    for workload in found["workloads"].values():
        if version < "1.24":
            workload["network_mode"] = "STANDARD"
            workload["waypoint"] = _waypoint(workload["waypoint"], vips)
    return found


def _waypoint(said: str | None, vips: Mapping[str, str]) -> str | None:
    name, _, port = (said or "").rpartition(":")
    return f"/{vips[name]}:{port}" if name in vips else said


def _only_healthy(service: Plain, workloads: Mapping[str, Plain]) -> None:
    if (service.get("load_balancing") or {}).pop("health_policy", None):
        for endpoint in service["endpoints"]:
            endpoint["usable"] = workloads[endpoint["uid"]]["status"] == "HEALTHY"
