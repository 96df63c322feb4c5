"""Drains the ring: records become sums, a group of like records at a time.

Owns the reader and the turn of the loop. The records are grouped by numpy, so the cost of Python is
paid for each group and not for each record; a turn is bounded, and what is left waits in the ring.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import anyio
import numpy as np
import numpy.typing as npt

from pykmesh.kernel.layout import Direction, FlowKind
from pykmesh.kernel.records import Ip
from pykmesh.kernel.ring import RingReader
from services.telemetry.labels import CONNECT_FAILED, NO_FLAGS, Edge, refusal_flags
from services.telemetry.ledger import Amounts, Ledger

TURN_RECORDS: Final = 8192
IDLE_S: Final = 0.08
KNOWN_MAX: Final = 131_072
IPPROTO_TCP: Final = 6

Records = npt.NDArray[np.void]

# local, remote, service; then reason, kind, direction, protocol, established, and whether it was opened
# before the counters of opens were looked at: the bits of one word.
_KEY: Final = struct.Struct("<16s16sQHBBBBBx")
_WORDS: Final = _KEY.size // 8
_SPREAD: Final = np.random.default_rng().integers(1, 1 << 63, _WORDS, np.uint64) | np.uint64(1)


class Group(NamedTuple):
    """Records that are counted alike. Bytes as the socket saw them."""

    key: bytes
    records: int
    sent_bytes: int
    received_bytes: int


class Meaning(NamedTuple):
    """What a group's key says; no edge: it is none of Istio's TCP metrics."""

    edge: Edge | None
    established: bool
    opened_before: bool
    """The counters of opens do not tell of it: it counts as opened at its close."""


def _address_words(records: Records, field: str) -> npt.NDArray[np.uint64]:
    """Sixteen bytes as two words."""
    return np.ascontiguousarray(records[field]).view(np.uint64).reshape(-1, 2)


def _keys(records: Records, opens_since_ns: int) -> npt.NDArray[np.uint64]:
    keys = np.empty((len(records), _WORDS), np.uint64)
    keys[:, 0:2] = _address_words(records, "local")
    keys[:, 2:4] = _address_words(records, "remote")
    keys[:, 4] = records["service"]
    meta = keys[:, 5]
    meta[:] = records["reason"]
    for shift, field in ((16, "kind"), (24, "direction"), (32, "protocol"), (40, "established")):
        meta |= records[field].astype(np.uint64) << np.uint64(shift)
    meta |= (records["opened_ns"] < np.uint64(opens_since_ns)).astype(np.uint64) << np.uint64(48)
    return keys


def group(records: Records, opens_since_ns: int) -> Iterator[Group]:
    """Groups in no order; a key may come more than once (when the hash that sorts meets another's)."""
    if not len(records):
        return
    keys = _keys(records, opens_since_ns)
    order = np.argsort(((keys ^ (keys >> np.uint64(32))) * _SPREAD).sum(axis=1))
    keys = keys[order]
    starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
    counts = np.diff(np.r_[starts, len(keys)]).tolist()
    sent = np.add.reduceat(records["sent_bytes"][order], starts).tolist()
    received = np.add.reduceat(records["received_bytes"][order], starts).tolist()
    packed = keys[starts].view(f"V{_KEY.size}").ravel().tolist()
    yield from map(Group, packed, counts, sent, received)


def meaning(key: bytes) -> Meaning:
    local, remote, service, reason, kind, direction, protocol, established, opened_before = _KEY.unpack(key)
    edge = None
    if protocol == IPPROTO_TCP:
        flags = NO_FLAGS if established else CONNECT_FAILED
        if kind == FlowKind.REFUSED:
            flags = refusal_flags(reason)
        edge = Edge(Ip(local), Ip(remote), service, direction, flags)
    return Meaning(edge, bool(established), bool(opened_before))


def amounts(found: Group, known: Meaning) -> Amounts:
    """A client's socket sends the request and receives the response, a server's the other way round."""
    if not known.established:
        return Amounts(failed=found.records)
    request, response = found.sent_bytes, found.received_bytes
    if known.edge is not None and known.edge.direction == Direction.INBOUND:
        request, response = response, request
    opened = found.records if known.opened_before else 0
    return Amounts(opened, found.records, request_bytes=request, response_bytes=response)


class Drain:
    """The loop from the ring to the ledger; `publish` sees each batch before its room is given back."""

    def __init__(
        self, ring: RingReader, ledger: Ledger[Edge, Amounts], publish: Callable[[Records], None]
    ) -> None:
        self.ring = ring
        self._ledger = ledger
        self._publish = publish
        self._known: dict[bytes, Meaning] = {}
        self.opens_since_ns = 0
        """What opened before is not in the counters of opens (`opens.Opens`)."""
        self.drained = 0
        self.largest_turn = 0

    async def run(self, interval_s: float) -> None:
        """Until cancelled. Where nothing comes it looks less and less often, down to every `IDLE_S`."""
        pause_s = interval_s
        while True:
            found = self.turn()
            pause_s = interval_s if found else min(2 * pause_s, max(IDLE_S, interval_s))
            await anyio.sleep(0 if found == TURN_RECORDS else pause_s)

    def turn(self, max_n: int = TURN_RECORDS) -> int:
        """Takes at most `max_n` records; returns how many."""
        records = self.ring.take(max_n)
        if len(records):
            self._publish(records)
            for found in group(records, self.opens_since_ns):
                self._count(found)
            self.ring.advance(len(records))
            self.drained += len(records)
            self.largest_turn = max(self.largest_turn, len(records))
        return len(records)

    def _count(self, found: Group) -> None:
        known = self._known.get(found.key)
        if known is None:
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            known = self._known[found.key] = meaning(found.key)
        if known.edge is not None:
            self._ledger.add(known.edge, amounts(found, known))

    def status(self) -> dict[str, Any]:
        return {
            "drained": self.drained,
            "largest_turn": self.largest_turn,
            "not_understood": self.ring.skipped,
            "lag_bytes": self.ring.lag_bytes,
            "size_bytes": self.ring.size_bytes,
        }
