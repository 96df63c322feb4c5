"""Addresses for objects that have none: what the API server, the network plug-in and istiod's allocator give.

There is nothing to remember: an address follows from the name of its owner. Each owner has a fixed order in
which it tries the addresses of a range, drawn from a hash of its name, and takes the first that is neither
written in any object nor taken by an owner before it in the order of names. So the same objects always get
the same addresses; a newcomer moves another's address only where it takes that very address.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from pykmesh.controlplane.settings import AddressRanges
from pykmesh.manifests.addresses import IP, ClusterIP, IPFamily, is_ip
from pykmesh.manifests.objects import (
    EndpointSlice,
    HostAddress,
    Node,
    Object,
    ObjectRef,
    Pod,
    PodIP,
    Service,
    ServiceEntry,
    ServiceEntryStatus,
    WorkloadEntry,
    ref_of,
)

_RESERVED_HOSTS = 2  # the address of the network itself, and the first one, which is often a gateway's
_HASHED_TRIES = 32  # then on from the last one, address by address


class Shortage(msgspec.Struct, frozen=True):
    """An object that did not get an address."""

    ref: ObjectRef
    why: str


class Allocation(msgspec.Struct, frozen=True):
    """The objects with their addresses filled in."""

    objects: tuple[Object, ...]
    shortages: tuple[Shortage, ...]


class Written:
    """The addresses and ranges of addresses that objects name themselves, as numbers by family."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._addresses: dict[int, set[int]] = {4: set(), 6: set()}
        self._ranges: dict[int, list[range]] = {4: [], 6: []}
        for text in texts:
            if is_ip(text):
                packed = IP(text).packed
                self._addresses[4 if len(packed) == 4 else 6].add(int.from_bytes(packed))
            else:
                network = ipaddress.ip_network(text, strict=False)
                first = int(network.network_address)
                self._ranges[network.version].append(range(first, first + network.num_addresses))

    def has(self, version: int, number: int) -> bool:
        in_range = any(number in range_ for range_ in self._ranges[version])
        return in_range or number in self._addresses[version]

    def count_within(self, version: int, within: range) -> int:
        """An upper bound of how many addresses of a range are written."""
        overlaps = (min(r.stop, within.stop) - max(r.start, within.start) for r in self._ranges[version])
        return len(self._addresses[version]) + sum(max(0, overlap) for overlap in overlaps)


class Pool:
    """One range. Hands out each address once, and none that is written."""

    def __init__(self, cidr: str, written: Written) -> None:
        self._network = ipaddress.ip_network(cidr)
        self._first = int(self._network.network_address)
        self._written = written
        self._given: set[int] = set()
        usable = self._network.num_addresses - _RESERVED_HOSTS
        self._size = usable - 1 if self._network.version == 4 else usable  # v4 has a broadcast address

    def take(self, owner: str) -> IP | None:
        """The address of an owner; None if the range is full. Call in the order of owners."""
        for offset in self._tries(owner):
            number = self._first + offset
            if offset not in self._given and not self._written.has(self._network.version, number):
                self._given.add(offset)
                return IP(self._network[offset])
        return None

    def _tries(self, owner: str) -> Iterator[int]:
        if self._size <= 0:
            return
        place = 0
        for attempt in range(_HASHED_TRIES):
            digest = hashlib.blake2b(f"{owner}#{attempt}".encode(), digest_size=16).digest()
            place = int.from_bytes(digest) % self._size
            yield place + _RESERVED_HOSTS
        everything = range(self._first, self._first + self._network.num_addresses)
        used = len(self._given) + self._written.count_within(self._network.version, everything)
        for step in range(1, min(self._size, used + 1) + 1):
            yield (place + step) % self._size + _RESERVED_HOSTS


class Allocator:
    """Fills in addresses. One is good for one set of objects."""

    def __init__(self, objects: Sequence[Object], ranges: AddressRanges) -> None:
        self._objects = objects
        self._ranges = ranges
        self._node_ips = {node.name: _internal_ip(node) for node in objects if isinstance(node, Node)}
        written = Written(_written_addresses(objects))
        cidrs = {getattr(ranges, name) for name in ranges.__struct_fields__} - {""}
        self._pools = {cidr: Pool(cidr, written) for cidr in cidrs}
        self._shortages: list[Shortage] = []

    def run(self) -> Allocation:
        in_order = sorted(range(len(self._objects)), key=lambda index: ref_of(self._objects[index]))
        filled = list(self._objects)
        for index in in_order:
            filled[index] = self._fill(filled[index])
        return Allocation(tuple(filled), tuple(self._shortages))

    def _fill(self, obj: Object) -> Object:
        match obj:
            case Service():
                return self._fill_service(obj)
            case Pod():
                return self._fill_pod(obj)
            case ServiceEntry():
                return self._fill_entry(obj)
            case _:
                return obj

    def _fill_service(self, service: Service) -> Service:
        if service.is_external_name or service.is_headless:
            return service
        vips, families = service.vips, service.ip_families
        missing = [family for family in families if family not in {vip.family for vip in vips}]
        cidrs = [self._ranges.service_v4 if f is IPFamily.IPV4 else self._ranges.service_v6 for f in missing]
        given = self._take_all(ref_of(service), str(ref_of(service)), cidrs)
        ips = tuple(ClusterIP(ip) for ip in (*vips, *given))
        return _with(service, spec=_with(service.spec, cluster_ips=ips, ip_families=families))

    def _fill_pod(self, pod: Pod) -> Pod:
        if pod.is_over or pod.ips:
            return pod
        if pod.spec.host_network:
            host = pod.status.host_ip or self._node_ips.get(pod.spec.node_name)
            if not host:
                why = "it uses the host network, and its node is not known"
                self._shortages.append(Shortage(ref_of(pod), why))
            return _with(pod, status=_with(pod.status, pod_ip=host))
        cidrs = filter(None, (self._ranges.pod_v4, self._ranges.pod_v6))
        given = self._take_all(ref_of(pod), str(ref_of(pod)), cidrs)
        return _with(pod, status=_with(pod.status, pod_ips=tuple(PodIP(ip=ip) for ip in given)))

    def _fill_entry(self, entry: ServiceEntry) -> ServiceEntry:
        """Addresses that its status has stay."""
        addresses = list(entry.status.addresses)
        have = {address.host for address in addresses}
        for host in entry.spec.hosts:
            if entry.takes_address(host) and host not in have:
                cidrs = filter(None, (self._ranges.entry_v4, self._ranges.entry_v6))
                given = self._take_all(ref_of(entry), f"{ref_of(entry)} {host}", cidrs)
                addresses += [HostAddress(value=ip, host=host) for ip in given]
        return _with(entry, status=ServiceEntryStatus(addresses=tuple(addresses)))

    def _take_all(self, ref: ObjectRef, owner: str, cidrs: Iterable[str]) -> list[IP]:
        given = []
        for cidr in cidrs:
            address = self._pools[cidr].take(owner) if cidr else None
            if address:
                given.append(address)
            else:
                why = f"the range {cidr} is full" if cidr else "there is no range of addresses of this family"
                self._shortages.append(Shortage(ref, why))
        return given


def allocate(objects: Sequence[Object], ranges: AddressRanges) -> Allocation:
    """Gives addresses to Services, Pods and ServiceEntries that lack them; the rest stays as it is."""
    return Allocator(objects, ranges).run()


def _written_addresses(objects: Iterable[Object]) -> Iterator[str]:
    """All addresses and ranges of them that objects name themselves."""
    for obj in objects:
        match obj:
            case Service():
                yield from obj.vips
            case Pod():
                yield from obj.ips
            case Node():
                yield from filter(is_ip, (address.address for address in obj.status.addresses))
            case ServiceEntry():
                yield from (address.value for address in obj.status.addresses)
                yield from obj.spec.addresses
                yield from filter(is_ip, (endpoint.address for endpoint in obj.spec.endpoints))
            case WorkloadEntry():
                yield from filter(is_ip, (obj.spec.address,))
            case EndpointSlice():
                yield from filter(is_ip, (a for endpoint in obj.endpoints for a in endpoint.addresses))
            case _:
                pass


def _internal_ip(node: Node) -> IP | None:
    found = (address.address for address in node.status.addresses if address.type == "InternalIP")
    return next((IP(address) for address in found if is_ip(address)), None)


_with = msgspec.structs.replace
