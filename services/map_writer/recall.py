"""What the maps have of names that the control plane says wrongly and nobody else knows: it stays.

Pure. Such a name was accepted once, and then map_writer and xds_client both began anew: what a NACK leaves as
it was is in the maps alone. A list's id is a hash of the service's name, so its entries are found. Its
endpoints go when they are no members any more. None comes: nobody knows to which port of it. What it was of a
workload is nowhere: such a one is no endpoint any more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Final, cast

import msgspec

from pykmesh.contracts.address import Service, Workload
from pykmesh.contracts.waypoints import HANDOFF_PORT
from pykmesh.kernel.layout import AddressKind, Reason, ServiceFlag
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ADDRESS_VALUE,
    ENDPOINT_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    Ip,
    is_view,
    port_number,
)
from services.map_writer.desired import (
    NOTHING,
    DesiredService,
    Frontend,
    PortId,
    Rules,
    other_way,
)
from services.map_writer.mesh import Mesh, Place, Touched, place_of
from services.map_writer.slots import Slots, plain, split, weights_of

_NOBODY: Final = ""
"""Stands for workloads that are not known."""


class _Found(msgspec.Struct):
    """Of one name: the list of each entry of `services`, and what its addresses are, without their keys."""

    lists: dict[bytes, PortId]
    addresses: dict[Place, bytes]

    @property
    def is_waypoint(self) -> bool:
        return any(port.port == HANDOFF_PORT for port in self.lists.values())

    @property
    def has_waypoint(self) -> bool:
        return any(port.by_waypoint for port in self.lists.values())


class Recalled:
    """What a planner leaves as it is in the maps."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._found: dict[str, _Found] = {}
        self._owners: dict[Place, str] = {}
        self._waypoints: set[str] = set()
        """All that there were when their instances were looked for last."""
        self._instances: dict[Ip, str] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._found

    @property
    def names(self) -> list[str]:
        return sorted(name for name, found in self._found.items() if found.lists)

    @property
    def places(self) -> AbstractSet[Place]:
        return self._owners.keys()

    def address(self, mesh: Mesh, place: Place) -> bytes | None:
        """What an address was; None where it is not left as it is."""
        owner = self._owners.get(place)
        return None if owner is None or self._is_taken(mesh, place) else self._found[owner].addresses[place]

    def _is_taken(self, mesh: Mesh, place: Place) -> bool:
        """By somebody who is known: a service goes before a workload."""
        if mesh.is_a_services(place):
            return True
        rest = self._found[self._owners[place]].addresses[place] if place in self._owners else b""
        return mesh.is_a_workloads(place) and _is_workload(place, rest)

    def clear(self) -> None:
        self._found.clear()
        self._owners.clear()
        self._instances = None

    def find(
        self, mesh: Mesh, services: Mapping[bytes, bytes], addresses: Mapping[bytes, bytes]
    ) -> Iterator[None]:
        """Looks for what is whose among `services`, which nobody claims; a step for each name.

        Not what only some namespaces see (views): their workloads are not told to look there.
        """
        self.clear()
        by_port: defaultdict[int, defaultdict[int, list[bytes]]] = defaultdict(lambda: defaultdict(list))
        for key, value in services.items():
            if not is_view(key):
                by_port[_port(key)][SERVICE_VALUE.unpack(value)[0]].append(key)
        for name in mesh.unreadable:
            lists = dict(_lists_of(name, by_port))
            if lists:
                places = {*map(place_of_key, lists)} & addresses.keys()
                self._keep(name, lists, {place: rest for place in places if (rest := addresses[place])})
            yield
        if mesh.unreadable and self._rules.refuse_unenforced_policy:
            others = ((Place(at), rest) for at, rest in addresses.items() if at not in self._owners)
            self._keep(
                _NOBODY,
                {},
                {at: rest for at, rest in others if _is_workload(at, rest, Reason.POLICY_UNSUPPORTED)},
            )

    def _keep(self, name: str, lists: dict[bytes, PortId], addresses: dict[Place, bytes]) -> None:
        self._found[name] = _Found(lists, addresses)
        self._owners.update(dict.fromkeys(addresses, name))

    def touch(self, mesh: Mesh, touched: Touched) -> None:
        """Those that are known again, or gone; whose address is another's; whose waypoint may be another."""
        self._instances = None
        if not self._found:
            return
        gone = self._found.keys() - mesh.unreadable.keys()
        for name in gone if not mesh.unreadable else gone - {_NOBODY}:
            places = self._found.pop(name).addresses
            for place in places:
                del self._owners[place]
            touched.add((name,) if name else (), places)
        changed = [*touched.services, *touched.members]
        if any(name in self._waypoints or _is_waypoint(mesh.services.get(name)) for name in changed):
            for name, found in self._found.items():
                if found.has_waypoint:
                    touched.services[name] = None
        touched.add(filter(None, map(self._owners.get, touched.among(self._owners))), ())

    def desired(
        self, mesh: Mesh, name: str, services: Mapping[bytes, bytes], lists: Mapping[int, Slots]
    ) -> DesiredService:
        """What is still there of one of them. `services`, `lists`: what the maps hold of all."""
        own = self._found[name]
        taken = {place for key in own.lists if self._is_taken(mesh, place := place_of_key(key))}
        own.lists = {
            k: port for k, port in own.lists.items() if k in services and place_of_key(k) not in taken
        }
        for place in taken & own.addresses.keys():
            del own.addresses[place], self._owners[place]
        found = DesiredService({}, {}, {}, {})
        lengths: dict[int, int] = {}
        for key, port_id in own.lists.items():
            list_id, length, verdict, flags, affinity_s = SERVICE_VALUE.unpack(services[key])
            # Numbers stay what they are: another release may know more of them.
            reason, flag = cast("Reason", verdict), cast("ServiceFlag", flags)
            found.frontends[key] = Frontend(list_id, reason, flag, affinity_s)
            found.ports[list_id] = port_id
            lengths[list_id] = max(length, lengths.get(list_id, 0))
        for list_id, port_id in found.ports.items():
            slots = split(lists.get(list_id, []))[: lengths[list_id]]
            found.lists[list_id] = self._left(mesh, port_id, slots)
            if any(slot != plain(slot) for slot in slots):
                found.weights.update(weights_of(slots))
        return found if own.lists else NOTHING

    def _left(self, mesh: Mesh, port: PortId, slots: list[bytes]) -> dict[bytes, str]:
        """Those that are not healthy are left out where others are: nobody knows whether it takes such."""
        by_ip = {value: Ip(ENDPOINT_VALUE.unpack(value)[1]) for value in map(plain, slots) if value}
        if port.by_waypoint:
            there = self._instances_of_all(mesh)
        else:
            members = [each for each in mesh.members_of(port.service) if self._may_serve(mesh, each)]
            there = _addresses(mesh, [each for each in members if each.healthy] or members)
            if any(each.hostname in mesh.unlooked for each in members):
                # What it stands for is not known yet, but whom it cannot be.
                place = {ip: place_of(self._rules.network, ip) for ip in by_ip.values()}
                there |= {ip: port.service for ip in place if not mesh.is_a_workloads(place[ip])}
        return {value: there[ip] for value, ip in by_ip.items() if ip in there}

    def _may_serve(self, mesh: Mesh, workload: Workload) -> bool:
        if workload.network != self._rules.network or not workload.capacity:
            return False
        return not (self._rules.refuse_unenforced_policy and mesh.has_policy(workload))

    def _instances_of_all(self, mesh: Mesh) -> dict[Ip, str]:
        """Of any waypoint: nobody knows which one is meant, but by what stands in the list."""
        if self._instances is None:
            self._waypoints = {name for name, each in mesh.services.items() if _is_waypoint(each)}
            self._waypoints.update(name for name, found in self._found.items() if found.is_waypoint)
            members = (each for name in self._waypoints for each in mesh.members_of(name))
            here = (each for each in members if each.network == self._rules.network)
            self._instances = _addresses(mesh, here)
        return self._instances


def _lists_of(name: str, by_port: Mapping[int, Mapping[int, list[bytes]]]) -> Iterator[tuple[bytes, PortId]]:
    for port, lists in by_port.items():
        for family in (4, 6):
            straight = PortId(name, port, family).id
            for by_waypoint, list_id in ((False, straight), (True, other_way(straight))):
                for key in lists.get(list_id, ()):
                    yield key, PortId(name, port, family, by_waypoint)


def _addresses(mesh: Mesh, workloads: Iterable[Workload]) -> dict[Ip, str]:
    return {ip: workload.uid for workload in workloads for ip in mesh.addresses_of(workload)}


def _is_waypoint(service: Service | None) -> bool:
    return service is not None and HANDOFF_PORT in dict(service.ports)


def _is_workload(place: bytes, rest: bytes, *verdicts: Reason) -> bool:
    """With one of these verdicts, or any. Not one that did not begin with its key (`rest` is empty)."""
    kind, verdict, _ = ADDRESS_VALUE.unpack(place + rest) if rest else (0, 0, 0)
    return kind == AddressKind.WORKLOAD and (not verdicts or verdict in verdicts)


def place_of_key(key: bytes) -> Place:
    """Where an entry of `services` is reached."""
    return Place(ADDRESS_KEY.pack(*SERVICE_KEY.unpack(key)[:2]))


def _port(key: bytes) -> int:
    return port_number(SERVICE_KEY.unpack(key)[2])
