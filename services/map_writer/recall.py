"""What the maps have of services that the control plane says wrongly and nobody else knows: it stays.

Pure. Such a service was accepted once, and then map_writer and xds_client both began anew: what a NACK
leaves as it was is in the maps alone. Its endpoints go when they are no members any more. None comes: nobody
knows to which port of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, cast

from pykmesh.contracts.address import Workload
from pykmesh.contracts.waypoints import HANDOFF_PORT
from pykmesh.kernel.layout import Reason, ServiceFlag
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ENDPOINT_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    Ip,
    is_view,
    port_number,
)
from services.map_writer.desired import DesiredService, Frontend, PortId, Rules
from services.map_writer.mesh import Mesh, Place
from services.map_writer.slots import Slots, plain, split, weights_of

_WAYS: Final = tuple((family, by_waypoint) for family in (4, 6) for by_waypoint in (False, True))


def find(names: Iterable[str], services: Mapping[bytes, bytes]) -> dict[str, list[bytes]]:
    """Whose each of these entries of `services` is: it names a list, whose id is a hash of who owns it.

    Not what only some namespaces see (views): their workloads are not told to look there.
    """
    by_port: defaultdict[int, defaultdict[int, list[bytes]]] = defaultdict(lambda: defaultdict(list))
    for key, value in services.items():
        if not is_view(key):
            by_port[_port(key)][SERVICE_VALUE.unpack(value)[0]].append(key)
    found: defaultdict[str, list[bytes]] = defaultdict(list)
    for name in names if by_port else ():
        for port, lists in by_port.items():
            for way in _WAYS:
                found[name] += lists.get(PortId(name, port, *way).id, ())
    return {name: keys for name, keys in found.items() if keys}


def place_of_key(key: bytes) -> Place:
    """Where an entry of `services` is reached."""
    return Place(ADDRESS_KEY.pack(*SERVICE_KEY.unpack(key)[:2]))


def as_it_is(
    mesh: Mesh, name: str, services: Mapping[bytes, bytes], lists: Mapping[int, Slots], rules: Rules
) -> DesiredService:
    """`services`: the entries of this service. Of `lists`, which has those of all, what is still there."""
    found = DesiredService({}, {}, {}, {})
    for key, value in services.items():
        list_id, _, verdict, flags, affinity_s = SERVICE_VALUE.unpack(value)
        # Numbers stay what they are: another release may know more of them.
        found.frontends[key] = Frontend(
            list_id, cast("Reason", verdict), cast("ServiceFlag", flags), affinity_s
        )
        if list_id in found.lists:
            continue
        port_id = next(each for way in _WAYS if (each := PortId(name, _port(key), *way)).id == list_id)
        slots = [slot for slot in split(lists.get(list_id, [])) if slot]
        there = _instances(mesh, rules) if port_id.by_waypoint else _members(mesh, name, rules)
        left = {value: there[ip] for value in map(plain, slots) if (ip := _ip(value)) in there}
        found.ports[list_id], found.lists[list_id] = port_id, left
        if any(slot != plain(slot) for slot in slots):
            found.weights.update(weights_of(slots))
    return found


def _members(mesh: Mesh, name: str, rules: Rules) -> dict[Ip, str]:
    """Those that are not healthy are left out where others are: nobody knows whether it takes such."""
    members = [
        workload
        for workload in mesh.members_of(name)
        if not (rules.refuse_unenforced_policy and mesh.has_policy(workload))
    ]
    return _addresses(mesh, [each for each in members if each.healthy] or members, rules)


def _instances(mesh: Mesh, rules: Rules) -> dict[Ip, str]:
    """Of any waypoint: nobody knows which one is meant, but what stands in the list."""
    waypoints = [name for name, service in mesh.services.items() if HANDOFF_PORT in dict(service.ports)]
    return _addresses(mesh, (each for name in waypoints for each in mesh.members_of(name)), rules)


def _addresses(mesh: Mesh, workloads: Iterable[Workload], rules: Rules) -> dict[Ip, str]:
    here = (workload for workload in workloads if workload.network == rules.network)
    return {ip: workload.uid for workload in here for ip in mesh.addresses_of(workload)}


def _ip(endpoint: bytes) -> Ip:
    return Ip(ENDPOINT_VALUE.unpack(endpoint)[1])


def _port(key: bytes) -> int:
    return port_number(SERVICE_KEY.unpack(key)[2])
