"""Many addresses decoded together: what `decode_address` says of each, several times as fast.

Ordinary workloads are read from columns (`pykmesh.contracts.wire`); services, and whatever is rare or
wrong, go through `decode_address` one by one, which knows what to say of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress, repeat
from sys import intern
from typing import Any, Final, TypeVar

import numpy as np

from pykmesh.contracts.address import (
    FieldError,
    Remembered,
    Service,
    Workload,
    decode_address,
    network_name,
    service_ports,
)
from pykmesh.contracts.wire import Bools, Buffer, Fields, Spans, grouped
from pykmesh.kernel.records import V4_PREFIX
from pykmesh.proto.workload_pb2 import AddressOutline
from pykmesh.proto.workload_pb2 import WorkloadOutline as Of

FEWEST: Final = 16
"""Fewer are faster one by one."""
MANY: Final = 4096
"""About as many as are fastest together."""
_T = TypeVar("_T")

_networks: Final[Remembered[Any]] = Remembered(lambda data: network_name("workload.network", data.decode()))
_names: Final[Remembered[Any]] = Remembered(lambda data: intern(data.decode()))


def decode_addresses(values: Sequence[bytes]) -> list[Service | Workload | FieldError]:
    """In the order of `values`; one that cannot be used is there as the error that says why."""
    found: list[Service | Workload | FieldError] = _mixed(values, _workloads, decode_address)
    return found


def names_of(values: Sequence[bytes]) -> list[str | FieldError]:
    """The name that each must have as a resource; for one that cannot be used the error that says why."""
    return _mixed(values, _uids, _name)


def _mixed(
    values: Sequence[bytes],
    many: Callable[[Buffer, Fields, Iterable[bytes]], Sequence[_T]],
    one: Callable[[bytes], _T],
) -> list[_T | FieldError]:
    """Ordinary workloads by `many`, everything else by `one`."""
    if len(values) < FEWEST:
        return [_or_error(one, value) for value in values]
    buffer = Buffer(values)
    outer = buffer.fields(buffer.spans)
    plain = outer.only(AddressOutline.WORKLOAD_FIELD_NUMBER)
    fields = buffer.fields(outer.spans(AddressOutline.WORKLOAD_FIELD_NUMBER).where(plain))
    try:
        found = many(buffer, fields, compress(values, plain))
    except (ValueError, FieldError):
        return [_or_error(one, value) for value in values]
    plain[plain] = usual = _usual(fields)
    ordinary = compress(found, usual)
    return [
        next(ordinary) if is_plain else _or_error(one, value)
        for value, is_plain in zip(values, plain.tolist(), strict=True)
    ]


def _or_error(one: Callable[[bytes], _T], value: bytes) -> _T | FieldError:
    try:
        return one(value)
    except FieldError as error:
        return error


def _name(value: bytes) -> str:
    found = decode_address(value)
    return found.uid if isinstance(found, Workload) else found.name


def _workloads(buffer: Buffer, fields: Fields, raws: Iterable[bytes]) -> list[Workload]:
    """As `decode_address` reads them, but for its checks. Raises what the texts in them raise."""
    waypoints, _ = fields.repeated(Of.WAYPOINT_FIELD_NUMBER)
    address_counts, addresses = fields.repeated(Of.ADDRESSES_FIELD_NUMBER)
    service_counts, services = fields.repeated(Of.SERVICES_FIELD_NUMBER)
    policy_counts, policies = fields.repeated(Of.AUTHORIZATION_POLICIES_FIELD_NUMBER)
    return list(
        map(
            Workload,
            map(bytes.decode, buffer.parts(fields.spans(Of.UID_FIELD_NUMBER))),
            map(_networks.__getitem__, buffer.parts(fields.spans(Of.NETWORK_FIELD_NUMBER))),
            grouped(address_counts, buffer.padded(addresses, V4_PREFIX + bytes(4))),
            grouped(service_counts, map(service_ports.__getitem__, buffer.parts(services))),
            (fields.numbers(Of.STATUS_FIELD_NUMBER) == 0).tolist(),
            (fields.numbers(Of.NETWORK_MODE_FIELD_NUMBER) == 1).tolist(),
            (waypoints > 0).tolist(),
            (fields.numbers(Of.TUNNEL_PROTOCOL_FIELD_NUMBER) == 1).tolist(),
            repeat(1),
            grouped(policy_counts, map(bytes.decode, buffer.parts(policies))),
            map(_names.__getitem__, buffer.parts(fields.spans(Of.NAMESPACE_FIELD_NUMBER))),
            raws,
        )
    )


def _uids(buffer: Buffer, fields: Fields, _: Iterable[bytes]) -> list[str]:
    """What `_workloads` reads is read here too, for its errors; much of it is the same in all."""
    texts: tuple[tuple[Remembered[Any], Spans], ...] = (
        (_networks, fields.spans(Of.NETWORK_FIELD_NUMBER)),
        (service_ports, fields.repeated(Of.SERVICES_FIELD_NUMBER)[1]),
        (_names, fields.spans(Of.NAMESPACE_FIELD_NUMBER)),
        (_names, fields.repeated(Of.AUTHORIZATION_POLICIES_FIELD_NUMBER)[1]),
    )
    for remembered, spans in texts:
        for part in set(buffer.parts(spans)):
            _ = remembered[part]
    return list(map(bytes.decode, buffer.parts(fields.spans(Of.UID_FIELD_NUMBER))))


def _usual(fields: Fields) -> Bools:
    """Which workloads need no look by `decode_address`: neither wrong nor rare."""
    status, mode = fields.numbers(Of.STATUS_FIELD_NUMBER), fields.numbers(Of.NETWORK_MODE_FIELD_NUMBER)
    tunnel, uid = fields.numbers(Of.TUNNEL_PROTOCOL_FIELD_NUMBER), fields.spans(Of.UID_FIELD_NUMBER)
    weighted = fields.spans(Of.CAPACITY_FIELD_NUMBER).start > 0
    usual = ~fields.odd & ~weighted & (status <= 1) & (mode <= 1) & (tunnel <= 1) & (uid.end > uid.start)
    counts, addresses = fields.repeated(Of.ADDRESSES_FIELD_NUMBER)
    lengths = addresses.end - addresses.start
    usual[np.repeat(np.arange(len(counts)), counts)[(lengths != 4) & (lengths != 16)]] = False
    return usual
