"""What the maps hold against what they should. Pure but for reading them, and for a thread.

A sweep is planned and never written: the planner then holds what the maps should say, arranged as
they are where that is as right. What was read before differs from it, or nothing does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple, Protocol

from pykmesh.kernel.layout import AddressKind, Reason, flag_text
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ADDRESS_VALUE,
    ENDPOINT_KEY,
    ENDPOINT_SHARE,
    ENDPOINT_VALUE,
    RANGE_KEY,
    RANGE_NETWORK_BITS,
    RANGE_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    Destination,
    in_network,
    ip_to_text,
    port_number,
    range_to_text,
)
from services.map_writer.desired import PortId, Rules
from services.map_writer.mesh import Mesh
from services.map_writer.planner import Held, Limits, Planner
from services.map_writer.slots import Slots, plain, split

SHOWN: Final = 10_000
NOTHING: Final = "nothing"
_Entries = Mapping[bytes, bytes]
_Owners = Mapping[int, PortId]


class Readable(Protocol):
    """`writer.Maps`, as far as it is read here."""

    @property
    def limits(self) -> Limits: ...
    def read(self) -> Held: ...
    def ranges(self) -> dict[bytes, bytes]: ...


class Difference(NamedTuple):
    """An entry of a map, as people read it."""

    what: str
    where: str
    expected: str
    found: str


def drift(mesh: Mesh, maps: Readable, rules: Rules) -> dict[str, Any]:
    """How many entries were compared, and those that differ. `mesh` must not change meanwhile."""
    found, ranges = maps.read(), maps.ranges()
    planner = Planner(_copied(found), maps.limits, rules)
    for _ in planner.sweep(mesh):
        pass
    names = {**_names(mesh), **planner.owner_of_list}
    differences = list(_differences(found, planner.held, names))
    differences += _in_map("range", _ranges(planner.held), ranges, _range_where, _range_text)
    return {
        "compared": {
            "services": len(mesh.services),
            "endpoints": planner.held.endpoints,
            "addresses": len(planner.held.addresses),
        },
        "count": len(differences),
        "differences": [found._asdict() for found in islice(differences, SHOWN)],
    }


def _copied(held: Held) -> Held:
    """A plan changes what is held, but no list of it in place."""
    found = copy.copy(held)
    vars(found).update({name: part.copy() for name, part in vars(held).items() if hasattr(part, "copy")})
    return found


def _names(mesh: Mesh) -> dict[int, PortId]:
    """Lists that a service may have had before, or has in a stray entry."""
    ports = (
        PortId(name, port, family, by_waypoint)
        for name, service in mesh.services.items()
        for port, _ in service.ports
        for family in (4, 6)
        for by_waypoint in (False, True)
    )
    return {port.id: port for port in ports}


def _differences(found: Held, wanted: Held, owners: _Owners) -> Iterator[Difference]:
    def service_text(_: bytes, value: bytes) -> str:
        return _service_text(value, owners)

    yield from _in_map("service port", wanted.services, found.services, _service_where, service_text)
    for list_id in sorted(wanted.lists.keys() | found.lists.keys()):
        yield from _in_list(list_id, wanted.lists.get(list_id, []), found.lists.get(list_id, []), owners)
    for key, value in sorted(found.unreachable.items()):
        list_id, slot = ENDPOINT_KEY.unpack(key)
        where = f"{_list_name(list_id, owners)} slot {slot}"
        yield Difference("endpoint", where, NOTHING, _endpoint_text(list_id, value))
    if wanted.has_views != found.has_views:
        texts = {False: "off", True: "on"}
        yield Difference("switch", "views", texts[wanted.has_views], texts[found.has_views])
    yield from _in_map("address", wanted.addresses, found.addresses, _address_where, _address_text)


def _in_map(
    what: str,
    wanted: _Entries,
    found: _Entries,
    where: Callable[[bytes], str],
    text: Callable[[bytes, bytes], str],
) -> Iterator[Difference]:
    for key in sorted(wanted.keys() | found.keys()):
        expected, there = wanted.get(key), found.get(key)
        if expected != there:
            yield _difference(
                what,
                where(key),
                (NOTHING if expected is None else text(key, expected), expected),
                (NOTHING if there is None else text(key, there), there),
            )


def _in_list(list_id: int, wanted: Slots, found: Slots, owners: _Owners) -> Iterator[Difference]:
    wanted, found = split(wanted), split(found)
    if wanted == found:
        return
    for slot in range(max(len(wanted), len(found))):
        expected = wanted[slot] if slot < len(wanted) else b""
        there = found[slot] if slot < len(found) else b""
        if expected != there:
            where = f"{_list_name(list_id, owners)} slot {slot}"
            yield _difference(
                "endpoint",
                where,
                (_endpoint_text(list_id, expected), expected),
                (_endpoint_text(list_id, there), there),
            )


def _difference(
    what: str, where: str, expected: tuple[str, bytes | None], found: tuple[str, bytes | None]
) -> Difference:
    """Texts and values. What no text tells is told in hexadecimal."""
    texts = [expected[0], found[0]]
    if texts[0] == texts[1]:
        texts = [f"{text} ({(value or b'').hex()})" for text, value in (expected, found)]
    return Difference(what, where, *texts)


def _list_name(list_id: int, owners: _Owners) -> str:
    owner = owners.get(list_id)
    if owner is None:
        return f"list {list_id:016x}"
    return f"{owner.service} port {owner.port} IPv{owner.family}" + " by waypoint" * owner.by_waypoint


def _service_where(key: bytes) -> str:
    ip, network, port = SERVICE_KEY.unpack(key)
    return f"{Destination(ip, port_number(port))}{in_network(network)}"


def _service_text(value: bytes, owners: _Owners) -> str:
    list_id, endpoints, verdict, flags, affinity_s = SERVICE_VALUE.unpack(value)
    text = f"{endpoints} endpoints of {_list_name(list_id, owners)}, {_reason(verdict)}"
    text += f", {flag_text(flags)}" if flags else ""
    return text + (f", affinity of {affinity_s} s" if affinity_s else "")


def _endpoint_text(list_id: int, value: bytes) -> str:
    if not value:
        return NOTHING
    owner, ip, port = ENDPOINT_VALUE.unpack(value)
    text = str(Destination(ip, port_number(port)))
    if value != plain(value):
        other, share = ENDPOINT_SHARE.unpack(value)
        text += f" ({share} of 2^32 draws, the others to slot {other})"
    return text if owner == list_id else f"{text} that says it is of list {owner:016x}"


def _address_where(key: bytes) -> str:
    ip, network = ADDRESS_KEY.unpack(key)
    return f"{ip_to_text(ip)}{in_network(network)}"


def _address_text(key: bytes, rest: bytes) -> str:
    if not rest:
        return "a value that does not begin with its key"
    kind, verdict, view = ADDRESS_VALUE.unpack(key + rest)
    known = kind in AddressKind.__members__.values()
    name = AddressKind(kind).name.lower() if known else f"kind {kind}"
    text = f"{name}, {_reason(verdict)}"
    return text + (f", looks in network {view:08x} first" if view else "")


def _reason(number: int) -> str:
    return Reason(number).label if number in Reason.__members__.values() else f"reason {number}"


def _ranges(held: Held) -> dict[bytes, bytes]:
    return {key: RANGE_VALUE.pack(*ADDRESS_KEY.unpack(place)) for place, key in held.ranges.items()}


def _range_where(key: bytes) -> str:
    bits, network, ip = RANGE_KEY.unpack(key)
    return f"{range_to_text(ip, bits - RANGE_NETWORK_BITS)}{in_network(network)}"


def _range_text(_: bytes, value: bytes) -> str:
    ip, network = RANGE_VALUE.unpack(value)
    return f"looked up as {ip_to_text(ip)}{in_network(network)}"
