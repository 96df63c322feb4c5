"""From what the maps hold and what they should say to batches of writes, in an order that is safe.

Pure. Every step leaves the maps in a state that is right for the connections made meanwhile:

0. endpoints of lists that nothing names yet; in a large push also pods of addresses that are new, which
   need nothing else
1. lists that shrink: free slots take what is new and what lies last, then their length is lowered
2. lists that change or grow: endpoints are overwritten or appended, then their length is raised
3. new service ports appear when their list is complete, then the addresses that they stand on, then
   the ranges that lead there; what only some namespaces see before what sends them there to look,
   which therefore is neither shortened nor refused before this either
4. what nothing names any more is deleted, what leads there first: ranges, addresses, ports, those
   that only some namespaces see, endpoints
5. workloads of a namespace that has no view of its own any more look where all do

so a removed endpoint is out before its address serves another workload, and nothing is deleted
before its replacement is there. What is to be deleted takes room until then: what did not fit for it
follows in steps after these.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import chain, islice, repeat
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from pykmesh.contracts.address import Workload
from pykmesh.kernel.layout import Reason, Switch
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ENDPOINT_KEY,
    ENDPOINT_SLOT,
    ENDPOINT_VALUE,
    RANGE_VALUE,
    SERVICE_VALUE,
    SWITCH_KEY,
    SWITCH_VALUE,
    Ip,
    is_view,
)
from services.map_writer.desired import (
    NOTHING,
    PLAIN_WORKLOAD,
    DesiredService,
    Frontend,
    Packed,
    PortId,
    Rules,
    desired_address,
    desired_service,
    has_view,
    member_changes,
    with_view_of,
)
from services.map_writer.mesh import Mesh, Place, Touched
from services.map_writer.recall import Recalled
from services.map_writer.slots import (
    Moved,
    Slots,
    arrange,
    count,
    pack,
    plain,
    rearrange,
    slot_of,
    split,
    weighed,
)

_K = TypeVar("_K")


class Step(NamedTuple):
    """One batch: entries to write, or (values empty) keys to remove, in order."""

    map: str
    keys: bytes
    values: bytes


class Limits(NamedTuple):
    services: int
    endpoints: int
    addresses: int
    ranges: int = 16_384


_NO_RANKS: Final[Mapping[int, int]] = MappingProxyType({})


class Claim(Struct, frozen=True, gc=False):
    """What a service has in the maps: keys of `services`, ids of lists."""

    keys: frozenset[bytes] = frozenset()
    lists: frozenset[int] = frozenset()
    ranks: Mapping[int, int] = _NO_RANKS
    """Where it prefers near endpoints: how near those in each list are."""


_NO_CLAIM = Claim()


class Held:
    """What the maps hold: read from them at the start, then kept in step with every plan."""

    def __init__(self) -> None:
        self.services: dict[bytes, bytes] = {}
        self.lists: dict[int, Slots] = {}
        self.addresses: dict[bytes, bytes] = {}
        """Without the key that each value begins with: nearly all say the same."""
        self._rests: dict[bytes, bytes] = {}
        self.ranges: dict[bytes, bytes] = {}
        """Keys of `ranges` by the place that stands for each."""
        self.weighed: set[int] = set()
        """The lists whose endpoints differ in weight."""
        self.unreachable: dict[bytes, bytes] = {}
        """Entries of `endpoints` in slots that no list can have: they are removed by a sweep."""
        self.has_views = False
        """Programs look whether a client's namespace sees a service of its own."""
        self.endpoints = 0
        """Slots in all lists: one that is a hole counts until the list is planned."""

    @property
    def sizes(self) -> Limits:
        """How many entries each map has, to set beside its limit."""
        return Limits(len(self.services), self.endpoints, len(self.addresses), len(self.ranges))

    def add_address(self, key: bytes, value: bytes) -> None:
        """From reading the map. One that does not begin with its key is written anew."""
        rest = value[len(key) :] if value.startswith(key) else b""
        self.addresses[key] = self._rests.setdefault(rest, rest)

    def add_endpoint(self, list_id: int, slot: int, value: bytes) -> None:
        """From reading the map; slots may come in any order, and have holes after a crash."""
        slots = self.lists[list_id] = split(self.lists.get(list_id, []))
        missing = slot + 1 - len(slots)
        if missing > 0:
            slots.extend([b""] * missing)
            self.endpoints += missing
        slots[slot] = value
        if value != plain(value):
            self.weighed.add(list_id)


def _entries() -> tuple[list[bytes], list[bytes]]:
    return [], []


class _Batches:
    """Entries collected for each step of the order above; each string of bytes is one or several of them."""

    def __init__(self) -> None:
        self.entries: defaultdict[tuple[int, str], tuple[list[bytes], list[bytes]]] = defaultdict(_entries)
        self.unnamed_endpoints = 0
        """Of lists that nothing names yet."""

    def of(self, rank: int, name: str) -> tuple[list[bytes], list[bytes]]:
        """Keys and values of a step, to append to."""
        return self.entries[rank, name]

    def put(self, rank: int, name: str, key: bytes, value: bytes) -> None:
        keys, values = self.entries[rank, name]
        keys.append(key)
        values.append(value)

    def remove(self, rank: int, name: str, key: bytes) -> None:
        self.of(rank, name)[0].append(key)

    def steps(self, last: int) -> Iterator[Step]:
        """What was collected for the ranks up to `last`, in order; it is then no more here."""
        self.unnamed_endpoints = 0
        for rank, name in sorted(key for key in self.entries if key[0] <= last):
            keys, values = self.entries.pop((rank, name))
            if keys:
                yield Step(name, b"".join(keys), b"".join(values))


PAUSE: Final = Step("", b"", b"")
"""Nothing to write: planning goes on for long, and whoever takes steps may do something else in between."""
PAUSE_SERVICES: Final = 16
STEP_ENTRIES: Final = 8192
"""Entries of a step that need not wait for others: it is written while what follows is planned."""
MANY_PLACES: Final = 128
_PLAIN_OR_NEW: Final = {PLAIN_WORKLOAD, None}
_UNNAMED, _FILL, _LOWER, _ENDPOINTS = range(4)
_VIEW_PORTS, _VIEW_ADDRESSES, _VIEW_RANGES, _RAISE, _ADDRESSES, _RANGES = range(4, 10)
_DROP_RANGES, _DROP_ADDRESSES, _DROP_PORTS = range(10, 13)
_DROP_VIEW_RANGES, _DROP_VIEW_ADDRESSES, _DROP_VIEW_PORTS, _DROP_ENDPOINTS, _LEAVE_VIEWS = range(13, 18)


class Planner:
    """Keeps `Held` in step with the plans that it makes: a plan must be applied, or the maps read again."""

    def __init__(self, held: Held, limits: Limits, rules: Rules) -> None:
        self.held = held
        self._limits = limits
        self._rules = rules
        self._claims: dict[str, Claim] = {}
        self.owner_of_list: dict[int, PortId] = {}
        self._owner_of_key: dict[bytes, str] = {}
        self._refused_services: dict[str, dict[str, str]] = {}
        self._refused_places: dict[Place, dict[str, str]] = {}
        self.recalled = Recalled(rules)
        self._seen_by: frozenset[str] = frozenset()
        """The namespaces with views, when their workloads were planned last."""
        self._leaving: Counter[str] = Counter()
        """Entries of each map that the last steps of a plan delete."""

    @property
    def refused(self) -> dict[str, str]:
        """What does not fit and which limit was met, by resource name."""
        found: dict[str, str] = {}
        for refusals in (*self._refused_services.values(), *self._refused_places.values()):
            for name, why in refusals.items():
                found[name] = f"{found[name]}, {why}" if name in found and why not in found[name] else why
        return found

    @property
    def refused_services(self) -> list[str]:
        return list(self._refused_services)

    def refusals_of(self, service: str) -> list[str]:
        """What of a service does not fit: of its ports or its endpoints."""
        return sorted(set(self._refused_services.get(service, {}).values()))

    def stand_in_hosts(self, mesh: Mesh, *, is_first: bool) -> None:
        """Gives host names that nobody has looked up yet what the maps have for them, before it is planned.

        In services all of whose endpoints are host names: those that no other endpoint of the service has.
        `is_first`: these are names that were there before. Else such as others stood for that are gone.
        """
        if not mesh.unlooked:
            return
        gone = {ip for name in mesh.resolved.keys() - mesh.by_hostname.keys() for ip in mesh.resolved[name]}
        for hostname, services in mesh.with_unlooked():
            sets = [self._unclaimed(mesh, name, hostname) for name in services & mesh.services.keys()]
            found = set.intersection(*sets) if sets else set()
            if found := found if is_first else found & gone:
                mesh.resolve(hostname, tuple(sorted(found)), Touched())
                if not is_first:
                    mesh.stand_ins.add(hostname)

    def _unclaimed(self, mesh: Mesh, service: str, hostname: str) -> set[Ip]:
        members = [*mesh.members_of(service)]
        if not all(each.hostname for each in members):
            return set()
        ports = [port for port, _ in mesh.services[service].ports]
        lists = [PortId(service, port, family).id for port in ports for family in (4, 6)]
        values = chain.from_iterable(split(self.held.lists.get(each, [])) for each in lists)
        held = {ENDPOINT_VALUE.unpack(plain(value))[1] for value in values if value}
        others = (each for each in members if each.hostname != hostname)
        return held.difference(*map(mesh.addresses_of, others))

    def plan(self, mesh: Mesh, touched: Touched) -> Iterator[Step]:
        """The writes for what was touched, and for what was refused before and may have room now.

        Planned while they are taken: the mesh must not change before the last one is.
        """
        return (step for step in self.plan_in_pieces(mesh, touched) if step is not PAUSE)

    def sweep(self, mesh: Mesh) -> Iterator[Step]:
        """The writes that make the maps say this mesh and nothing else: mark, then delete the rest."""
        return (step for step in self.sweep_in_pieces(mesh) if step is not PAUSE)

    def plan_in_pieces(self, mesh: Mesh, touched: Touched) -> Iterator[Step]:
        """As `plan`, with a `PAUSE` every now and then."""
        if touched.policies and self._rules.refuse_unenforced_policy:
            touched.add(mesh.services, mesh.places())
        yield from self._plan_touched(mesh, touched)
        yield from self._plan_refused(mesh)

    def _plan_refused(self, mesh: Mesh) -> Iterator[Step]:
        """The writes for what did not fit, when the steps before have made room."""
        if self._leaving and (self._refused_services or self._refused_places):
            yield from self._plan_touched(mesh, Touched())

    def _refused_with_room(self) -> tuple[list[str], list[Place]]:
        """What did not fit, and may now: nothing of what misses room in a map that is still full."""
        held, limits = self.held, self._limits
        has_ports, has_slots = len(held.services) < limits.services, self._free_slots > 0
        has_addresses, has_ranges = len(held.addresses) < limits.addresses, len(held.ranges) < limits.ranges
        services = [
            name
            for name, refused in self._refused_services.items()
            if (has_ports if name in refused else has_slots) or (has_slots and len(refused) > 1)
        ]
        places = [
            place
            for place in self._refused_places
            if (has_ranges if place in held.addresses else has_addresses)
        ]
        return services, places

    def _plan_touched(self, mesh: Mesh, touched: Touched) -> Iterator[Step]:
        self._leaving.clear()
        touched.add(*self._refused_with_room())
        refused = [name for name in touched.services if name in self._refused_services]
        touched.add((), mesh.vip_places(refused))
        mesh.touch_waypoint_users(touched)
        self.recalled.touch(mesh, touched)
        batches = _Batches()
        for name, changed in touched.members.items():
            if name not in touched.services and not self._plan_members(mesh, name, changed, batches):
                touched.services[name] = None
        before = {name: self._claims.get(name, _NO_CLAIM) for name in touched.services}
        yield from self._plan_views(mesh, touched, batches)
        pods = self._plan_new_pods(mesh, touched)
        yield from _in_turn(pods, self._plan_services(mesh, touched.services, batches))
        for name, claim in before.items():
            self._drop(name, claim, batches)
        yield from self._plan_addresses(mesh, touched.places, batches)
        yield from batches.steps(_LEAVE_VIEWS)

    def _recall(self, mesh: Mesh, batches: _Batches) -> Iterator[Step]:
        """Of what nobody claims in a sweep what stays."""
        services, owners = self.held.services, self._owner_of_key
        unclaimed = {k: v for k, v in services.items() if k not in owners} if mesh.unreadable else {}
        for number, _ in enumerate(self.recalled.find(mesh, unclaimed, self.held.addresses)):
            if number % PAUSE_SERVICES == 0:
                yield PAUSE
        yield from self._plan_services(mesh, self.recalled.names, batches)

    def sweep_in_pieces(self, mesh: Mesh) -> Iterator[Step]:
        """As `sweep`, with a `PAUSE` every now and then."""
        self._leaving.clear()
        self._claims.clear()
        self.owner_of_list.clear()
        self._owner_of_key.clear()
        self._refused_services.clear()
        self._refused_places.clear()
        batches = _Batches()
        self._seen_by = frozenset()
        yield from self._plan_views(mesh, Touched(), batches)
        yield from self._plan_services(mesh, chain(mesh.services, mesh.by_waypoint), batches)
        yield from self._recall(mesh, batches)
        for key in [key for key in self.held.services if key not in self._owner_of_key]:
            self._remove_port(key, batches)
        for list_id in [list_id for list_id in self.held.lists if list_id not in self.owner_of_list]:
            self._drop_list(list_id, batches)
        for key in self.held.unreachable:
            batches.remove(_DROP_ENDPOINTS, "endpoints", key)
        self.held.unreachable.clear()
        stale = self.held.addresses.keys() - set(mesh.places()) - self.recalled.places
        yield from self._plan_addresses(mesh, mesh.places(), batches)
        for key in stale:
            self._remove_address(key, batches)
        for place in [
            each for each in self.held.ranges.keys() - self.recalled.places if not mesh.is_a_services(each)
        ]:
            self._remove_range(place, batches)
        yield from batches.steps(_LEAVE_VIEWS)
        yield from self._plan_refused(mesh)

    def _plan_views(self, mesh: Mesh, touched: Touched, batches: _Batches) -> Iterator[Step]:
        """Workloads that are there know where their namespace looks before there is anything to see.

        Those of a namespace that sees what all do again are touched: they look on until all is there.
        """
        namespaces = frozenset(mesh.view_namespaces)
        if not (namespaces or self._seen_by or self.held.has_views):
            return
        for place in mesh.places_in(namespaces - self._seen_by):
            value, current = desired_address(mesh, place, self._rules, ()), self.held.addresses.get(place)
            if value and current and has_view(value) and not has_view(current):
                self.held.addresses[place] = seeing = with_view_of(current, value)
                batches.put(_UNNAMED, "addresses", place, place + seeing)
        touched.add((), mesh.places_in(self._seen_by - namespaces))
        self._seen_by = namespaces
        if self.held.has_views != bool(namespaces):
            self.held.has_views = bool(namespaces)
            rank = _UNNAMED if namespaces else _LEAVE_VIEWS
            batches.put(rank, "switches", SWITCH_KEY.pack(Switch.VIEWS), SWITCH_VALUE.pack(bool(namespaces)))
        yield from batches.steps(_UNNAMED)

    def _plan_services(self, mesh: Mesh, names: Iterable[str], batches: _Batches) -> Iterator[Step]:
        for number, name in enumerate(names):
            self._plan_service(mesh, name, batches)
            if batches.unnamed_endpoints >= STEP_ENTRIES:
                yield from batches.steps(_UNNAMED)
            if number % PAUSE_SERVICES == 0:
                yield PAUSE

    def _plan_service(self, mesh: Mesh, name: str, batches: _Batches) -> None:
        refused = dict[str, str]()
        if name in self.recalled:
            wanted = self.recalled.desired(mesh, name, self.held.services, self.held.lists)
        else:
            wanted = desired_service(mesh, name, self._rules)
        for list_id, port_id in wanted.ports.items():
            if self.owner_of_list.setdefault(list_id, port_id) != port_id:
                refused[name] = f"its id collides with that of {self.owner_of_list[list_id].service}"
                wanted = NOTHING
                break
        for list_id, values in wanted.lists.items():
            self._plan_list(list_id, values, wanted, batches, refused)
        for key, frontend in wanted.frontends.items():
            if wanted.lists[frontend.list_id] and not self.held.lists.get(frontend.list_id):
                nothing_fits = replace(frontend, verdict=Reason.NO_ROOM)
                self._plan_port(name, key, nothing_fits, batches, refused)
            else:
                self._plan_port(name, key, frontend, batches, refused)
        _set_or_drop(self._refused_services, name, refused)
        if wanted is NOTHING:
            self._claims.pop(name, None)
        else:
            ranks = wanted.ranks or _NO_RANKS
            self._claims[name] = Claim(frozenset(wanted.frontends), frozenset(wanted.lists), ranks)

    def _plan_list(
        self,
        list_id: int,
        wanted: Mapping[bytes, str],
        service: DesiredService,
        batches: _Batches,
        refused: dict[str, str],
    ) -> None:
        held = self.held
        before = split(held.lists.get(list_id, []))
        if not before and isinstance(wanted, Packed) and 0 < len(wanted) <= self._free_slots:
            self._append(list_id, wanted, batches)
            return
        known = list(map(plain, before)) if list_id in held.weighed else before
        after = arrange(known, wanted)
        room = len(before) + max(0, self._free_slots)
        for value in after[room:]:
            refused[wanted[value]] = f"map endpoints is full ({self._limits.endpoints} entries)"
        del after[room:]
        if after and after[0] in service.weights:
            after = weighed(after, service.weights)
            held.weighed.add(list_id)
        else:
            held.weighed.discard(list_id)
        self._write_list(list_id, before, after, batches)
        if len(after) < len(before):
            self._lower(list_id, len(after), service, batches)
            self._drop_slots(list_id, len(before), len(after), batches)
        held.endpoints += max(0, len(after) - len(before))
        held.lists[list_id] = after
        if not after:
            del held.lists[list_id]

    def _plan_members(
        self, mesh: Mesh, name: str, changed: Mapping[str, Workload | None], batches: _Batches
    ) -> bool:
        """Takes what members of a service were into what they are, whatever the number of the others.

        False, and nothing is planned, where the service has to be looked at as a whole.
        """
        service, claim = mesh.services.get(name), self._claims.get(name)
        if service is None or claim is None or name in self._refused_services:
            return False
        if not self.held.weighed.isdisjoint(claim.lists):
            return False
        changes = member_changes(mesh, service, changed, self._rules, claim.ranks)
        if changes is None:
            return False
        moved: dict[int, Moved] = {}
        for list_id, (gone, come) in changes.items():
            if list_id not in claim.lists or list_id not in self.held.lists:
                return False
            found = rearrange(pack(self.held.lists[list_id]), gone, come)
            if found is None or not found.packed:
                return False
            moved[list_id] = found
        if sum(len(come) for _, come in changes.values()) > self._free_slots:
            return False
        for list_id, found in moved.items():
            self._move(list_id, found, claim, batches)
        return True

    def _move(self, list_id: int, moved: Moved, claim: Claim, batches: _Batches) -> None:
        """Writes what is another in a list that stays one, and how long it is where it is named."""
        held, before = self.held, count(self.held.lists[list_id])
        after = count(moved.packed)
        keys, values = batches.of(_FILL if after < before else _ENDPOINTS, "endpoints")
        for slot in moved.slots:
            keys.append(ENDPOINT_KEY.pack(list_id, slot))
            values.append(slot_of(moved.packed, slot))
        held.lists[list_id] = moved.packed
        if after == before:
            return
        for key in claim.keys:
            current = held.services.get(key)
            if current is not None and SERVICE_VALUE.unpack(current)[0] == list_id:
                value = held.services[key] = _with_length(key, current, after)
                batches.put(_LOWER if after < before else _RAISE, "services", key, value)
        if after < before:
            self._drop_slots(list_id, before, after, batches)
        else:
            held.endpoints += after - before

    @property
    def _free_slots(self) -> int:
        return self._limits.endpoints - self.held.endpoints - self._leaving["endpoints"]

    def _append(self, list_id: int, wanted: Packed, batches: _Batches) -> None:
        """A list that is new, fits, and needs no look at each."""
        keys, values = batches.of(_UNNAMED, "endpoints")
        keys.append(_slot_keys(list_id, 0, len(wanted)))
        values.append(wanted.packed)
        batches.unnamed_endpoints += len(wanted)
        self.held.lists[list_id] = wanted.packed
        self.held.endpoints += len(wanted)

    def _write_list(self, list_id: int, before: list[bytes], after: list[bytes], batches: _Batches) -> None:
        """What is appended comes first: a slot may name it."""
        rank = _UNNAMED if not before else _FILL if len(after) < len(before) else _ENDPOINTS
        keys, values = batches.of(rank, "endpoints")
        first = len(before)
        if not before:
            batches.unnamed_endpoints += len(after)
        if len(after) > first:
            keys.append(_slot_keys(list_id, first, len(after)))
            values.extend(after[first:])
        for slot, (old, new) in enumerate(zip(before, after, strict=False)):
            if old != new:
                keys.append(ENDPOINT_KEY.pack(list_id, slot))
                values.append(new)

    def _lower(self, list_id: int, length: int, service: DesiredService, batches: _Batches) -> None:
        for key, frontend in service.frontends.items():
            if frontend.list_id == list_id and self._names_list(key, list_id) and not frontend.waits:
                value = _service_value(key, length, frontend)
                self.held.services[key] = value
                batches.put(_LOWER, "services", key, value)

    def _names_list(self, key: bytes, list_id: int) -> bool:
        """False for an address that was another service's: it comes to the list when that is whole."""
        current = self.held.services.get(key)
        return current is not None and bool(SERVICE_VALUE.unpack(current)[0] == list_id)

    def _drop_slots(self, list_id: int, before: int, length: int, batches: _Batches) -> None:
        for slot in range(length, before):
            batches.remove(_DROP_ENDPOINTS, "endpoints", ENDPOINT_KEY.pack(list_id, slot))
        self.held.endpoints -= before - length
        self._leaving["endpoints"] += before - length

    def _drop_list(self, list_id: int, batches: _Batches) -> None:
        self._drop_slots(list_id, count(self.held.lists.pop(list_id)), 0, batches)
        self.held.weighed.discard(list_id)

    def _plan_port(
        self, name: str, key: bytes, frontend: Frontend, batches: _Batches, refused: dict[str, str]
    ) -> None:
        length = count(self.held.lists.get(frontend.list_id, b""))
        value = _service_value(key, length, frontend)
        self._owner_of_key[key] = name
        current = self.held.services.get(key)
        if current == value:
            return
        if current is None and len(self.held.services) >= self._limits.services:
            refused[name] = f"map services is full ({self._limits.services} entries)"
            return
        rank = _VIEW_PORTS if is_view(key) else _RAISE
        if frontend.verdict is not Reason.ROUTED and not frontend.waits:
            rank = _LOWER
        self.held.services[key] = value
        batches.put(rank, "services", key, value)

    def _drop(self, name: str, before: Claim, batches: _Batches) -> None:
        """What a service held before and nobody claims now."""
        now = self._claims.get(name, _NO_CLAIM)
        for key in before.keys - now.keys:
            if self._owner_of_key.get(key) == name:
                del self._owner_of_key[key]
                self._remove_port(key, batches)
        for list_id in before.lists - now.lists:
            self.owner_of_list.pop(list_id, None)
            if list_id in self.held.lists:
                self._drop_list(list_id, batches)

    def _remove_port(self, key: bytes, batches: _Batches) -> None:
        if self.held.services.pop(key, None) is not None:
            self._leaving["services"] += 1
            batches.remove(_DROP_VIEW_PORTS if is_view(key) else _DROP_PORTS, "services", key)

    def _remove_address(self, key: bytes, batches: _Batches) -> None:
        if self.held.addresses.pop(key, None) is not None:
            self._leaving["addresses"] += 1
            batches.remove(_DROP_VIEW_ADDRESSES if is_view(key) else _DROP_ADDRESSES, "addresses", key)

    def _plan_addresses(self, mesh: Mesh, places: Iterable[Place], batches: _Batches) -> Iterator[Step]:
        # The services that miss a port in the maps.
        crowded = {name for name, refused in self._refused_services.items() if name in refused}
        if mesh.view_namespaces:
            places = list(places)
            for place in filter(is_view, places):
                self._plan_address(mesh, place, crowded, batches)
        yield from batches.steps(_RAISE)
        left = iter(places)
        while many := list(islice(left, MANY_PLACES)):
            if not (mesh.are_plainly_pods(many) and self._plan_pods(many, batches)):
                for place in many:
                    self._plan_address(mesh, place, crowded, batches)
            if len(batches.of(_ADDRESSES, "addresses")[0]) >= STEP_ENTRIES:
                yield from batches.steps(_ADDRESSES)
            yield PAUSE

    def _plan_new_pods(self, mesh: Mesh, touched: Touched) -> Iterator[Step]:
        """Nothing has to be there before these. What cannot be planned so is left among other addresses."""
        places = touched.only_new()
        if mesh.view_namespaces:
            touched.add((), places)
            return
        for first in range(0, len(places), STEP_ENTRIES):
            many, batches = places[first : first + STEP_ENTRIES], _Batches()
            if self._plan_pods(many, batches):
                yield from batches.steps(_ADDRESSES)
            else:
                touched.add((), many)

    def _plan_pods(self, places: list[Place], batches: _Batches) -> bool:
        """Plans addresses that are ordinary pods'. False, and nothing is planned, unless all fit."""
        held = self.held.addresses
        known = set(map(held.get, places))
        if (
            not known <= _PLAIN_OR_NEW
            or self._rules.refuse_unenforced_policy
            or self._refused_places
            or len(held) + self._leaving["addresses"] + len(places) > self._limits.addresses
            or not self.held.ranges.keys().isdisjoint(places)
        ):
            return False
        new = [place for place in places if place not in held] if PLAIN_WORKLOAD in known else places
        held.update(dict.fromkeys(new, PLAIN_WORKLOAD))
        keys, values = batches.of(_ADDRESSES, "addresses")
        keys += new
        values.append(b"".join(chain.from_iterable(zip(new, repeat(PLAIN_WORKLOAD)))))
        return True

    def _plan_address(self, mesh: Mesh, place: Place, crowded: Container[str], batches: _Batches) -> None:
        held, limit = self.held.addresses, self._limits.addresses
        current, as_it_was = held.get(place), self.recalled.address(mesh, place)
        value = as_it_was or desired_address(mesh, place, self._rules, crowded)
        if value is None:
            self._remove_address(place, batches)
        elif current is None and len(held) + self._leaving["addresses"] >= limit:
            self._refused_places[place] = dict.fromkeys(
                mesh.owners(place), f"map addresses is full ({limit} entries)"
            )
            return
        elif current != value:
            held[place] = value
            if current and has_view(current) and not has_view(value):
                batches.put(_LEAVE_VIEWS, "addresses", place, place + value)
                value = with_view_of(value, current)
            rank = _VIEW_ADDRESSES if is_view(place) else _ADDRESSES
            batches.put(rank, "addresses", place, place + value)
        self._refused_places.pop(place, None)
        if as_it_was is None and (
            (mesh.has_ranges and mesh.is_a_services(place)) or place in self.held.ranges
        ):
            self._plan_range(mesh, place, batches)

    def _plan_range(self, mesh: Mesh, place: Place, batches: _Batches) -> None:
        """A range is looked up when what stands for it is there, and no more before that goes."""
        key, current = mesh.range_of(place), self.held.ranges.get(place)
        if key is None:
            self._remove_range(place, batches)
        elif current is None and len(self.held.ranges) + self._leaving["ranges"] >= self._limits.ranges:
            self._refused_places[place] = dict.fromkeys(
                mesh.owners(place), f"map ranges is full ({self._limits.ranges} entries)"
            )
        elif current is None:
            self.held.ranges[place] = key
            ip, network = ADDRESS_KEY.unpack(place)
            rank = _VIEW_RANGES if is_view(place) else _RANGES
            batches.put(rank, "ranges", key, RANGE_VALUE.pack(ip, network))

    def _remove_range(self, place: bytes, batches: _Batches) -> None:
        key = self.held.ranges.pop(place, None)
        if key is not None:
            self._leaving["ranges"] += 1
            batches.remove(_DROP_VIEW_RANGES if is_view(place) else _DROP_RANGES, "ranges", key)


def _in_turn(*plans: Iterator[Step]) -> Iterator[Step]:
    """A step of one, then one of the next, and so on: one may be slow to plan, another slow to write."""
    left = [*plans]
    while left:
        for plan in tuple(left):
            for step in plan:
                yield step
                if step is not PAUSE:
                    break
            else:
                left.remove(plan)


_slots: list[bytes] = []
"""What ends the keys of slots 0, 1, ..."""


def _slot_keys(list_id: int, first: int, end: int) -> bytes:
    """Keys of the slots from `first` to before `end`, one after the other."""
    while len(_slots) < end:
        _slots.append(ENDPOINT_KEY.pack(0, len(_slots))[ENDPOINT_SLOT:])
    head = ENDPOINT_KEY.pack(list_id, 0)[:ENDPOINT_SLOT]
    return head + head.join(_slots[first:end])


def _service_value(key: bytes, length: int, frontend: Frontend) -> bytes:
    """A value begins with its key."""
    packed = SERVICE_VALUE.pack(
        frontend.list_id, length, frontend.verdict, frontend.flags, frontend.affinity_s
    )
    return key + packed[len(key) :]


def _with_length(key: bytes, value: bytes, length: int) -> bytes:
    list_id, _, *rest = SERVICE_VALUE.unpack(value)
    return key + SERVICE_VALUE.pack(list_id, length, *rest)[len(key) :]


def _set_or_drop(index: dict[_K, dict[str, str]], key: _K, refused: dict[str, str]) -> None:
    if refused:
        index[key] = refused
    else:
        index.pop(key, None)
