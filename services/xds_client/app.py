"""Wires xds_client: the stream's reader, the answers, the publisher, reconnecting.

Reading never waits for the maps: answers do, in a task of their own and in the order of responses.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from prometheus_client.core import Metric

from pykmesh import metrics, tracing
from pykmesh.contracts.settings import XdsClientSettings
from pykmesh.process import Runtime
from services.xds_client import connection, protocol
from services.xds_client.pace import Pace
from services.xds_client.pages import add_pages
from services.xds_client.publisher import Publisher
from services.xds_client.store import Store

log = structlog.get_logger(__name__)

BULK_BYTES = 1 << 20
ANSWERS_WAITING = 4096
WINDOW_BYTES = 1 << 16
"""What HTTP/2 lets be sent before the server takes any of it: less than that is always written."""
# Ends of a stream that are the server's ordinary business: age, restart, drain.
_ORDINARY = {
    grpc.StatusCode.OK,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
# The last is what grpc.aio says instead of the server's status when a write meets the end of a stream.
_ORDINARY_DETAILS = ("goaway", "transport", "internal error from core")


class Taken(NamedTuple):
    """A response that waits for its answer."""

    type_url: str
    nonce: str
    seq: int
    reading: protocol.Reading | None
    rejected: dict[str, str]


class XdsClient:
    """One conversation after another."""

    def __init__(self, runtime: Runtime[XdsClientSettings], store: Store, publisher: Publisher) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._store = store
        self._publisher = publisher
        self.connected = False
        self.control_plane = ""
        self.counts = {
            "responses": 0, "acks": 0, "unconfirmed_acks": 0, "nacks": 0, "streams": 0, "bytes": 0,
        }  # fmt: skip
        self.last_nack = ""
        self.last_response = 0.0
        self._understood = False
        """The present stream, or the last one, has brought a response that was understood."""
        self._confirmed = True
        """The last ACK was given for what the maps hold."""
        self._exhausted = False
        """A request was too large for the server, and none was understood since."""
        self._asked_bytes = 0
        """The largest request of those that opened the present stream, or the last one."""
        self._whole: set[str] = set()
        """Types of which the present stream's next response is the whole state."""
        self._begun: set[str] = set()
        """Types of which the present stream has brought a response."""
        self._freezes = False
        """A stream's first response was a large one."""

    async def run(
        self, pace: Pace | None = None, sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    ) -> None:
        """Runs until cancelled."""
        pace = pace or Pace()
        while True:
            self._understood = False
            ordinary = await self._converse()
            await sleep(pace.pause_s(understood=self._understood, ordinary=ordinary))

    async def _converse(self) -> bool:
        """One stream, from its first request to its end. True for an end that is no failure."""
        try:
            async with connection.open_channel(self._settings) as channel:
                stream = connection.open_stream(channel, self._settings)
                self.counts["streams"] += 1
                try:
                    return await self._follow(stream)
                finally:
                    self.connected = False
                    stream.cancel()
        except connection.CredentialsError as error:
            self._runtime.note_error("credentials_unreadable", error=error)
        except DecodeError as error:
            self._runtime.note_error(
                "response_not_understood", address=self._settings.xds_address, detail=error
            )
        except grpc.aio.AioRpcError as error:
            code, detail = error.code(), error.details()
            if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self._exhausted |= self._was_too_large(detail or "")
            if any(word in (detail or "").lower() for word in _ORDINARY_DETAILS) or (
                code in _ORDINARY and self._understood
            ):
                log.info("stream_ended", code=code.name, detail=detail)
                return True
            # Of an ordinary code, before anything came: a refusal. istiod without ambient says UNKNOWN.
            self._runtime.note_error(
                "stream_failed", address=self._settings.xds_address, code=code.name, detail=detail
            )
            return code in _ORDINARY
        return False

    async def _follow(self, stream: connection.Stream) -> bool:
        answers: asyncio.Queue[Taken] = asyncio.Queue(ANSWERS_WAITING)
        try:
            await self._open(stream)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._answer, stream, answers)
                await self._read(stream, answers)
                tasks.cancel_scope.cancel()
        except* (grpc.aio.AioRpcError, DecodeError) as group:
            raise group.exceptions[0] from None
        log.info("stream_ended", code="OK")
        return True

    async def _open(self, stream: connection.Stream) -> None:
        """A stream that ends while a large request is written may have been ended for its size.

        The server's status does not reach a write that meets it.
        """
        requests = self._first_requests()
        try:
            for request in requests:
                if not stream.done():
                    await stream.write(request)
        except grpc.aio.AioRpcError:
            self._exhausted |= self._asked_bytes > WINDOW_BYTES
            raise

    def _was_too_large(self, detail: str) -> bool:
        """Whether what opened the stream may be what exhausted the server: it also limits the rate so."""
        if "larger than max" in detail:
            return True
        return self._asked_bytes > WINDOW_BYTES and "rate limit" not in detail

    def _first_requests(self) -> list[protocol.Request]:
        bytes_max = 0 if self._exhausted else self._settings.max_request_bytes
        node = connection.node(self._settings)
        requests = list(protocol.first_requests(node, self._store, bytes_max))
        self._asked_bytes = max(request.ByteSize() for request in requests)
        self._whole, self._begun = protocol.types_unnamed(requests, self._store), set()
        if self._whole:
            log.info("stream_opened_without_versions", types=sorted(self._whole))
        return requests

    async def _read(self, stream: connection.Stream, answers: asyncio.Queue[Taken]) -> None:
        while True:
            data = await stream.read()
            if not isinstance(data, bytes):
                return
            self.connected = True
            self.counts["responses"] += 1
            self.counts["bytes"] += len(data)
            self.last_response = time.time()
            await answers.put(await self._take(data))
            if self._store.synced:
                self._runtime.readiness.done("control plane")

    async def _take(self, data: bytes) -> Taken:
        """Reads, checks, stores and publishes a response. Returns what its answer needs."""
        with tracing.span("xds_client response") as span:
            span.set_attribute("pykmesh.bytes", len(data))
            response = await self._parse(data)
            self.control_plane = response.control_plane.identifier or self.control_plane
            try:
                reading = protocol.Reading(
                    response,
                    is_whole=response.type_url in self._whole,
                    is_first=response.type_url not in self._begun,
                )
            except protocol.UnknownTypeError:
                rejected = {"type_url": f"{response.type_url!r} was not asked for"}
                return Taken(response.type_url, response.nonce, self._store.seq, None, rejected)
            self._understood, self._exhausted = True, False
            self._whole.discard(response.type_url)
            bulk = len(data) >= BULK_BYTES
            if bulk:
                gc.disable()
            try:
                seq = await self._publisher.publish(reading)
            finally:
                gc.enable()
            self._freezes |= bulk and response.type_url not in self._begun
            self._begun.add(response.type_url)
            return Taken(reading.type_url, reading.nonce, seq, reading, reading.rejected)

    @staticmethod
    async def _parse(data: bytes) -> protocol.Response:
        """A large response in a thread, so that heartbeats and probes go on."""
        if len(data) < BULK_BYTES:
            return protocol.parse(data)
        return await anyio.to_thread.run_sync(protocol.parse, data)

    async def _answer(self, stream: connection.Stream, answers: asyncio.Queue[Taken]) -> None:
        while True:
            taken = await answers.get()
            applied = await self._publisher.until_applied(taken.seq, self._settings.report_deadline_s)
            if stream.done():
                return  # the reader, which may be busy with a response still, is told why
            refused = await self._refused_by_node(taken.reading)
            rejected = taken.rejected | (refused or {})
            request = protocol.answer(taken.type_url, taken.nonce, rejected)
            if rejected:
                self.counts["nacks"] += 1
                self.last_nack = request.error_detail.message
                self._runtime.note_error(
                    "resources_rejected", count=len(rejected), detail=self.last_nack[:500]
                )
            else:
                self._count_ack(confirmed=applied and refused is not None)
            await stream.write(request)
            self._freeze()

    def _freeze(self) -> None:
        """What is alive now is not looked at again; cycles that were, and died since, are collected before.

        After a large response, when map_writer is done with it. Less than 0.1 s with a hundred thousand
        resources, which are themselves none of the collector's business.
        """
        if self._freezes:
            self._freezes = False
            gc.unfreeze()
            gc.collect()
            gc.freeze()

    def _count_ack(self, *, confirmed: bool) -> None:
        """One that is not confirmed was given because map_writer is late, or away."""
        self.counts["acks"] += 1
        if not confirmed:
            self.counts["unconfirmed_acks"] += 1
            if self._confirmed:
                log.info("acks_unconfirmed", not_in_kernel=self._publisher.not_in_kernel)
        self._confirmed = confirmed

    async def _refused_by_node(self, reading: protocol.Reading | None) -> dict[str, str] | None:
        """What of a response does not fit the maps; its versions are forgotten, so that it comes again.

        None when that cannot be told.
        """
        if reading is None:
            return {}
        found = await self._publisher.refused_of(reading.names)
        for name in found or ():
            self._store.forget_version(reading.type, name)
        return found

    def health(self) -> Iterator[Metric]:
        """What Prometheus is told of the process itself."""
        held = {kind.name.lower(): len(found) for kind, found in self._store.held.items()}
        yield metrics.gauge(
            "mesh_xds_connected", "1 while a stream to the control plane is open.", self.connected
        )
        yield metrics.by_label("mesh_xds_resources", "Accepted resources.", "type", held)
        yield metrics.counter("mesh_xds_push", "Responses of the control plane.", self.counts["responses"])
        yield metrics.counter(
            "mesh_xds_unconfirmed_acks",
            "ACKs given before the maps held what they accept: map_writer was late, or away.",
            self.counts["unconfirmed_acks"],
        )
        yield metrics.counter("mesh_xds_nack", "Responses answered with a NACK.", self.counts["nacks"])
        yield metrics.counter("mesh_xds_streams", "Streams opened.", self.counts["streams"])

    def status(self) -> dict[str, Any]:
        return {
            "xds_address": self._settings.xds_address,
            "connected": self.connected,
            "control_plane": self.control_plane,
            "synced": self._store.synced,
            "epoch": self._store.epoch,
            "seq": self._store.seq,
            "resources": {kind.name.lower(): len(held) for kind, held in self._store.held.items()},
            "last_response": self.last_response,
            "last_nack": self.last_nack,
            **self.counts,
            "map_writer": "there" if self._publisher.map_writer_is_there else "away",
            "not_in_kernel": self._publisher.not_in_kernel,
            "refused_by_node": self._publisher.refused,
            "refused_by_node_count": self._publisher.refused_count,
        }


async def run(runtime: Runtime[XdsClientSettings]) -> None:
    """Talks to the control plane until cancelled. Without a broker it waits: there is nobody to tell."""
    runtime.readiness.wait_for("control plane")
    bus = await runtime.connect_bus()
    store = Store()
    settings = runtime.settings
    publisher = Publisher(store, bus, settings.in_flight_batches, settings.map_writer_grace_s)
    client = XdsClient(runtime, store, publisher)
    runtime.details = client.status
    add_pages(runtime.admin, store, lambda: publisher.refused)
    metrics.add_page(runtime.admin, client.health)
    await publisher.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publisher.heartbeat)
        await client.run()
