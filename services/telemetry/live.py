"""Live flows: the last records, and whoever follows.

Owns a bounded array of the last records and one bounded queue for each follower. Records stay rows of
the kernel until somebody asks; a follower that is too slow loses the newest, and is told how many.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import anyio
import msgspec
import numpy as np

from pykmesh.admin import Page, Query, as_json
from pykmesh.contracts.flows import Lost, LostLine
from pykmesh.kernel.layout import dtype
from pykmesh.kernel.records import Ip
from services.telemetry.flows import Records
from services.telemetry.names import Names
from services.telemetry.shapes import VERDICTS, flows, protocol_mask, verdict_mask, wall_time

FOLLOWERS_MAX: Final = 16
QUEUE_RECORDS: Final = 8192
CHUNK: Final = 256
"""Records that become text in one turn of the loop: some milliseconds."""
PACE_S: Final = 0.02
"""Between the turns of one follower: so much of a flood becomes text, the rest is counted as lost."""
HEARTBEAT_S: Final = 2.0
"""A blank line so often: a reader that has gone is noticed by it."""
LOST_INTERVAL_S: Final = 1.0
NAMES_WAIT_S: Final = 1.0

_encode = msgspec.json.Encoder()


class Tail:
    """The last records, oldest first."""

    def __init__(self, limit: int) -> None:
        self._rows = np.zeros(max(limit, 1), dtype("flow_record"))
        self._next = 0
        self._held = 0

    def push(self, records: Records) -> None:
        size = len(self._rows)
        kept = records[-size:]
        first = min(len(kept), size - self._next)
        self._rows[self._next : self._next + first] = kept[:first]
        self._rows[: len(kept) - first] = kept[first:]
        self._next = (self._next + len(kept)) % size
        self._held = min(self._held + len(kept), size)

    def rows(self) -> Records:
        """A copy."""
        return np.roll(self._rows, -self._next)[len(self._rows) - self._held :]


class Filter:
    """What can be told from a record alone; the reader does the rest."""

    def __init__(self, query: Query) -> None:
        """ValueError for a verdict that there is not."""
        self._verdicts = [v for v in query.get("verdict", "").split(",") if v]
        self._protocols = [p for p in query.get("protocol", "").split(",") if p]
        for verdict in self._verdicts:
            if verdict not in VERDICTS:
                raise ValueError(f"verdict {verdict!r}: one of {', '.join(VERDICTS)}")

    def __call__(self, records: Records) -> Records:
        keep = np.ones(len(records), np.bool_)
        if self._verdicts:
            keep &= np.logical_or.reduce([verdict_mask(records, v) for v in self._verdicts])
        if self._protocols:
            keep &= np.logical_or.reduce([protocol_mask(records, p) for p in self._protocols])
        return records[keep]


class Follower:
    """A queue of records and what did not fit it."""

    def __init__(self, keep: Filter, limit: int = QUEUE_RECORDS) -> None:
        self._keep = keep
        self._limit = limit
        self._queue: deque[Records] = deque()
        self._held = 0
        self._filled = anyio.Event()
        self.lost: dict[str, int] = {}
        """By where: what the reader has not been told yet."""

    def offer(self, records: Records) -> int:
        """Keeps what fits; returns how many did not."""
        wanted = self._keep(records)
        taken = wanted[: self._limit - self._held]
        if len(taken):
            # The rows lie in the ring, or in what was copied out of it for all followers.
            self._queue.append(taken.copy())
            self._held += len(taken)
            self._filled.set()
        missed = len(wanted) - len(taken)
        if missed:
            self.note_lost("observer", missed)
        return missed

    def note_lost(self, where: str, count: int) -> None:
        self.lost[where] = self.lost.get(where, 0) + count
        self._filled.set()

    def take(self, max_n: int) -> Records | None:
        if not self._queue:
            self._filled = anyio.Event()
            return None
        rows = self._queue.popleft()
        if len(rows) > max_n:
            self._queue.appendleft(rows[max_n:])
            rows = rows[:max_n]
        self._held -= len(rows)
        return rows

    async def wait(self, deadline_s: float) -> None:
        """Until there is something to take or to tell, or the time is over."""
        with anyio.move_on_after(deadline_s):
            await self._filled.wait()


class Live:
    """`publish` is called with each batch, in the loop that drains."""

    def __init__(self, names: Names, buffer: int) -> None:
        self._names = names
        self._tail = Tail(buffer)
        # A follower is held by its answer alone: it goes when the connection does.
        self._followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self.lost = 0

    def publish(self, records: Records) -> None:
        self._tail.push(records)
        for follower in self._followers:
            self.lost += follower.offer(records)

    def note_unrecorded(self, count: int) -> None:
        """Flows that the programs could not record."""
        for follower in self._followers:
            follower.note_lost("ring", count)

    async def page(self, query: Query) -> Page:
        """`/flows?last=N&follow=1&verdict=refused,failed&protocol=tcp`: NDJSON (pykmesh.contracts.flows)."""
        try:
            keep, last = Filter(query), _number(query.get("last", ""))
        except ValueError as error:
            return as_json({"error": str(error)}, 400)
        follows = query.get("follow", "") not in {"", "0"}
        if follows and len(self._followers) >= FOLLOWERS_MAX:
            return as_json({"error": f"{FOLLOWERS_MAX} follow already"}, 503)
        rows = keep(self._tail.rows())
        if last is not None or follows:
            rows = rows[max(len(rows) - (last or 0), 0) :]
        follower = None
        if follows:
            follower = Follower(keep)
            self._followers.add(follower)
        return Page(FlowStream(self._names, rows, follower), content_type="application/x-ndjson")

    def status(self) -> dict[str, Any]:
        return {"followers": len(self._followers), "lost": self.lost}


def _number(text: str) -> int | None:
    if text and not text.isdecimal():
        raise ValueError(f"last={text!r}: not a number")
    return int(text) if text else None


class FlowStream:
    """The lines of one answer, some at a time."""

    def __init__(self, names: Names, rows: Records, follower: Follower | None) -> None:
        self._names = names
        self._rows = rows
        self._follower = follower
        self._said_lost_at = 0.0

    def __aiter__(self) -> FlowStream:
        return self

    async def __anext__(self) -> bytes:
        if len(self._rows):
            rows, self._rows = self._rows[:CHUNK], self._rows[CHUNK:]
            return await self._lines(rows)
        if self._follower is None:
            raise StopAsyncIteration
        return await self._next(self._follower)

    async def _next(self, follower: Follower) -> bytes:
        await anyio.sleep(PACE_S)
        rows = follower.take(CHUNK)
        if rows is None and not self._may_say_lost(follower.lost):
            await follower.wait(HEARTBEAT_S)
            rows = follower.take(CHUNK)
        lost = self._lost_lines(follower)
        if rows is None:
            return lost or b"\n"
        return await self._lines(rows) + lost

    def _may_say_lost(self, lost: Mapping[str, int]) -> bool:
        return bool(lost) and time.monotonic() >= self._said_lost_at + LOST_INTERVAL_S

    def _lost_lines(self, follower: Follower) -> bytes:
        if not self._may_say_lost(follower.lost):
            return b""
        self._said_lost_at = time.monotonic()
        now = wall_time(time.time_ns())
        lost = [LostLine(Lost(time=now, where=where, flows=count)) for where, count in follower.lost.items()]
        follower.lost = {}
        return _encode.encode_lines(lost)

    async def _lines(self, rows: Records) -> bytes:
        addresses = {Ip(ip) for field in ("local", "remote") for ip in rows[field].tolist()}
        await self._names.settle(set(rows["service"].tolist()), addresses, NAMES_WAIT_S)
        offset = time.time_ns() - time.monotonic_ns()
        names = self._names
        return _encode.encode_lines(flows(rows, names.service_at, names.workload_at, offset))
