"""The mesh as the control plane described it last, and what a change of it touches.

Pure: no bus, no maps. A resource that refers to one that is not there yet (an endpoint before its
service) is kept and takes effect when the other comes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Final, NewType, TypeVar, cast

from pykmesh.contracts.address import Policy, Service, Workload, decode_address
from pykmesh.contracts.bulk import Group
from pykmesh.kernel.records import ADDRESS_KEY, IP_BYTES, NO_IP, RANGE_KEY, Ip, network_id
from pykmesh.proto.workload_pb2 import Workload as WorkloadMessage
from services.map_writer.locality import NOWHERE, Locality, is_ranked, locality

RANGE_NETWORK_BITS: Final = 32
_K = TypeVar("_K")
Place = NewType("Place", bytes)
"""A network and an address, as the key of the map `addresses`."""
Owners = str | tuple[str, ...]
"""Who has an address: nearly every one has one owner."""
_ONE_OWNER: Final = {str}
_ORDINARY: Final = {bytes}


def place_of(network: str, ip: Ip) -> Place:
    return Place(ip + _rest_of_key(network))


@cache
def _rest_of_key(network: str) -> bytes:
    """What follows the address in a key: the address stands first in it."""
    key = ADDRESS_KEY.pack(NO_IP, network_id(network))
    return key[len(NO_IP) :]


class Touched:
    """What must be planned anew, in the order in which it came: memory is then read in order too."""

    def __init__(self) -> None:
        self.services: dict[str, None] = {}
        self.places: dict[Place, None] = {}
        self.policies = False
        """Policies changed: with them, where they decide anything, everything."""

    def add(self, services: Iterable[str], places: Iterable[Place]) -> None:
        self.services.update(dict.fromkeys(services))
        self.places.update(dict.fromkeys(places))


class Mesh:
    """Resources by name, with the indexes that planning needs."""

    def __init__(self, here: Locality = NOWHERE) -> None:
        """`here`: where this node is. With a node and no region it is what workloads of the node say."""
        self.here = here
        self._on_this_node = b"" if here.region else WorkloadMessage(node=here.node).SerializeToString()
        self.ranked: dict[str, None] = {}
        """Services that prefer near endpoints."""
        self.services: dict[str, Service] = {}
        self.workloads: dict[str, Workload | bytes] = {}
        """One that is still bytes is ordinary (`bulk.Ordinary`): it is decoded when more of it is asked."""
        self.ordinary_members: dict[str, list[Group]] = {}
        """Of a service all of whose members came in groups, and are as they came."""
        self.policies: dict[str, Policy] = {}
        self._members: defaultdict[str, dict[str, None]] = defaultdict(dict)
        """Of every other service."""
        self.vip_owners: dict[Place, Owners] = {}
        self.pod_owners: dict[Place, Owners] = {}
        self._named_policies = 0
        self._policy_users: Counter[str] = Counter()
        self._without_policies: Counter[str] = Counter()

    def remove(self, name: str, touched: Touched) -> None:
        """A name that is not there is no error: the control plane removes what it never sent."""
        if name in self.workloads:
            self._unlink_workload(name, self.workload(name), touched)
            del self.workloads[name]
        elif (service := self.services.pop(name, None)) is not None:
            self._unlink_service(name, service, touched)

    def put(self, name: str, resource: Service | Workload, touched: Touched) -> None:
        """Adds or replaces; a name may change from workload to service."""
        if isinstance(resource, Workload):
            before = self.workloads.get(name)
            if before is not None and _raw(before) == resource.raw:
                return
            if before is not None or name in self.services:
                self.remove(name, touched)
            self.workloads[name] = resource
            self._learn_where(resource.raw, touched)
            self._link_workload(name, resource, touched)
        else:
            if self.services.get(name) == resource:
                return
            self.remove(name, touched)
            self.services[name] = resource
            self._link_service(name, resource, touched)

    def put_ordinary(self, groups: Iterable[Group], touched: Touched) -> None:
        """`put` for ordinary workloads, none of which comes twice."""
        for group in groups:
            if not self.workloads.keys().isdisjoint(group.uids) or not self.services.keys().isdisjoint(
                group.uids
            ):
                for uid, raw in zip(group.uids, group.raws, strict=True):
                    self.put(uid, _decode(raw), touched)
                continue
            self.workloads.update(zip(group.uids, group.raws, strict=True))
            for raw in group.raws:
                self._learn_where(raw, touched)
            self._without_policies[group.namespace] += len(group.uids)
            if group.service in self._members:
                self._members[group.service].update(dict.fromkeys(group.uids))
            else:
                self.ordinary_members.setdefault(group.service, []).append(group)
            touched.services[group.service] = None
            self._own_all(group, touched)

    def _own_all(self, group: Group, touched: Touched) -> None:
        rest, ips = _rest_of_key(group.network), group.addresses
        places = [Place(ips[at : at + IP_BYTES] + rest) for at in range(0, len(ips), IP_BYTES)]
        touched.places.update(dict.fromkeys(places))
        owned = dict(zip(places, group.uids, strict=True))
        if len(owned) == len(places) and self.pod_owners.keys().isdisjoint(owned):
            self.pod_owners.update(owned)
            return
        for place, uid in zip(places, group.uids, strict=True):
            _own(self.pod_owners, place, uid)

    def _learn_where(self, raw: bytes, touched: Touched) -> None:
        """A workload of this node says where the node is; the last one that does counts."""
        if not self._on_this_node or self._on_this_node not in raw:
            return
        found = locality(raw)
        if found.node == self.here.node and found.region and found != self.here:
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
        self._count_policies(workload, 1)
        for service, _ in workload.services:
            self._ungroup(service)
            self._members[service][name] = None
            touched.services[service] = None
        if not workload.host_network:
            for ip in workload.addresses:
                place = place_of(workload.network, ip)
                _own(self.pod_owners, place, name)
                touched.places[place] = None

    def _unlink_workload(self, name: str, workload: Workload, touched: Touched) -> None:
        self._count_policies(workload, -1)
        for service, _ in workload.services:
            self._ungroup(service)
            _drop(self._members, service, name)
            touched.services[service] = None
        if not workload.host_network:
            for ip in workload.addresses:
                place = place_of(workload.network, ip)
                _disown(self.pod_owners, place, name)
                touched.places[place] = None

    def _ungroup(self, service: str) -> None:
        """Its members are no more all ordinary."""
        for group in self.ordinary_members.pop(service, ()):
            self._members[service].update(dict.fromkeys(group.uids))

    def _link_service(self, name: str, service: Service, touched: Touched) -> None:
        touched.services[name] = None
        if is_ranked(service):
            self.ranked[name] = None
        for network, ip in service.places:
            place = place_of(network, ip)
            self._touch_rivals(place, touched)
            _own(self.vip_owners, place, name)
            touched.places[place] = None

    def range_of(self, place: Place) -> bytes | None:
        """The key of the range that a place stands for, of a service that is there."""
        owner = self.vip_owner(place)
        for found in self.services[owner].ranges if owner is not None else ():
            if place_of(found.own_network, found.ip) == place:
                return RANGE_KEY.pack(RANGE_NETWORK_BITS + found.bits, network_id(found.network), found.ip)
        return None

    def _unlink_service(self, name: str, service: Service, touched: Touched) -> None:
        touched.services[name] = None
        self.ranked.pop(name, None)
        for network, ip in service.places:
            place = place_of(network, ip)
            _disown(self.vip_owners, place, name)
            self._touch_rivals(place, touched)
            touched.places[place] = None

    def _touch_rivals(self, place: Place, touched: Touched) -> None:
        touched.add(_owners(self.vip_owners, place), ())

    def put_policy(self, policy: Policy, touched: Touched) -> None:
        if self.policies.get(policy.name) != policy:
            self.policies[policy.name] = policy
            touched.policies = True

    def remove_policy(self, name: str, touched: Touched) -> None:
        if self.policies.pop(name, None) is not None:
            touched.policies = True

    def places(self) -> Iterator[Place]:
        """Every address of a service or workload, in the order in which they came; some may come twice."""
        return chain(self.vip_owners, self.pod_owners)

    def vip_places(self, services: Iterable[str]) -> Iterator[Place]:
        """The addresses of these services, of those that are there."""
        for name in services:
            if (service := self.services.get(name)) is not None:
                yield from (place_of(*vip) for vip in service.places)

    def owners(self, place: Place) -> tuple[str, ...]:
        """Every service and workload that has an address."""
        return _owners(self.vip_owners, place) + _owners(self.pod_owners, place)

    def vip_owner(self, place: Place) -> str | None:
        """Whose address it is, when several services have it: a canonical one, else the first by name."""
        owners = self.vip_owners.get(place)
        if owners is None or isinstance(owners, str):
            return owners
        return min(owners, key=lambda name: (not self.services[name].canonical, name))

    def pod_at(self, place: Place) -> Workload | None:
        """Who is meant by an address that several workloads have: a pod over others, HBONE over plain."""
        owners = self.pod_owners.get(place)
        if owners is None:
            return None
        if isinstance(owners, str):
            return self.workload(owners)
        found = (self.workload(name) for name in owners)
        return min(found, key=lambda w: ("//Pod/" not in w.uid, not w.prefers_hbone, w.uid))

    def are_plainly_pods(self, places: Sequence[Place]) -> bool:
        """Whether each address is one ordinary workload's and nobody else's: nothing needs decoding."""
        owners = [*map(self.pod_owners.get, places)]
        return (
            set(map(type, owners)) <= _ONE_OWNER
            and set(map(type, map(self.workloads.get, cast("list[str]", owners)))) <= _ORDINARY
            and self.vip_owners.keys().isdisjoint(places)
        )

    def members_of(self, service: str) -> Iterable[Workload]:
        return map(self.workload, self._member_names(service))

    def count_members(self, service: str) -> int:
        return sum(1 for _ in self._member_names(service))

    def _member_names(self, service: str) -> Iterable[str]:
        groups = self.ordinary_members.get(service)
        return chain(*(group.uids for group in groups)) if groups else self._members.get(service, ())

    def unenforced(self) -> int:
        """How many workloads have policies, none of which is enforced yet."""
        scopes = self._policy_scopes()
        if "" in scopes:
            return len(self.workloads)
        return self._named_policies + sum(self._without_policies[scope] for scope in scopes)

    def has_policy(self, workload: Workload) -> bool:
        if workload.policies:
            return True
        scopes = self._policy_scopes()
        return "" in scopes or workload.namespace in scopes

    def missing_policies(self) -> dict[str, int]:
        """Policies that workloads name and nobody has sent, and how many workloads name each."""
        return {name: users for name, users in self._policy_users.items() if name not in self.policies}

    def _policy_scopes(self) -> set[str]:
        """Namespaces with policies for all that is in them; "" for everything."""
        return {policy.namespace for policy in self.policies.values() if policy.namespace is not None}

    def _count_policies(self, workload: Workload, step: int) -> None:
        if workload.policies:
            self._named_policies += step
        else:
            self._without_policies[workload.namespace] += step
        for name in workload.policies:
            self._policy_users[name] += step
            if not self._policy_users[name]:
                del self._policy_users[name]


def _raw(workload: Workload | bytes) -> bytes:
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
