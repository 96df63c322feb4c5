"""The structures shared with the programs, as user space packs and reads them.

Taken from the layout that the build wrote from the object's BTF: nothing here repeats an offset. A
map's pin is named after the hash of its layout, so a service cannot open one of another layout.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from enum import IntEnum, IntFlag
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

_FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "be16": "2s", "be32": "4s", "ip": "16s"}
_DTYPES = {"u8": "u1", "u16": "<u2", "u32": "<u4", "u64": "<u8", "be16": ">u2", "be32": ">u4", "ip": "V16"}

_OBJECTS = resources.files("pykmesh.kernel") / "objects"
OBJECT = _OBJECTS / "mesh.bpf.o"
OBJECT_BEFORE_5_13 = _OBJECTS / "mesh_before_5_13.bpf.o"
"""The same for kernels without global functions: they verify it five times as long."""

COOKIE_OBJECT = _OBJECTS / "cookie.bpf.o"
"""Tells cookies of network namespaces, where the kernel does not tell them itself."""


class LayoutError(Exception):
    """The build is missing, or Python names a field that the headers do not have."""


class MapLayout(NamedTuple):
    """How a map is declared. Sizes in bytes; `max_entries` is the default that settings replace."""

    name: str
    hash: str
    type: int
    key: str | None
    value: str | None
    key_size: int
    value_size: int
    max_entries: int

    @property
    def pin(self) -> str:
        return f"{self.name}@{self.hash}"


@functools.cache
def _document() -> dict[str, Any]:
    path = _OBJECTS / "layout.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise LayoutError(f"{path} is missing: build the programs first (make build)") from error
    except ValueError as error:
        raise LayoutError(f"{path} is damaged ({error}): build the programs again (make build)") from error
    return document


@functools.cache
def map_layout(name: str) -> MapLayout:
    found = _document()["maps"].get(name)
    if found is None:
        raise LayoutError(f"the object has no map {name}")
    return MapLayout(name, *(found[field] for field in MapLayout._fields[1:]))


def map_names() -> list[str]:
    return sorted(_document()["maps"])


def is_replaced() -> bool:
    """Whether the object on disk is another than the one whose layout was read here.

    A process may be a fork of one that read it before another release was put in the place of its files.
    """
    try:
        return bool(json.loads((_OBJECTS / "layout.json").read_text()) != _document())
    except (OSError, ValueError, LayoutError):  # it is being replaced
        return True


def check_objects() -> None:
    """LayoutError where the objects on disk are not, or no more, those whose layout was read."""
    if is_replaced():
        raise LayoutError("the files of this release were replaced: this process is of the one before")
    for name, wanted in _document()["objects"].items():
        path = _OBJECTS / name
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise LayoutError(f"{path}: {error.strerror}") from error
        if found != wanted:
            what = "is not of the build that layout.json is of"
            raise LayoutError(f"{path} {what}: it is being replaced, or is to be built again (make build)")


def setting_offset(name: str, size: int) -> int:
    """Where a read-only setting of the programs lies; its size is checked."""
    offset, declared = _document()["settings"][name]
    if declared != size:
        raise LayoutError(f"setting {name} has {declared} bytes, not {size}")
    return int(offset)


def fields_of(structure: str) -> tuple[int, list[dict[str, Any]]]:
    """Its size, and its fields as the build wrote them."""
    found = _document()["structures"][structure]
    return found["size"], found["fields"]


def codec(structure: str, *names: str) -> struct.Struct:
    """Packs the named fields, in the order of their offsets; all others are zero.

    Integers are the machine's (little-endian), ports two bytes in network order, addresses sixteen,
    arrays raw bytes.
    """
    size, fields = fields_of(structure)
    kept = [field for field in fields if field["name"] in names]
    if tuple(field["name"] for field in kept) != names:
        raise LayoutError(f"{structure} has {[f['name'] for f in fields]}, not {names} in this order")
    parts, at = ["<"], 0
    for field in kept:
        parts += [f"{field['offset'] - at}x", _format(field)]
        at = field["offset"] + field["size"]
    return struct.Struct("".join([*parts, f"{size - at}x"]))


def _format(field: dict[str, Any]) -> str:
    return f"{field['size']}s" if field["type"] == "bytes" else _FORMATS[field["type"]]


def offset(structure: str, name: str) -> int:
    """Where a field begins."""
    _, fields = fields_of(structure)
    return int(next(field["offset"] for field in fields if field["name"] == name))


@functools.cache
def dtype(structure: str) -> np.dtype[np.void]:
    """The structure for arrays; ports come as numbers, addresses as sixteen raw bytes."""
    size, fields = fields_of(structure)
    kept = [field for field in fields if field["type"] in _DTYPES]
    return np.dtype(
        {
            "names": [field["name"] for field in kept],
            "formats": [_DTYPES[field["type"]] for field in kept],
            "offsets": [field["offset"] for field in kept],
            "itemsize": size,
        }
    )


_PREFIXES = {
    "reason": "REASON_",
    "direction": "DIRECTION_",
    "flow_kind": "FLOW_",
    "address_kind": "ADDRESS_",
    "service_flag": "SERVICE_",
    "switch_index": "SWITCH_",
    "handoff_prefix": "HANDOFF_",
}


def _enum(name: str) -> dict[str, int]:
    values: dict[str, int] = _document()["enums"][name]
    return {key.removeprefix(_PREFIXES.get(name, "")): value for key, value in values.items()}


class Reason(IntEnum):
    """Why a program decided as it did (bpf/mesh_types.h, enum reason, says what each means)."""

    ROUTED = 0
    PASSTHROUGH = 1
    NO_ENDPOINT = 2
    NO_PORT = 3
    WAYPOINT_UNSUPPORTED = 4
    POLICY_UNSUPPORTED = 5
    FAMILY = 6
    ENDPOINT_VANISHED = 7
    STATE_LOST = 8
    RECORD_LOST = 9
    OPEN_LOST = 10
    DATAGRAM_LOST = 11
    NO_ROOM = 12
    SHUNNED = 13
    WAYPOINT_UNAVAILABLE = 14
    HANDOFF_UNKNOWN = 15

    @property
    def label(self) -> str:
        return self.name.lower()


class Direction(IntEnum):
    OUTBOUND = 1
    INBOUND = 2


class FlowKind(IntEnum):
    CLOSED = 1
    REFUSED = 2


class AddressKind(IntEnum):
    SERVICE = 1
    WORKLOAD = 2


class ServiceFlag(IntFlag):
    LEAST_CONNECTIONS = 1
    WAYPOINT = 2


class Switch(IntEnum):
    """Indexes of the map `switches`."""

    VIEWS = 0


class HandoffPrefix(IntEnum):
    """How an address begins that waypoints are told, by the family of the service's own."""

    IPV4 = 0xFD4D
    IPV6 = 0xFD4E


def dns_limits() -> tuple[int, int]:
    """How many servers of names a namespace may ask by way of the proxy; for how many ms it may be silent."""
    found = _enum("dns_limit")
    return found["DNS_SLOTS"], found["DNS_SILENCE_MS"]


def flag_text(flags: int) -> str:
    """The words of a service's flags."""
    return ", ".join(flag.name.lower() for flag in ServiceFlag if flag & flags and flag.name)


_ENUMS: dict[str, type[IntEnum | IntFlag]] = {
    "reason": Reason,
    "direction": Direction,
    "flow_kind": FlowKind,
    "address_kind": AddressKind,
    "service_flag": ServiceFlag,
    "switch_index": Switch,
    "handoff_prefix": HandoffPrefix,
}


def check_enums() -> None:
    """Raises LayoutError when a name or number here differs from the headers'."""
    for name, here in _ENUMS.items():
        there = {key: value for key, value in _enum(name).items() if key != "COUNT"}
        if there != {member.name: member.value for member in here}:
            raise LayoutError(f"enum {name} is {there} in the object")
