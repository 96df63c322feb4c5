"""The mesh as the control plane described it last, and what a change of it touches.

Pure: no bus, no maps. A resource that refers to one that is not there yet (an endpoint before its
service) is kept and takes effect when the other comes.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import chain, groupby
from operator import attrgetter
from typing import Any, Final, NewType, TypeVar, cast

import numpy as np

from pykmesh.contracts.address import (
    Policy,
    Range,
    Service,
    Waypoint,
    Workload,
    decode_address,
    differ_in_health_alone,
)
from pykmesh.contracts.bulk import Group
from pykmesh.contracts.wire import rows
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    IP_BYTES,
    NO_IP,
    RANGE_KEY,
    RANGE_NETWORK_BITS,
    Ip,
    ip_to_text,
    is_v4,
    network_id,
    view_network,
)
from pykmesh.proto.workload_pb2 import Workload as WorkloadMessage
from services.map_writer.locality import NOWHERE, Locality, is_ranked, locality
from services.map_writer.ranges import Ranges

_K = TypeVar("_K")
Place = NewType("Place", bytes)
"""A network and an address, as the key of the map `addresses`."""
Owners = str | tuple[str, ...]
"""Who has an address: nearly every one has one owner."""
_WHO: Final = Locality._fields.index("node")
"""Of a locality what begins here says which node it is."""
_SHARED_KNOWN: Final = 1024
_ONE_OWNER: Final = {str}
_FAMILIES: Final = 2
_ORDINARY: Final = {bytes}


def place_of(network: str, ip: Ip) -> Place:
    return Place(ip + _rest_of_key(network))


def places_of(workload: Workload) -> Iterator[Place]:
    return (place_of(workload.network, ip) for ip in workload.addresses)


@cache
def _rest_of_key(network: str) -> bytes:
    """What follows the address in a key: the address stands first in it."""
    key = ADDRESS_KEY.pack(NO_IP, network_id(network))
    return key[len(NO_IP) :]


def _owners_in(groups: Iterable[Group]) -> Iterator[str]:
    """Whose each of `_places` is."""
    for group in groups:
        if group.each == 1:
            yield from group.uids
        else:
            yield from (uid for uid in group.uids for _ in range(group.each))


def _places(groups: Iterable[Group]) -> Iterator[Place]:
    """The addresses of each member."""
    for network, alike in groupby(groups, attrgetter("network")):
        addresses = np.frombuffer(b"".join(group.addresses for group in alike), np.uint8)
        ips, rest = addresses.reshape(-1, IP_BYTES), np.frombuffer(_rest_of_key(network), np.uint8)
        keys = np.hstack((ips, np.broadcast_to(rest, (len(ips), len(rest)))))
        yield from cast("list[Place]", rows(keys))


def _namespace(service: str) -> str:
    return service.partition("/")[0]


def _reference(waypoint: Waypoint) -> str | Place | None:
    """What names a waypoint; None where it cannot be told."""
    if waypoint.ip is not None:
        return place_of(waypoint.network, waypoint.ip)
    return waypoint.service or None


def _references(waypoints: Iterable[Waypoint]) -> Iterator[str | Place]:
    return filter(None, map(_reference, waypoints))


class Touched:
    """What must be planned anew, in the order in which it came: memory is then read in order too."""

    def __init__(self) -> None:
        self.services: dict[str, None] = {}
        self.members: dict[str, dict[str, Workload | None]] = {}
        """Services of which, beside what `services` says, members have changed; and what each was before."""
        self.places: dict[Place, None] = {}
        self.new_pods: list[Place] = []
        """Addresses that were no workload's, and are an ordinary one's now.

        But for those in `places` nothing else was said of them in what is planned together.
        """
        self.told: list[Place] = []
        """Addresses of whose workloads something was said that changes nothing there."""
        self.policies = False
        """Policies changed: with them, where they decide anything, everything."""

    def add(self, services: Iterable[str], places: Iterable[Place]) -> None:
        self.services.update(dict.fromkeys(services))
        self.places.update(dict.fromkeys(places))

    def add_member(self, service: str, uid: str, before: Workload | None) -> None:
        """What it was when it was touched first counts."""
        self.members.setdefault(service, {}).setdefault(uid, before)

    def extend(self, later: Touched) -> None:
        """By what was touched after: both are planned together."""
        self.add(later.services, later.places)
        for service, members in later.members.items():
            for uid, before in members.items():
                self.add_member(service, uid, before)
        self.new_pods += later.new_pods
        self.told += later.told
        self.policies |= later.policies

    def among(self, places: Container[Place]) -> list[Place]:
        """Of which of these addresses something was said."""
        said = chain(self.places, self.new_pods, self.told)
        return [place for place in said if place in places] if places else []

    def only_new(self) -> list[Place]:
        """`new_pods` of which nothing else was said."""
        if self.places.keys().isdisjoint(self.new_pods):
            return self.new_pods
        return [place for place in self.new_pods if place not in self.places]


class Mesh:
    """Resources by name, with the indexes that planning needs."""

    def __init__(self, here: Locality = NOWHERE) -> None:
        """`here`: where this node is. With a node and no region it is what workloads of the node say."""
        self.here = here
        self._on_this_node = b"" if here.region else WorkloadMessage(node=here.node).SerializeToString()
        self._waypoint_users: defaultdict[str | Place, dict[str, None]] = defaultdict(dict)
        """Services and workloads that go by way of a service, by its name or one of its addresses."""
        self.by_waypoint: dict[str, None] = {}
        """Workloads that do."""
        self.ranked: dict[str, None] = {}
        """Services that prefer near endpoints."""
        self.services: dict[str, Service] = {}
        self.workloads: dict[str, Workload | bytes] = {}
        """One that is still bytes is ordinary (`bulk.Ordinary`): it is decoded when more of it is asked."""
        self.ordinary_members: dict[str, list[Group]] = {}
        """Of a service all of whose members came in groups, and are as they came."""
        self.policies: dict[str, Policy] = {}
        self.unreadable: dict[str, None] = {}
        """What is said wrongly, and nobody knows how it was: what the maps have of it stays."""
        self._members: defaultdict[str, dict[str, None]] = defaultdict(dict)
        """Of every other service."""
        self._odd_members: Counter[str] = Counter()
        """How many of a service's members are not `is_plain_member`."""
        self.vip_owners: dict[Place, Owners] = {}
        """Every service at an address; a hidden one is in a tuple, also when it is alone."""
        self.scoped: dict[Place, dict[str, Place]] = {}
        """Addresses where some namespaces see another service than the rest, and their views of each."""
        self._ranges = Ranges()
        self._range_at: dict[Place, Range] = {}
        """The range that an address stands for."""
        self._views: dict[Place, tuple[Place, str]] = {}
        """The address and the namespace of each view."""
        self.view_namespaces: Counter[str] = Counter()
        """How many views each namespace has."""
        self.resolved: dict[str, tuple[Ip, ...]] = {}
        """What is known of the host names of workloads that have no address of their own."""
        self.unlooked: set[str] = set()
        """Of host names that have come, those that nobody has looked up since."""
        self.stand_ins: set[str] = set()
        """Such as were never found, and have what others stood for until it is known what they are."""
        self.by_hostname: defaultdict[str, dict[str, None]] = defaultdict(dict)
        """Such workloads."""
        self.pod_owners: dict[Place, Owners] = {}
        self._shared_places: dict[Place, None] = {}
        """Of these, those that several workloads have."""
        self._sharing: frozenset[str] | None = frozenset()
        """The services of those workloads; None: that has to be looked at again."""
        self._policy_scopes: Counter[str] = Counter()
        """Namespaces with policies for all that is in them, and how many; "" for everything."""
        self._dry_run: set[str] = set()
        """Policies that are only tried."""
        self._policy_users: Counter[tuple[str, tuple[str, ...]]] = Counter()
        """How many workloads of a namespace name these policies, perhaps none."""

    def as_it_is(self) -> Mesh:
        """Another one that says the same, and stays so: for a thread to read while this one changes."""
        found = copy.copy(self)
        vars(found).update({name: _copied(part) for name, part in vars(self).items()})
        return found

    def remove(self, name: str, touched: Touched) -> None:
        """A name that is not there is no error: the control plane removes what it never sent."""
        self.unreadable.pop(name, None)
        if name in self.workloads:
            workload = self.workload(name)
            self._unlink_workload(name, workload, touched)
            del self.workloads[name]
            if workload.hostname:
                _drop(self.by_hostname, workload.hostname, name)
        elif (service := self.services.pop(name, None)) is not None:
            self._unlink_service(name, service, touched)

    def put(self, name: str, resource: Service | Workload, touched: Touched) -> None:
        """Adds or replaces; a name may change from workload to service."""
        self.unreadable.pop(name, None)
        if isinstance(resource, Workload):
            before = self.workloads.get(name)
            if before is not None and raw_of(before) == resource.raw:
                return
            if before is not None and differ_in_health_alone(raw_of(before), resource.raw):
                self._put_health(name, resource, touched)
                return
            if before is not None or name in self.services:
                self.remove(name, touched)
            self.workloads[name] = resource
            if resource.hostname:
                self.by_hostname[resource.hostname][name] = None
                if resource.hostname not in self.resolved:
                    self.unlooked.add(resource.hostname)
            self._learn_where(resource.raw, touched)
            self._link_workload(name, resource, touched)
        else:
            if self.services.get(name) == resource:
                return
            self.remove(name, touched)
            self.services[name] = resource
            self._link_service(name, resource, touched)

    def _put_health(self, name: str, workload: Workload, touched: Touched) -> None:
        """Only who is chosen of its services is another: where it is, and all that is said of it, stays."""
        before, self.workloads[name] = self.workload(name), workload
        for service, _ in workload.services:
            self._ungroup(service)
            touched.add_member(service, name, before)
        if not workload.host_network:
            touched.told += places_of(workload)

    def put_ordinary(self, groups: Sequence[Group], touched: Touched) -> None:
        """`put` for ordinary workloads, none of which comes twice: all at once where all are new."""
        uids = [*chain.from_iterable(group.uids for group in groups)]
        if self._are_new(uids):
            self._put_new(groups, uids, touched)
            return
        for group in groups:
            if self._are_new(group.uids):
                self._put_new([group], group.uids, touched)
                continue
            for uid, raw in zip(group.uids, group.raws, strict=True):
                self.put(uid, _decode(raw), touched)

    def _are_new(self, uids: list[str]) -> bool:
        return self.workloads.keys().isdisjoint(uids) and self.services.keys().isdisjoint(uids)

    def _put_new(self, groups: Sequence[Group], uids: list[str], touched: Touched) -> None:
        """`uids`: of all groups, in their order."""
        for uid in self.unreadable.keys() & uids if self.unreadable else ():
            del self.unreadable[uid]
        self.workloads.update(zip(uids, chain.from_iterable(group.raws for group in groups), strict=True))
        for group in groups:
            if self._on_this_node and self._on_this_node in b"".join(group.raws):
                for raw in group.raws:
                    self._learn_where(raw, touched)
            self._count_policies(group.namespace, group.policies, len(group.uids))
            if group.service in self._members:
                self._members[group.service].update(dict.fromkeys(group.uids))
            else:
                self.ordinary_members.setdefault(group.service, []).append(group)
            touched.services[group.service] = None
        if self._own_new([*_places(groups)], _owners_in(groups), touched):
            return
        for group in groups:
            places, owners = [*_places([group])], _owners_in([group])
            if self._own_new(places, owners, touched):
                continue
            self._ungroup(group.service)
            touched.places.update(dict.fromkeys(places))
            for place, uid in zip(places, owners, strict=True):
                self._touch_by_waypoint(place, touched)
                self._own_pod(place, uid)

    def _own_new(self, places: list[Place], uids: Iterable[str], touched: Touched) -> bool:
        """False, and nothing is done, where one is somebody's, or there twice."""
        if len({*places}) < len(places) or not self.pod_owners.keys().isdisjoint(places):
            return False
        self.pod_owners.update(zip(places, uids, strict=True))
        touched.new_pods += places
        return True

    def _learn_where(self, raw: bytes, touched: Touched) -> None:
        """A workload of this node says where the node is; the last one that does counts.

        One of another cluster or network is on another node, of the same name.
        """
        if not self._on_this_node or self._on_this_node not in raw:
            return
        found = locality(raw)
        is_here = found[_WHO:] == self.here[_WHO:] and any(found[:_WHO])
        if is_here and found != self.here:
            self.here = found
            touched.add(self.ranked, ())

    def workload(self, name: str) -> Workload:
        """KeyError when it is not there."""
        found = self.workloads[name]
        if isinstance(found, bytes):
            found = self.workloads[name] = _decode(found)
        return found

    def all_workloads(self) -> Iterator[Workload]:
        """Decoded for this once."""
        return (_decode(w) if isinstance(w, bytes) else w for w in self.workloads.values())

    def _link_workload(self, name: str, workload: Workload, touched: Touched) -> None:
        self._count_policies(workload.namespace, workload.policies, 1)
        if workload.waypoint is not None:
            self.by_waypoint[name] = touched.services[name] = None
            for reference in _references((workload.waypoint,)):
                self._waypoint_users[reference][name] = None
        for service, _ in workload.services:
            self._ungroup(service)
            self._members[service][name] = None
            self._count_odd(service, workload, 1)
            touched.add_member(service, name, None)
        if not workload.host_network:
            for ip in workload.addresses:
                place = place_of(workload.network, ip)
                self._touch_by_waypoint(place, touched)
                self._own_pod(place, name)
                touched.places[place] = None

    def _unlink_workload(self, name: str, workload: Workload, touched: Touched) -> None:
        self._count_policies(workload.namespace, workload.policies, -1)
        if workload.waypoint is not None:
            del self.by_waypoint[name]
            touched.services[name] = None
            for reference in _references((workload.waypoint,)):
                _drop(self._waypoint_users, reference, name)
        for service, _ in workload.services:
            self._ungroup(service)
            _drop(self._members, service, name)
            self._count_odd(service, workload, -1)
            touched.add_member(service, name, workload)
        for ip in workload.addresses:
            place = place_of(workload.network, ip)
            touched.places[place] = None  # a node's too: it may be a pod's now, behind what leads there
            if workload.host_network:
                continue
            if place in self._shared_places:
                self._sharing = None
            _disown(self.pod_owners, place, name)
            if not isinstance(self.pod_owners.get(place), tuple):
                self._shared_places.pop(place, None)
            self._touch_by_waypoint(place, touched)

    def _count_odd(self, service: str, workload: Workload, step: int) -> None:
        if not is_plain_member(workload):
            self._odd_members[service] += step
            if not self._odd_members[service]:
                del self._odd_members[service]

    def _own_pod(self, place: Place, name: str) -> None:
        _own(self.pod_owners, place, name)
        if isinstance(self.pod_owners[place], tuple):
            self._shared_places[place] = self._sharing = None

    def _touch_by_waypoint(self, place: Place, touched: Touched) -> None:
        """Of several workloads at an address who is meant may be another one now."""
        if self.by_waypoint:
            touched.add((o for o in _owners(self.pod_owners, place) if o in self.by_waypoint), ())

    def _ungroup(self, service: str) -> None:
        """Its members are no more all ordinary, or two of them may have the same address."""
        for group in self.ordinary_members.pop(service, ()):
            self._members[service].update(dict.fromkeys(group.uids))

    def _link_service(self, name: str, service: Service, touched: Touched) -> None:
        touched.services[name] = None
        if is_ranked(service):
            self.ranked[name] = None
        for reference in _references(service.waypoints):
            self._waypoint_users[reference][name] = None
        if self._waypoint_users:
            touched.add(self.waypoint_users(service), ())
        for found in service.ranges:
            self._ranges.add(found, name)
            self._range_at[place_of(found.own_network, found.ip)] = found
        for network, ip in service.places:
            place = place_of(network, ip)
            self._touch_rivals(place, touched)
            _own(self.vip_owners, place, name)
            if service.hidden:
                self.vip_owners[place] = _owners(self.vip_owners, place)
            touched.places[place] = None
            if place not in self._range_at:
                self._set_views(network, ip, touched)
        if service.ranges:
            self._set_views_around(service, touched)

    def _set_views_around(self, service: Service, touched: Touched) -> None:
        """A range in another one decides whether that one's namespace needs a view of it.

        And a view of the wider one, which is looked at first, whether one of the narrower is needed: so the
        widest come first.
        """
        wider = {around for found in service.ranges for around in self._ranges.around(found)}
        due = [(found.bits, found) for found in {*service.ranges, *wider}]
        heapify(due)
        last: Range | None = None
        while due:
            _, found = heappop(due)
            if found == last:
                continue
            last, place = found, place_of(found.own_network, found.ip)
            is_other = self._set_views(found.own_network, found.ip, touched)
            if is_other or found in wider:
                self._touch_rivals(place, touched)
            if is_other:
                for narrower in self._ranges.inside(found):
                    heappush(due, (narrower.bits, narrower))

    def waypoint_users(self, waypoint: Service) -> Iterator[str]:
        """The services and workloads whose traffic goes by way of this one."""
        yield from self._waypoint_users.get(waypoint.name, ())
        for vip in waypoint.vips:
            yield from self._waypoint_users.get(place_of(*vip), ())

    def touch_waypoint_users(self, touched: Touched) -> None:
        """Whose waypoint has changed, or an instance of it, has changed."""
        if self._waypoint_users:
            for name in [*touched.services, *touched.members]:
                if (service := self.services.get(name)) is not None:
                    touched.add(self.waypoint_users(service), ())

    def service_of(self, waypoint: Waypoint) -> Service | None:
        """A waypoint's own service; None while it is unknown."""
        reference = _reference(waypoint)
        if reference is None:
            return None
        name = reference if isinstance(reference, str) else self.vip_owner(reference)
        return None if name is None else self.services.get(name)

    def range_of(self, place: Place) -> bytes | None:
        """The key of the range that a place stands for; None where it is none, or nobody sees a service."""
        base, namespace = self._views.get(place, (place, None))
        found = self._range_at.get(base)
        if found is None or self.vip_owner(place) is None:
            return None
        network = found.network if namespace is None else view_network(found.network, namespace)
        return RANGE_KEY.pack(RANGE_NETWORK_BITS + found.bits, network_id(network), found.ip)

    def _unlink_service(self, name: str, service: Service, touched: Touched) -> None:
        touched.services[name] = None
        self.ranked.pop(name, None)
        for reference in {*_references(service.waypoints)}:
            _drop(self._waypoint_users, reference, name)
        if self._waypoint_users:
            touched.add(self.waypoint_users(service), ())
        for found in service.ranges:
            self._ranges.remove(found, name)
        for network, ip in service.places:
            place = place_of(network, ip)
            _disown(self.vip_owners, place, name)
            left = _owners(self.vip_owners, place)
            if len(left) == 1 and self.services[left[0]].hidden:
                self.vip_owners[place] = left
            self._touch_rivals(place, touched)
            touched.places[place] = None
            if place not in self._range_at:
                self._set_views(network, ip, touched)
        if service.ranges:
            self._set_views_around(service, touched)
        for found in service.ranges:
            if not self._ranges.owners(found):
                self._range_at.pop(place_of(found.own_network, found.ip), None)

    def _set_views(self, network: str, ip: Ip, touched: Touched) -> bool:
        """Namespaces that see another service at an address than the rest get a view of it.

        True when other ones have a view than before.
        """
        place = place_of(network, ip)
        before = self.scoped.get(place, {})
        wanted: set[str] = set()
        if isinstance(self.vip_owners.get(place), tuple):
            namespaces = {self.services[name].namespace for name in _owners(self.vip_owners, place)}
            seen_by_all = self._seen(place, None)
            wanted = {ns for ns in namespaces if self._seen(place, ns) != seen_by_all}
        if place in self._range_at:
            wanted |= self._own_before_longer(self._range_at[place])
            wanted |= self._own_in_viewed(self._range_at[place])
        if not wanted and not before:
            return False
        views = {ns: place_of(view_network(network, ns), ip) for ns in sorted(wanted)}
        for ns in before.keys() - wanted:
            del self._views[before[ns]]
            self.view_namespaces[ns] -= 1
        for ns in wanted - before.keys():
            self._views[views[ns]] = place, ns
            self.view_namespaces[ns] += 1
        self.view_namespaces = +self.view_namespaces
        touched.add((), [*before.values(), *views.values()])
        if views:
            self.scoped[place] = views
        else:
            self.scoped.pop(place, None)
        return wanted != before.keys()

    def _own_in_viewed(self, found: Range) -> set[str]:
        """Namespaces with a view of a range around their own, which would be found before it."""
        wider = [self.scoped.get(place_of(r.own_network, r.ip), {}) for r in self._ranges.around(found)]
        return {
            ns for ns in map(_namespace, self._ranges.owners(found)) if any(ns in views for views in wider)
        }

    def _own_before_longer(self, found: Range) -> set[str]:
        """Namespaces whose own range goes before longer ones of others in it (xds.md 3.2)."""
        longer = {
            _namespace(name) for other in self._ranges.inside(found) for name in self._ranges.owners(other)
        }
        return {ns for ns in map(_namespace, self._ranges.owners(found)) if longer - {ns}}

    def _touch_rivals(self, place: Place, touched: Touched) -> None:
        touched.services.update(dict.fromkeys(_owners(self.vip_owners, place)))

    def put_policy(self, policy: Policy, touched: Touched) -> None:
        if self.policies.get(policy.name) != policy:
            self.remove_policy(policy.name, touched)
            self.policies[policy.name] = policy
            if policy.dry_run:
                self._dry_run.add(policy.name)
            elif policy.namespace is not None:
                self._policy_scopes[policy.namespace] += 1
            touched.policies = True

    def remove_policy(self, name: str, touched: Touched) -> None:
        policy = self.policies.pop(name, None)
        if policy is None:
            return
        self._dry_run.discard(name)
        if policy.namespace is not None and not policy.dry_run:
            self._policy_scopes[policy.namespace] -= 1
            self._policy_scopes = +self._policy_scopes
        touched.policies = True

    def places(self) -> Iterator[Place]:
        """Every address of a service or workload, in the order in which they came; some may come twice."""
        return chain(self.vip_owners, self._views, self.pod_owners)

    @property
    def has_ranges(self) -> bool:
        return bool(self._range_at)

    def is_a_services(self, place: bytes) -> bool:
        """Whether a service has this address, also one that only some see."""
        return place in self.vip_owners or place in self._views

    def vip_places(self, services: Iterable[str]) -> Iterator[Place]:
        """The addresses of these services, of those that are there, and the views of them."""
        for name in services:
            if (service := self.services.get(name)) is not None:
                for vip in service.places:
                    place = place_of(*vip)
                    yield place
                    yield from self.scoped.get(place, {}).values()

    def owners(self, place: Place) -> tuple[str, ...]:
        """Every service and workload that has an address."""
        base, _ = self._views.get(place, (place, ""))
        return _owners(self.vip_owners, base) + _owners(self.pod_owners, place)

    def vip_owner(self, place: Place) -> str | None:
        """Whose address it is, in the eyes of all, or of the namespace whose view it is."""
        owners = self.vip_owners.get(place)
        if isinstance(owners, str):
            return owners
        if owners is None and place not in self._views:
            return None
        return self._seen(*self._views.get(place, (place, None)))

    def _seen(self, place: Place, namespace: str | None) -> str | None:
        """Of several services at an address: the client's own namespace's, a canonical one, the first.

        None when all are hidden from the client. The order is ztunnel's (xds.md 3.2).
        """
        found = (self.services[name] for name in _owners(self.vip_owners, place))
        seen = [service for service in found if not service.hidden or service.namespace == namespace]
        best = min(seen, key=lambda s: (s.namespace != namespace, not s.canonical, s.name), default=None)
        return None if best is None else best.name

    def networks_instead(self, own: str) -> list[str]:
        """Where the mesh is when nothing of it is in this network: no connection from there is routed."""
        rest, services = _rest_of_key(own), self.services.values()
        if any(own in service.networks for service in services):
            return []
        if any(place.endswith(rest) for place in self.pod_owners):
            return []
        networks = set().union(*(service.networks for service in services))
        first = next(iter(self.pod_owners), None)
        names = _owners(self.pod_owners, first)[:1] if first else ()
        return sorted(networks | {self.workload(name).network for name in names})

    def covered(self) -> Iterator[tuple[str, str]]:
        """Services that nobody reaches at an address of theirs, and whose that is."""
        for place, owners in self.vip_owners.items():
            if isinstance(owners, str) or len(owners) < 2:
                continue
            reached = {self.vip_owner(place)} | {
                self._seen(place, self.services[name].namespace) for name in owners
            }
            for name in owners:
                if name not in reached:
                    ip, owner = ip_to_text(ADDRESS_KEY.unpack(place)[0]), self.vip_owner(place)
                    yield name, f"{name}: {ip} is that of {owner}"

    def view_of(self, workload: Workload) -> int:
        """The id of the network in which a workload's namespace sees services of its own; 0: none."""
        if workload.namespace not in self.view_namespaces:
            return 0
        return network_id(view_network(workload.network, workload.namespace))

    def places_in(self, namespaces: Iterable[str]) -> Iterator[Place]:
        """The addresses of workloads in these namespaces."""
        for workload in self.workloads_in(namespaces):
            yield from places_of(workload)

    def workloads_in(self, namespaces: Iterable[str]) -> Iterator[Workload]:
        """Looks at all."""
        wanted = {namespace: namespace.encode() for namespace in namespaces}
        for uid, found in self.workloads.items() if wanted else ():
            if isinstance(found, bytes) and not any(data in found for data in wanted.values()):
                continue
            workload = self.workload(uid)
            if workload.namespace in wanted:
                yield workload

    def resolve(self, hostname: str, addresses: tuple[Ip, ...], touched: Touched) -> None:
        """Takes what a host name stands for now; nothing: it is known no more."""
        self.unlooked.discard(hostname)
        self.stand_ins.discard(hostname)
        if self.resolved.get(hostname, ()) == addresses:
            return
        if addresses:
            self.resolved[hostname] = addresses
        else:
            del self.resolved[hostname]
        for name in self.by_hostname.get(hostname, ()):
            touched.add((service for service, _ in self.workload(name).services), ())

    def with_unlooked(self) -> Iterator[tuple[str, set[str]]]:
        """Host names that nobody has looked up yet, and the services that have an endpoint of the name."""
        for hostname in sorted(self.unlooked):
            names = self.by_hostname.get(hostname, ())
            yield hostname, {service for name in names for service, _ in self.workload(name).services}

    def addresses_of(self, workload: Workload) -> tuple[Ip, ...]:
        """Its own, or those of its host name."""
        return workload.addresses or self.resolved.get(workload.hostname, ())

    def pod_at(self, place: Place) -> Workload | None:
        """Who is meant by an address that several workloads have: a pod over others, HBONE over plain."""
        owners = self.pod_owners.get(place)
        if owners is None:
            return None
        if isinstance(owners, str):
            return self.workload(owners)
        found = (self.workload(name) for name in owners)
        return min(found, key=lambda w: ("//Pod/" not in w.uid, not w.prefers_hbone, w.uid))

    def is_a_workloads(self, place: Place) -> bool:
        return place in self.pod_owners

    def client_at(self, place: Place) -> Workload | None:
        """Who connects from an address; None where several pods are said to have it: nobody knows which."""
        owners = self.pod_owners.get(place)
        pods = [uid for uid in owners if "//Pod/" in uid] if isinstance(owners, tuple) else []
        return None if len(pods) > 1 else self.pod_at(place)

    def are_plainly_pods(self, places: Sequence[Place]) -> bool:
        """Whether each address is one ordinary workload's and nobody else's: nothing needs decoding."""
        owners = [*map(self.pod_owners.get, places)]
        return (
            set(map(type, owners)) <= _ONE_OWNER
            and set(map(type, map(self.workloads.get, cast("list[str]", owners)))) <= _ORDINARY
            and self.vip_owners.keys().isdisjoint(places)
            and not self.view_namespaces
        )

    def has_plain_members(self, service: str) -> bool:
        """And no two of them have the same address: it would weigh twice. Of many such it is not known."""
        if self._odd_members.get(service) or len(self._shared_places) > _SHARED_KNOWN:
            return False
        if self._sharing is None:
            uids = (uid for place in self._shared_places for uid in _owners(self.pod_owners, place))
            self._sharing = frozenset(name for uid in uids for name, _ in self.workload(uid).services)
        return service not in self._sharing

    def is_nobody_elses(self, place: Place, uids: Container[str]) -> bool:
        """Whether an address is nobody's but one of theirs."""
        owner = self.pod_owners.get(place)
        return owner is None or (isinstance(owner, str) and owner in uids)

    def members_of(self, service: str) -> Iterable[Workload]:
        return map(self.workload, self._member_names(service))

    def count_members(self, service: str) -> int:
        return sum(1 for _ in self._member_names(service))

    def _member_names(self, service: str) -> Iterable[str]:
        groups = self.ordinary_members.get(service)
        return chain(*(group.uids for group in groups)) if groups else self._members.get(service, ())

    def unenforced(self) -> int:
        """How many workloads have policies, none of which is enforced yet."""
        return sum(users for said, users in self._policy_users.items() if self._is_guarded(*said))

    def has_policy(self, workload: Workload) -> bool:
        return self._is_guarded(workload.namespace, workload.policies)

    def _is_guarded(self, namespace: str, policies: tuple[str, ...]) -> bool:
        if not self._dry_run.issuperset(policies):
            return True
        return "" in self._policy_scopes or namespace in self._policy_scopes

    def missing_policies(self) -> dict[str, int]:
        """Policies that workloads name and nobody has sent, and how many workloads name each."""
        found: Counter[str] = Counter()
        for (_, policies), users in self._policy_users.items():
            found.update({name: users for name in policies if name not in self.policies})
        return dict(found)

    def unread_policies(self) -> list[str]:
        """Said wrongly, and never otherwise."""
        return [name for name, policy in self.policies.items() if not policy.is_read]

    def _count_policies(self, namespace: str, policies: tuple[str, ...], step: int) -> None:
        said = namespace, policies
        self._policy_users[said] += step
        if not self._policy_users[said]:
            del self._policy_users[said]


def _copied(part: Any) -> Any:
    """An index, and in it what changes in place: resources are replaced and never change."""
    if not isinstance(part, dict):
        return part
    found = part.copy()
    if isinstance(next(iter(part.values()), None), dict | list):
        found.update({key: value.copy() for key, value in part.items()})
    return found


def is_plain_member(workload: Workload) -> bool:
    """Of a service: its address is its own alone, or one of each family, and it weighs what others do."""
    ips = workload.addresses
    has_one = len(ips) == 1 or (len(ips) == _FAMILIES and is_v4(ips[0]) != is_v4(ips[1]))
    return has_one and workload.capacity == 1 and not workload.host_network


def raw_of(workload: Workload | bytes) -> bytes:
    return workload if isinstance(workload, bytes) else workload.raw


def _decode(raw: bytes) -> Workload:
    """Of an ordinary workload: it was read before."""
    return cast("Workload", decode_address(raw))


def _drop(index: defaultdict[_K, dict[str, None]], key: _K, name: str) -> None:
    names = index.get(key)
    if names is not None:
        names.pop(name, None)
        if not names:
            del index[key]


def _owners(index: dict[Place, Owners], place: Place) -> tuple[str, ...]:
    owners = index.get(place, ())
    return (owners,) if isinstance(owners, str) else owners


def _own(index: dict[Place, Owners], place: Place, name: str) -> None:
    owners = _owners(index, place)
    if name not in owners:
        index[place] = (*owners, name) if owners else name


def _disown(index: dict[Place, Owners], place: Place, name: str) -> None:
    left = tuple(owner for owner in _owners(index, place) if owner != name)
    if left:
        index[place] = left if len(left) > 1 else left[0]
    else:
        index.pop(place, None)
