"""Records as the flows that people read. Pure: the names are given."""

from __future__ import annotations

import errno
from collections import namedtuple
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pykmesh.contracts.flows import Flow, FlowService, Peer
from pykmesh.contracts.messages import ServiceName, WorkloadName, service_name
from pykmesh.kernel.layout import Direction, FlowKind, Reason, dtype
from pykmesh.kernel.records import NO_IP, Ip, ip_to_text

PROTOCOLS: Final = {6: "TCP", 17: "UDP"}
VERDICTS: Final = ("closed", "failed", "refused")

ServiceNames = Callable[[int, float], ServiceName | None]
WorkloadNames = Callable[[Ip, float], WorkloadName | None]
"""Whose it was then, in seconds of CLOCK_MONOTONIC."""


Mask = npt.NDArray[np.bool_]


def verdict_mask(records: npt.NDArray[np.void], verdict: str) -> Mask:
    """Which records have this verdict."""
    refused: Mask = records["kind"] == FlowKind.REFUSED
    if verdict == "refused":
        return refused
    established: Mask = (records["established"] != 0) == (verdict == "closed")
    return ~refused & established


def protocol_mask(records: npt.NDArray[np.void], protocol: str) -> Mask:
    numbers = [number for number, name in PROTOCOLS.items() if name == protocol.upper()]
    return np.isin(records["protocol"], numbers)


def wall_time(ns: int) -> str:
    """RFC 3339, UTC, of nanoseconds since the epoch."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"


_Row = namedtuple("_Row", dtype("flow_record").names or ())  # type: ignore[misc]  # noqa: PYI024


def flows(
    records: npt.NDArray[np.void], service: ServiceNames, workload: WorkloadNames, wall_offset_ns: int
) -> list[Flow]:
    """`wall_offset_ns`: wall time less CLOCK_MONOTONIC, the clock of the programs."""
    return [_flow(_Row(*row), service, workload, wall_offset_ns) for row in records.tolist()]


def _flow(row: Any, service: ServiceNames, workload: WorkloadNames, wall_offset_ns: int) -> Flow:
    is_outbound = row.direction == Direction.OUTBOUND
    then = row.closed_ns / 1e9
    own = _peer(row.local, row.local_port, then, workload)
    other = _peer(row.remote, row.remote_port, then, workload)
    counted = row.protocol != 17
    sent, received = (row.sent_bytes, row.received_bytes) if counted else (None, None)
    return Flow(
        time=wall_time(row.closed_ns + wall_offset_ns),
        verdict=_verdict(row),
        reason=_reason(row),
        direction="outbound" if is_outbound else "inbound",
        protocol=PROTOCOLS.get(row.protocol, str(row.protocol)),
        source=own if is_outbound else other,
        service=_service(row, then, service) if row.service else _service_at(row, then, workload),
        destination=other if is_outbound else own,
        sent_bytes=sent if is_outbound else received,
        received_bytes=received if is_outbound else sent,
        duration_ms=round((row.closed_ns - row.opened_ns) / 1e6, 3),
        srtt_us=row.srtt_us,
        retransmits=row.retransmits,
    )


def _verdict(row: Any) -> str:
    if row.kind == FlowKind.REFUSED:
        return "refused"
    return "closed" if row.established else "failed"


def _reason(row: Any) -> str:
    if row.kind != FlowKind.REFUSED:
        return errno.errorcode.get(row.error, str(row.error)) if row.error else ""
    try:
        return Reason(row.reason).label
    except ValueError:
        return str(row.reason)


def _peer(ip: Ip, port: int, then: float, workload: WorkloadNames) -> Peer:
    if ip == NO_IP:
        return Peer(address="", port=port or None, workload="", namespace="")
    name = workload(ip, then)
    return Peer(
        address=ip_to_text(ip),
        port=port or None,
        workload=name.name if name else "",
        namespace=name.namespace if name else "",
    )


def _service(row: Any, then: float, service: ServiceNames) -> FlowService:
    name = service(row.service, then)
    if name is None:
        return FlowService(name=ip_to_text(row.vip), namespace="", port=row.vip_port)
    return FlowService(name=name.name, namespace=name.namespace, port=name.port)


def _service_at(row: Any, then: float, workload: WorkloadNames) -> FlowService | None:
    """The service whose own address was asked for, at a port that it does not serve."""
    asked = workload(row.remote, then) if row.direction == Direction.OUTBOUND else None
    if asked is None or not asked.is_service:
        return None
    name = service_name(asked.service, row.remote_port)
    return FlowService(name=name.name, namespace=name.namespace, port=name.port)
