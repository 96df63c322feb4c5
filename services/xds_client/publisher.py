"""Publishes the log, hears map_writer's reports, and serves snapshots.

A response's batches are published as fast as map_writer follows, `in_flight_batches` ahead at most;
when nobody follows, they are published as they are and the reader takes a snapshot later.
"""

from __future__ import annotations

import time

import anyio
import structlog

from pykmesh import tracing
from pykmesh.bus import Bus, BusUnavailableError, Headers
from pykmesh.contracts import messages
from pykmesh.contracts.messages import ConfigBatch, ContractError, MapReport, SnapshotRequest, Subject
from services.xds_client.protocol import Accepted
from services.xds_client.store import Store

log = structlog.get_logger(__name__)

HEARTBEAT_S = 1.0
AWAY_AFTER_S = 3.0


class Publisher:
    """The only publisher of the log."""

    def __init__(self, store: Store, bus: Bus, in_flight: int) -> None:
        self._store = store
        self._bus = bus
        self._in_flight = in_flight
        self._turn = anyio.Lock()
        self._reported = anyio.Event()
        self.report: MapReport | None = None
        self.last_report = 0.0

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
        self._reported.set()
        self._reported = anyio.Event()

    async def _snapshot(self, data: bytes) -> bytes:
        """An empty answer to what cannot be served: the reader finds it is no page, and starts again."""
        try:
            request = messages.decode(SnapshotRequest, data)
        except ContractError as error:
            log.error("snapshot_request_not_understood", error=str(error))
            return b""
        page = self._store.snapshot(request.cursor)
        return messages.encode(page) if page else b""

    @property
    def map_writer_is_there(self) -> bool:
        return self._bus.connected and time.monotonic() - self.last_report < AWAY_AFTER_S

    @property
    def refused(self) -> dict[str, str]:
        if self.report is None or self.report.epoch != self._store.epoch:
            return {}
        return self.report.refused

    async def publish(self, accepted: Accepted) -> int:
        """Stores what was accepted and publishes what of it is new. Returns the last batch's number."""
        async with self._turn:
            gone, changed = self._store.apply(accepted.type, accepted.removed, accepted.upserts)
            was_synced = self._store.synced
            self._store.answered.add(accepted.type)
            if not gone and not changed and was_synced == self._store.synced:
                return self._store.seq
            with tracing.tracer.start_as_current_span("xds_client publish") as span:
                span.set_attributes({"pykmesh.removed": len(gone), "pykmesh.changed": len(changed)})
                headers = tracing.headers()
                for batch in self._store.batches(accepted.type, gone, changed):
                    await self._send(batch, headers)
                    await self._keep_pace(batch.seq)
            return self._store.seq

    async def _send(self, batch: ConfigBatch, headers: Headers) -> None:
        try:
            await self._bus.publish(Subject.CONFIG_LOG, messages.encode(batch), headers)
        except BusUnavailableError:
            log.debug("batch_dropped", seq=batch.seq)

    async def _keep_pace(self, seq: int) -> None:
        """Waits while map_writer is there and too far behind."""
        while self.map_writer_is_there and not self._has(seq - self._in_flight, received=True):
            with anyio.move_on_after(AWAY_AFTER_S):
                await self._reported.wait()

    def _has(self, seq: int, *, received: bool = False) -> bool:
        """Whether map_writer says that it received, or applied, a batch; batches from 0 down are no batches."""
        report = self.report
        if seq <= 0:
            return True
        if report is None or report.epoch != self._store.epoch:
            return False
        return (report.received_seq if received else report.applied_seq) >= seq

    async def until_applied(self, seq: int, deadline_s: float) -> bool:
        """True once the maps hold what was published; False when map_writer is away or does not get there in time."""
        with anyio.move_on_after(deadline_s):
            while self.map_writer_is_there and not self._has(seq):
                with anyio.move_on_after(AWAY_AFTER_S):
                    await self._reported.wait()
        return self._has(seq)

    async def heartbeat(self) -> None:
        """Repeats the head of the log, so that a reader notices what it missed. Runs until cancelled."""
        while True:
            await self._send(self._store.heartbeat(), {})
            await anyio.sleep(HEARTBEAT_S)
