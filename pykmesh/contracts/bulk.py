"""Many addresses decoded together: what `decode_address` says of each, several times as fast.

Usual workloads and services are read from columns (`pykmesh.contracts.wire`); whatever is rare or wrong
goes through `decode_address` one by one, which knows what to say of it. Ordinary workloads, of which a
large mesh is full, need no object each: they come in groups that differ in names and addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import compress, repeat
from sys import intern
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from pykmesh.contracts.address import (
    FAMILIES,
    Families,
    FieldError,
    Remembered,
    Service,
    Workload,
    decode_address,
    load_balancing,
    network_name,
    service_port,
    service_ports,
    workload_waypoint,
)
from pykmesh.contracts.wire import Bools, Buffer, Fields, Ints, Spans, changes, grouped, rows
from pykmesh.kernel.records import IP_BYTES, V4_PREFIX, Ip, is_v4
from pykmesh.proto.workload_pb2 import AddressOutline, NetworkAddress
from pykmesh.proto.workload_pb2 import ServiceOutline as Its
from pykmesh.proto.workload_pb2 import WorkloadOutline as Of

FEWEST: Final = 16
"""Fewer are faster one by one."""
MANY: Final = 4096
"""About as many as are fastest together."""
_ONE_OF_EACH: Final = 4 + 16
"""Bytes of an address of each family."""
_T = TypeVar("_T")

_networks: Final[Remembered[Any]] = Remembered(lambda data: network_name("workload.network", data.decode()))
_waypoints: Final[Remembered[Any]] = Remembered(workload_waypoint)
_names: Final[Remembered[Any]] = Remembered(lambda data: intern(data.decode()))


def decode_addresses(values: Sequence[bytes]) -> list[Service | Workload | FieldError]:
    """In the order of `values`; one that cannot be used is there as the error that says why."""
    found: list[Service | Workload | FieldError] = _mixed(values, _workloads, _services, decode_address)
    return found


def names_of(values: Sequence[bytes]) -> list[str | FieldError]:
    """The name that each must have as a resource; for one that cannot be used the error that says why."""
    return _mixed(values, _uids, _service_names, _name)


class Group(msgspec.Struct, frozen=True, gc=False):
    """Ordinary workloads, with all that they have in common."""

    service: str
    ports: tuple[tuple[int, int], ...]
    network: str
    namespace: str
    policies: tuple[str, ...]
    uids: list[str]
    raws: list[bytes]
    addresses: bytes
    """Of each member one, or one of each family, in the order in which all say them: sixteen bytes each."""

    @property
    def each(self) -> int:
        """How many addresses a member has."""
        return len(self.addresses) // (IP_BYTES * len(self.uids))

    def of_family(self, *, is_6: bool) -> bytes:
        """The addresses of it, one of each member; empty: they have none."""
        step = self.each
        for index in range(step):
            if is_v4(self.addresses[index * IP_BYTES : (index + 1) * IP_BYTES]) != is_6:
                if step == 1:
                    return self.addresses
                rows = np.frombuffer(self.addresses, np.uint8).reshape(-1, step, IP_BYTES)
                return rows[:, index].tobytes()
        return b""

    def only(self, which: Sequence[int]) -> Group:
        """Those of it at these places."""
        size = self.each * IP_BYTES
        return msgspec.structs.replace(
            self,
            uids=[self.uids[index] for index in which],
            raws=[self.raws[index] for index in which],
            addresses=b"".join([self.addresses[index * size : (index + 1) * size] for index in which]),
        )


class Ordinary:
    """Collects ordinary workloads, many at a time, and groups them in the end.

    Ordinary is what is healthy, has one address or one of each family, one service, one policy at the most
    (each has that of a PeerAuthentication for all), and nothing else that decides anything.
    """

    def __init__(self) -> None:
        self.uids: list[str] = []
        self.raws: list[bytes] = []
        self._numbers: dict[tuple[bytes, bytes, bytes, bytes, int, int], int] = {}
        """Kinds of workloads: what those of a group have in common."""
        self._kinds: list[Ints] = []
        self._addresses: list[npt.NDArray[np.uint8]] = []
        self._others: list[npt.NDArray[np.uint8]] = []
        """Of who has a second one that one; of others nothing that counts."""

    def __len__(self) -> int:
        return len(self.uids)

    def take(self, values: Sequence[bytes]) -> list[bool]:
        """Which of the values it took; the others are for `decode_addresses`."""
        buffer = Buffer(values)
        outer = buffer.fields(buffer.spans)
        plain = outer.only(AddressOutline.WORKLOAD_FIELD_NUMBER)
        fields = buffer.fields(outer.spans(AddressOutline.WORKLOAD_FIELD_NUMBER).where(plain))
        ordinary = _ordinary(buffer, fields)
        taken = np.zeros(len(values), np.bool_)
        taken[plain] = ordinary
        which = taken.tolist()
        address, other = _addresses(fields, ordinary)
        uid, entry, network, namespace, policy = (
            fields.spans(number).where(ordinary)
            for number in (
                Of.UID_FIELD_NUMBER,
                Of.SERVICES_FIELD_NUMBER,
                Of.NETWORK_FIELD_NUMBER,
                Of.NAMESPACE_FIELD_NUMBER,
                Of.AUTHORIZATION_POLICIES_FIELD_NUMBER,
            )
        )
        try:
            uids = list(map(bytes.decode, buffer.parts(uid)))
        except UnicodeDecodeError:
            return [False] * len(values)
        lengths, others = address.end - address.start, other.end - other.start
        differs = changes(lengths) | changes(others)
        texts = entry, network, namespace, policy
        for text in texts:
            differs |= buffer.differs(text)
        firsts = zip(
            *(buffer.parts(text.where(differs)) for text in texts),
            lengths[differs].tolist(),
            others[differs].tolist(),
            strict=True,
        )
        kinds = [self._numbers.setdefault(kind, len(self._numbers)) for kind in firsts]
        self._kinds.append(np.array(kinds, np.int64)[np.cumsum(differs) - 1])
        self.uids += uids
        self.raws += compress(values, which)
        self._addresses.append(buffer.padded(address, V4_PREFIX + bytes(4)))
        self._others.append(buffer.padded(other, V4_PREFIX + bytes(4)))
        return which

    def groups(self) -> Iterator[Group]:
        """Raises FieldError or ValueError when what a group has in common cannot be used."""
        kinds = np.concatenate(self._kinds) if self._kinds else np.zeros(0, np.int64)
        order = np.argsort(kinds, kind="stable")
        uids = list(map(self.uids.__getitem__, order.tolist()))
        raws = list(map(self.raws.__getitem__, order.tolist()))
        none = np.zeros((0, IP_BYTES), np.uint8)
        addresses, others = (np.concatenate([none, *made])[order] for made in (self._addresses, self._others))
        start = 0
        for (entry, network, namespace, policy, _, second), count in zip(
            self._numbers, np.bincount(kinds).tolist(), strict=True
        ):
            end = start + count
            ips = addresses[start:end]
            yield Group(
                *service_ports[entry],
                _networks[network],
                _names[namespace],
                (_names[policy],) if policy else (),
                uids[start:end],
                raws[start:end],
                (np.hstack((ips, others[start:end])) if second else ips).tobytes(),
            )
            start = end


def _ordinary(buffer: Buffer, fields: Fields) -> Bools:
    found: Bools = _usual(fields) & (fields.numbers(Of.STATUS_FIELD_NUMBER) == 0)
    found &= fields.numbers(Of.NETWORK_MODE_FIELD_NUMBER) == 0
    counts, addresses = fields.repeated(Of.ADDRESSES_FIELD_NUMBER)
    whose, lengths = np.repeat(np.arange(len(counts)), counts), addresses.end - addresses.start
    of_6 = lengths == IP_BYTES
    ips = buffer.padded(addresses.where(of_6), bytes(IP_BYTES))
    mapped = (ips[:, : len(V4_PREFIX)] == np.frombuffer(V4_PREFIX, np.uint8)).all(axis=1)
    found[whose[of_6][mapped]] = False  # of IPv4, whatever they look like
    both = np.bincount(whose, lengths, minlength=len(counts)) == _ONE_OF_EACH
    found &= (counts == 1) | ((counts == 2) & both)
    found &= fields.counts(Of.SERVICES_FIELD_NUMBER) == 1
    found &= fields.counts(Of.WAYPOINT_FIELD_NUMBER) == 0
    policies = fields.counts(Of.AUTHORIZATION_POLICIES_FIELD_NUMBER)
    policy = fields.spans(Of.AUTHORIZATION_POLICIES_FIELD_NUMBER)
    found &= (policies == 0) | ((policies == 1) & (policy.end > policy.start))
    return found


def _addresses(fields: Fields, which: Bools) -> tuple[Spans, Spans]:
    """The first address of each of these, and the second; an empty span where there is none."""
    counts, found = fields.repeated(Of.ADDRESSES_FIELD_NUMBER)
    last, counts = np.cumsum(counts)[which] - 1, counts[which]
    first, has_two = last - counts + 1, counts > 1
    second = Spans(np.where(has_two, found.start[last], 0), np.where(has_two, found.end[last], 0))
    return Spans(found.start[first], found.end[first]), second


_Many = Callable[[Buffer, Fields, Sequence[bytes]], tuple[Bools, Sequence[_T]]]
"""From messages of one kind: which are usual, and what is said of each; of others that does not count."""


def _mixed(
    values: Sequence[bytes],
    workloads: _Many[_T],
    services: _Many[_T],
    one: Callable[[bytes], _T],
) -> list[_T | FieldError]:
    """Usual ones many at a time, everything else by `one`."""
    found: list[_T | FieldError | None] = [None] * len(values)
    if len(values) >= FEWEST:
        buffer = Buffer(values)
        outer = buffer.fields(buffer.spans)
        kinds = (
            (AddressOutline.WORKLOAD_FIELD_NUMBER, workloads),
            (AddressOutline.SERVICE_FIELD_NUMBER, services),
        )
        for kind, many in kinds:
            which = np.flatnonzero(outer.only(kind))
            fields = buffer.fields(outer.spans(kind).where(which))
            try:
                usual, read = many(buffer, fields, [values[index] for index in which.tolist()])
            except (ValueError, FieldError):
                continue
            for index, each in zip(which[usual].tolist(), compress(read, usual.tolist()), strict=True):
                found[index] = each
    return [
        _or_error(one, value) if each is None else each for each, value in zip(found, values, strict=True)
    ]


def _or_error(one: Callable[[bytes], _T], value: bytes) -> _T | FieldError:
    try:
        return one(value)
    except FieldError as error:
        return error


def _name(value: bytes) -> str:
    found = decode_address(value)
    return found.uid if isinstance(found, Workload) else found.name


def _workloads(buffer: Buffer, fields: Fields, raws: Sequence[bytes]) -> tuple[Bools, list[Workload]]:
    """As `decode_address` reads them, but for its checks. Raises what the texts in them raise."""
    waypoint_counts = fields.repeated(Of.WAYPOINT_FIELD_NUMBER)[0].tolist()
    waypoints = [
        _waypoints[said] if count else None
        for said, count in zip(
            buffer.parts(fields.spans(Of.WAYPOINT_FIELD_NUMBER)), waypoint_counts, strict=True
        )
    ]
    address_counts, addresses = fields.repeated(Of.ADDRESSES_FIELD_NUMBER)
    service_counts, services = fields.repeated(Of.SERVICES_FIELD_NUMBER)
    policy_counts, policies = fields.repeated(Of.AUTHORIZATION_POLICIES_FIELD_NUMBER)
    return _usual(fields), list(
        map(
            Workload,
            map(bytes.decode, buffer.parts(fields.spans(Of.UID_FIELD_NUMBER))),
            map(_networks.__getitem__, buffer.parts(fields.spans(Of.NETWORK_FIELD_NUMBER))),
            grouped(address_counts, rows(buffer.padded(addresses, V4_PREFIX + bytes(4)))),
            grouped(service_counts, map(service_ports.__getitem__, buffer.parts(services))),
            (fields.numbers(Of.STATUS_FIELD_NUMBER) == 0).tolist(),
            (fields.numbers(Of.NETWORK_MODE_FIELD_NUMBER) == 1).tolist(),
            waypoints,
            (fields.numbers(Of.TUNNEL_PROTOCOL_FIELD_NUMBER) == 1).tolist(),
            repeat(1),
            grouped(policy_counts, map(bytes.decode, buffer.parts(policies))),
            map(_names.__getitem__, buffer.parts(fields.spans(Of.NAMESPACE_FIELD_NUMBER))),
            raws,
        )
    )


def _uids(buffer: Buffer, fields: Fields, _: Sequence[bytes]) -> tuple[Bools, list[str]]:
    """What `_workloads` reads is read here too, for its errors; much of it is the same in all."""
    texts: tuple[tuple[Remembered[Any], Spans], ...] = (
        (_networks, fields.spans(Of.NETWORK_FIELD_NUMBER)),
        (service_ports, fields.repeated(Of.SERVICES_FIELD_NUMBER)[1]),
        (_names, fields.spans(Of.NAMESPACE_FIELD_NUMBER)),
        (_names, fields.repeated(Of.AUTHORIZATION_POLICIES_FIELD_NUMBER)[1]),
        (_waypoints, fields.repeated(Of.WAYPOINT_FIELD_NUMBER)[1]),
    )
    for remembered, spans in texts:
        for part in buffer.distinct(spans):
            _ = remembered[part]
    return _usual(fields), list(map(bytes.decode, buffer.parts(fields.spans(Of.UID_FIELD_NUMBER))))


def _services(buffer: Buffer, fields: Fields, _: Sequence[bytes]) -> tuple[Bools, list[Service]]:
    """As `decode_address` reads them, but for its checks. Raises what the texts in them raise."""
    namespace, hostname = fields.spans(Its.NAMESPACE_FIELD_NUMBER), fields.spans(Its.HOSTNAME_FIELD_NUMBER)
    families, visibility = (
        fields.numbers(Its.IP_FAMILIES_FIELD_NUMBER),
        fields.numbers(Its.VISIBILITY_FIELD_NUMBER),
    )
    usual = ~fields.odd & (families <= Families.DUAL) & (visibility <= 1)
    usual &= (namespace.end > namespace.start) & (hostname.end > hostname.start)
    for field in (Its.NAMESPACE_FIELD_NUMBER, Its.HOSTNAME_FIELD_NUMBER, Its.LOAD_BALANCING_FIELD_NUMBER):
        usual &= fields.counts(field) <= 1
    for field in (
        Its.WAYPOINT_FIELD_NUMBER,
        Its.WEIGHTED_WAYPOINTS_FIELD_NUMBER,
        Its.EXTENSIONS_FIELD_NUMBER,
    ):
        usual &= fields.counts(field) == 0
    vip_counts, vips = fields.repeated(Its.ADDRESSES_FIELD_NUMBER)
    are_usual, pairs = _vips(buffer, vips)
    usual[np.repeat(np.arange(len(usual)), vip_counts)[~are_usual]] = False
    port_counts, ports = fields.repeated(Its.PORTS_FIELD_NUMBER)
    read = zip(
        map(bytes.decode, buffer.parts(namespace)),
        map(bytes.decode, buffer.parts(hostname)),
        grouped(vip_counts, pairs),
        grouped(port_counts, map(service_port.__getitem__, buffer.parts(ports))),
        np.where(usual, families, 0).tolist(),
        map(load_balancing.__getitem__, buffer.parts(fields.spans(Its.LOAD_BALANCING_FIELD_NUMBER))),
        (fields.numbers(Its.CANONICAL_FIELD_NUMBER) > 0).tolist(),
        (visibility > 0).tolist(),
        strict=False,
    )
    return usual, [
        Service(
            f"{space}/{host}", host, addresses, (), at if len(at) < 2 else tuple(dict(at).items()),
            FAMILIES[family], mode, scopes, allows_unhealthy, (), canonical, hidden,
        )
        for space, host, addresses, at, family, (mode, scopes, allows_unhealthy), canonical, hidden in read
    ]  # fmt: skip


def _vips(buffer: Buffer, spans: Spans) -> tuple[Bools, Iterator[tuple[str, Ip]]]:
    """Which of a service's addresses are usual, so no ranges; and the network and address of each."""
    fields = buffer.fields(spans)
    address, network = (
        fields.spans(NetworkAddress.ADDRESS_FIELD_NUMBER),
        fields.spans(NetworkAddress.NETWORK_FIELD_NUMBER),
    )
    lengths = address.end - address.start
    rare = fields.odd | fields.has(NetworkAddress.LENGTH_FIELD_NUMBER) | ((lengths != 4) & (lengths != 16))
    for field in (NetworkAddress.ADDRESS_FIELD_NUMBER, NetworkAddress.NETWORK_FIELD_NUMBER):
        rare |= fields.counts(field) > 1
    ips = map(Ip, rows(buffer.padded(address, V4_PREFIX + bytes(4))))
    return ~rare, zip(map(_networks.__getitem__, buffer.parts(network)), ips, strict=True)


def _service_names(buffer: Buffer, fields: Fields, raws: Sequence[bytes]) -> tuple[Bools, list[str]]:
    usual, services = _services(buffer, fields, raws)
    return usual, [service.name for service in services]


def _usual(fields: Fields) -> Bools:
    """Which workloads need no look by `decode_address`: neither wrong nor rare."""
    status, mode = fields.numbers(Of.STATUS_FIELD_NUMBER), fields.numbers(Of.NETWORK_MODE_FIELD_NUMBER)
    tunnel, uid = fields.numbers(Of.TUNNEL_PROTOCOL_FIELD_NUMBER), fields.spans(Of.UID_FIELD_NUMBER)
    weighted = fields.spans(Of.CAPACITY_FIELD_NUMBER).start > 0
    named = fields.spans(Of.HOSTNAME_FIELD_NUMBER)
    usual = ~fields.odd & ~weighted & (status <= 1) & (mode <= 1) & (tunnel <= 1)
    usual &= (uid.end > uid.start) & (named.end == named.start)
    for field in (
        Of.UID_FIELD_NUMBER,
        Of.NETWORK_FIELD_NUMBER,
        Of.NAMESPACE_FIELD_NUMBER,
        Of.WAYPOINT_FIELD_NUMBER,
    ):
        usual &= fields.counts(field) <= 1
    counts, addresses = fields.repeated(Of.ADDRESSES_FIELD_NUMBER)
    lengths = addresses.end - addresses.start
    usual[np.repeat(np.arange(len(counts)), counts)[(lengths != 4) & (lengths != 16)]] = False
    return usual
