"""Publishes the log, hears map_writer's reports, and serves snapshots.

A response's batches are published as fast as map_writer follows, `in_flight_batches` ahead at most;
when nobody follows, they are published as they are and the reader takes a snapshot later.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice

import anyio
import anyio.to_thread
import structlog

from pykmesh import tracing
from pykmesh.bus import Bus, BusUnavailableError, Headers
from pykmesh.contracts import messages
from pykmesh.contracts.messages import (
    BATCH_BYTES,
    NO_NAME,
    REFUSED_NAMED,
    ConfigBatch,
    ContractError,
    MapReport,
    RefusedReply,
    RefusedRequest,
    Resource,
    ResourceType,
    SnapshotRequest,
    Subject,
)
from services.xds_client.protocol import Reading
from services.xds_client.store import Held, Store, pages

log = structlog.get_logger(__name__)

HEARTBEAT_S = 1.0
AWAY_AFTER_S = 3.0
PACE_DEADLINE_S = 1.5
MANY_RESOURCES = 1000


class Publisher:
    """The only publisher of the log."""

    def __init__(self, store: Store, bus: Bus, in_flight: int, grace_s: float) -> None:
        """`grace_s`: how long from now a map_writer that is not heard is taken to be starting."""
        self._store = store
        self._bus = bus
        self._in_flight = in_flight
        self._turn = asyncio.Lock()
        self._reported = asyncio.Event()
        self.report: MapReport | None = None
        self.last_report = 0.0
        self._started = time.monotonic()
        self._grace_s = grace_s

    async def start(self) -> None:
        await self._bus.subscribe(Subject.MAP_REPORT, self._hear)
        await self._bus.serve(Subject.CONFIG_SNAPSHOT, self._snapshot)

    async def _hear(self, data: bytes, _: Headers) -> None:
        try:
            self.report = messages.decode(MapReport, data)
        except ContractError as error:
            log.error("report_not_understood", error=str(error))
            return
        self.last_report = time.monotonic()
        self._look_again()

    def _look_again(self) -> None:
        """For those who wait for a report, or until none is to be expected."""
        self._reported.set()
        self._reported = asyncio.Event()

    async def _snapshot(self, data: bytes) -> bytes:
        """No byte for a cursor that is none any more: the reader starts again. Raises ContractError."""
        page = self._store.snapshot(messages.decode(SnapshotRequest, data).cursor)
        return messages.encode(page) if page else b""

    @property
    def map_writer_is_there(self) -> bool:
        return self._bus.connected and time.monotonic() - self.last_report < AWAY_AFTER_S

    @property
    def _may_report(self) -> bool:
        """map_writer is there, or may be starting as this process is."""
        starting = self.report is None and time.monotonic() - self._started < self._grace_s
        return self.map_writer_is_there or starting

    @property
    def refused(self) -> dict[str, str]:
        """What does not fit, as far as a report names it."""
        if self.report is None or self.report.epoch != self._store.epoch:
            return {}
        return self.report.refused

    @property
    def refused_count(self) -> int:
        """How many there are, named or not."""
        refused = self.refused
        return max(len(refused), self.report.refused_count) if refused and self.report else 0

    async def refused_of(self, names: Collection[str]) -> dict[str, str] | None:
        """Of these, what does not fit and which limit was met; None when map_writer does not say.

        Where more do not fit than a report names, it is asked.
        """
        known = self.refused
        if not known:
            return {}
        if self.refused_count == len(known):
            return {name: known[name] for name in names if name in known}
        if not self.map_writer_is_there:
            return None
        found: dict[str, str] = {}
        for page in batched(names, REFUSED_NAMED):
            request = messages.encode(RefusedRequest(messages.VERSION, page))
            try:
                reply = messages.decode(RefusedReply, await self._bus.request(Subject.MAP_REFUSED, request))
            except (BusUnavailableError, ContractError) as error:
                log.warning("refusals_not_told", error=str(error))
                return None
            found |= reply.refused
        return found

    @property
    def not_in_kernel(self) -> int:
        """How many batches map_writer has not said to be in the maps: all, while it follows another epoch."""
        follows = self.report is not None and self.report.epoch == self._store.epoch
        return self._store.seq - (self.report.applied_seq if self.report and follows else 0)

    async def publish(self, reading: Reading) -> int:
        """Stores what is good in a response and publishes what of it is new, while it is read.

        Returns the number of the last batch. A stream that ends meanwhile does not cut it short: what
        is stored and not published would never be, since it is no news when it comes again.
        """
        with anyio.CancelScope(shield=True):
            await self._publish_whole(reading)
        return self._store.seq

    async def _publish_whole(self, reading: Reading) -> None:
        async with self._turn:
            self._store.in_response = True
            with tracing.span("xds_client publish") as span:
                began = time.perf_counter()
                changed = await self._publish(reading, tracing.headers())
                if changed > MANY_RESOURCES:
                    took_ms = round((time.perf_counter() - began) * 1e3)
                    log.info("response_published", resources=changed, took_ms=took_ms)
                span.set_attributes({"pykmesh.changed": changed, "pykmesh.type": reading.type_url})

    async def _publish(self, reading: Reading, headers: Headers) -> int:
        store, kind, first = self._store, reading.type, self._store.seq
        removed = await self._remove(kind, reading.removed, headers)
        waiting: list[Resource] = []
        count = size = 0
        parts = reading.parts()
        while (part := await _next_part(reading, parts)) is not None:
            fresh = store.put(kind, part)
            count += len(fresh)
            for resource in fresh:
                waiting.append(resource)
                size += len(resource.value)
                if size >= BATCH_BYTES:
                    await self._send(store.batch(kind, removed, waiting, complete=False), headers)
                    await self._keep_pace(store.seq)
                    removed, waiting, size = [], [], 0
        removed += await self._remove(kind, reading.absent(store.held[kind]), headers)
        removed += store.remove(kind, reading.unspoken(store.rejected[kind], store.held[kind]))
        named = chain(reading.names, reading.removed, (NO_NAME,))
        news = reading.rejected.keys() - store.rejected[kind].keys()
        store.note_rejected(kind, named, reading.rejected, is_all=reading.says_all)
        was_synced = store.synced
        store.answered.add(kind)
        is_awaited, store.in_response, store.was_asked_in_response = store.was_asked_in_response, False, False
        if removed or waiting or news or is_awaited or store.seq != first or was_synced != store.synced:
            *early, rejected = pages((name, len(name)) for name in reading.rejected)
            for names in early:
                batch = store.batch(kind, removed, waiting, complete=False, rejected=names)
                await self._send(batch, headers)
                removed, waiting = [], []
            last = store.batch(kind, removed, waiting, complete=True, rejected=rejected)
            await self._send(last, headers)
        return count

    async def _remove(self, kind: ResourceType, names: list[str], headers: Headers) -> list[str]:
        """Returns the names that go with the next batch; where they are many, the others are published."""
        *early, last = pages((name, len(name)) for name in self._store.remove(kind, names))
        for page in early:
            await self._send(self._store.batch(kind, page, [], complete=False), headers)
        return last

    async def _send(self, batch: ConfigBatch, headers: Headers) -> None:
        try:
            await self._bus.publish(Subject.CONFIG_LOG, messages.encode(batch), headers)
        except BusUnavailableError:
            log.debug("batch_dropped", seq=batch.seq)

    async def _keep_pace(self, seq: int) -> None:
        """Waits while map_writer is there and too far behind; one that makes no step is not waited for."""
        with anyio.move_on_after(PACE_DEADLINE_S):
            while self.map_writer_is_there and not self._has(seq - self._in_flight, received=True):
                await self._reported.wait()

    def _has(self, seq: int, *, received: bool = False) -> bool:
        """Whether map_writer says that it received, or applied, a batch. There is none before 1."""
        report = self.report
        if seq <= 0:
            return True
        if report is None or report.epoch != self._store.epoch:
            return False
        return (report.received_seq if received else report.applied_seq) >= seq

    async def until_applied(self, seq: int, deadline_s: float) -> bool:
        """True once the maps hold what was published; False when map_writer is away or late.

        That it is late is seen at the next heartbeat: a timer for each change costs more than its wait.
        """
        until = time.monotonic() + deadline_s
        while self._may_report and not self._has(seq) and time.monotonic() < until:
            await self._reported.wait()
        return self._has(seq)

    async def heartbeat(self) -> None:
        """Repeats the head of the log, so that a reader notices what it missed. Runs until cancelled."""
        while True:
            self._look_again()
            await self._send(self._store.heartbeat(), {})
            await anyio.sleep(HEARTBEAT_S)


def batched(names: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(names)
    while page := list(islice(rest, size)):
        yield page


async def _next_part(
    reading: Reading, parts: Iterator[list[tuple[str, Held]]]
) -> list[tuple[str, Held]] | None:
    """A large response's in a thread, so that heartbeats and probes go on."""
    return await anyio.to_thread.run_sync(next, parts, None) if reading.is_large else next(parts, None)
