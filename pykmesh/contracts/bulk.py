"""Many addresses decoded together: what `decode_address` says of each, several times as fast.

Ordinary workloads are read from columns (`pykmesh.contracts.wire`); services, and whatever is rare or
wrong, go through `decode_address` one by one, which knows what to say of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress, repeat
from sys import intern
from typing import Final

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
from pykmesh.contracts.wire import Bools, Buffer, Fields, grouped
from pykmesh.kernel.records import V4_PREFIX
from pykmesh.proto.workload_pb2 import AddressOutline
from pykmesh.proto.workload_pb2 import WorkloadOutline as Of

FEWEST: Final = 16
"""Fewer are faster one by one."""
MANY: Final = 4096
"""About as many as are fastest together."""
Decoded = Service | Workload | FieldError

_networks: Final = Remembered(lambda data: network_name("workload.network", data.decode()))
_names: Final = Remembered(lambda data: intern(data.decode()))


def decode_addresses(values: Sequence[bytes]) -> list[Decoded]:
    """In the order of `values`; one that cannot be used is there as the error that says why."""
    if len(values) < FEWEST:
        return [_decode(value) for value in values]
    buffer = Buffer(values)
    outer = buffer.fields(buffer.spans)
    plain = outer.only(AddressOutline.WORKLOAD_FIELD_NUMBER)
    bodies = outer.spans(AddressOutline.WORKLOAD_FIELD_NUMBER).where(plain)
    fields = buffer.fields(bodies)
    try:
        workloads = _workloads(buffer, fields, compress(values, plain))
    except (ValueError, FieldError):
        return [_decode(value) for value in values]
    plain[plain] = usual = _usual(fields)
    usual_workloads = compress(workloads, usual)
    return [
        next(usual_workloads) if is_plain else _decode(value)
        for value, is_plain in zip(values, plain.tolist(), strict=True)
    ]


def _decode(value: bytes) -> Decoded:
    try:
        return decode_address(value)
    except FieldError as error:
        return error


def _workloads(buffer: Buffer, fields: Fields, raws: Iterable[bytes]) -> list[Workload]:
    """As `decode_address` reads them, but for its checks. Raises what the texts in them raise."""
    waypoint = fields.spans(Of.WAYPOINT_FIELD_NUMBER)
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
            (waypoint.end > waypoint.start).tolist(),
            (fields.numbers(Of.TUNNEL_PROTOCOL_FIELD_NUMBER) == 1).tolist(),
            repeat(1),
            grouped(policy_counts, map(bytes.decode, buffer.parts(policies))),
            map(_names.__getitem__, buffer.parts(fields.spans(Of.NAMESPACE_FIELD_NUMBER))),
            raws,
        )
    )


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
