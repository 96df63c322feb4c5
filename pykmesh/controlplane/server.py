"""Delta ADS: sends the current snapshot to every client, then what changes, and records what clients answer.

Two types are served, both whole (a subscription to some names is answered with everything):
`istio.workload.Address`, and `istio.security.Authorization`, of which there is never one. A stream sends
its next delta without waiting for the answer to the last; changes that come while it sends go as one.
"""

from __future__ import annotations

import json
import platform
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeAlias

import anyio
import anyio.to_thread
import grpc
import grpc.aio
import msgspec
import structlog

from pykmesh import __version__
from pykmesh.controlplane.snapshot import Delta, Snapshot
from pykmesh.proto import discovery_pb2

ADDRESS_TYPE = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION_TYPE = "type.googleapis.com/istio.security.Authorization"
SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
METHOD = "DeltaAggregatedResources"

_NACKS_KEPT = 100
_UNANSWERED_KEPT = 1000
_STOP_DEADLINE_S = 2.0
_OPTIONS = (
    ("grpc.max_send_message_length", -1),  # a whole mesh is one message
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not shared
    # A client may ping as often as it likes; else one that is idle is sent away every few minutes.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_IDENTIFIER = json.dumps(
    {"Component": "pykmesh-controlplane", "ID": platform.node(), "Info": {"version": __version__}}
)

log = structlog.get_logger(__name__)

_Context: TypeAlias = "grpc.aio.ServicerContext[discovery_pb2.DeltaDiscoveryRequest, bytes]"


class Nack(msgspec.Struct, frozen=True, kw_only=True):
    """A response that a client refused."""

    node_id: str
    type_url: str
    nonce: str
    code: int
    message: str
    at: float
    """Unix time."""


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """A client with an open stream. The counts are responses, over all types."""

    node_id: str
    peer: str
    connected_at: float
    types: tuple[str, ...]
    sent: int
    acked: int
    nacked: int


class _Subscription:
    """One type on one stream."""

    def __init__(self, type_url: str, held: Mapping[str, str]) -> None:
        self.type_url = type_url
        self.held: Mapping[str, str] | None = held
        """What the client said it has, until that is answered."""
        self.sent = Snapshot()
        self.unanswered: deque[str] = deque(maxlen=_UNANSWERED_KEPT)
        """Nonces in the order of their responses; the oldest is forgotten when there are too many."""

    def answer(self, nonce: str) -> bool:
        """Takes the client's answer to a response. False if no such response waits for one."""
        if nonce not in self.unanswered:
            return False
        while self.unanswered.popleft() != nonce:
            pass
        return True


class _Stream:
    """One client's conversation. Requests come in by `take`, responses go out by `push`."""

    def __init__(self, node_id: str, peer: str, current: Callable[[str], Snapshot]) -> None:
        self.node_id = node_id
        self._peer = peer
        self._current = current
        self._connected_at = time.time()
        self._subscriptions: dict[str, _Subscription] = {}
        self._due = anyio.Event()
        self._sent = self._acked = self._nacked = 0

    @property
    def client(self) -> Client:
        return Client(
            node_id=self.node_id,
            peer=self._peer,
            connected_at=self._connected_at,
            types=tuple(self._subscriptions),
            sent=self._sent,
            acked=self._acked,
            nacked=self._nacked,
        )

    def wake(self) -> None:
        """There may be something to send."""
        self._due.set()

    def take(self, request: discovery_pb2.DeltaDiscoveryRequest) -> Nack | None:
        """Takes a request; returns the refusal if it is one."""
        if request.type_url not in (ADDRESS_TYPE, AUTHORIZATION_TYPE):
            log.warning("unknown_type_requested", node=self.node_id, type_url=request.type_url)
        elif request.response_nonce:
            return self._take_answer(request)
        else:
            self._subscribe(request)
        return None

    async def push(self, write: Callable[[bytes], Awaitable[object]]) -> None:
        """Sends whatever is due, until cancelled."""
        while True:
            await self._due.wait()
            self._due = anyio.Event()
            for subscription in tuple(self._subscriptions.values()):
                response = await self._next_response(subscription)
                if response:
                    await write(response)

    def _subscribe(self, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        names = request.resource_names_subscribe
        known = self._subscriptions.get(request.type_url)
        if known is None:
            self._subscriptions[request.type_url] = _Subscription(
                request.type_url, dict(request.initial_resource_versions)
            )
        elif "*" in names:
            known.held = dict(request.initial_resource_versions)
        elif "*" in request.resource_names_unsubscribe:
            del self._subscriptions[request.type_url]
        if any(name != "*" for name in names):
            log.warning("names_subscribed_all_sent", node=self.node_id, type_url=request.type_url)
        self.wake()

    def _take_answer(self, request: discovery_pb2.DeltaDiscoveryRequest) -> Nack | None:
        subscription = self._subscriptions.get(request.type_url)
        if not subscription or not subscription.answer(request.response_nonce):
            log.info("stale_nonce_ignored", node=self.node_id, nonce=request.response_nonce)
            return None
        if not request.HasField("error_detail"):
            self._acked += 1
            return None
        self._nacked += 1
        return Nack(
            node_id=self.node_id,
            type_url=request.type_url,
            nonce=request.response_nonce,
            code=request.error_detail.code,
            message=request.error_detail.message,
            at=time.time(),
        )

    async def _next_response(self, subscription: _Subscription) -> bytes | None:
        snapshot = self._current(subscription.type_url)
        held, before = subscription.held, subscription.sent
        if held is None and before is snapshot:
            return None
        subscription.held, subscription.sent = None, snapshot
        nonce = f"{self._connected_at:.6f}-{self._sent + 1}"
        delta, response = await anyio.to_thread.run_sync(
            _respond, subscription.type_url, snapshot, before if held is None else held, nonce
        )
        if not delta and held is None:
            return None
        self._sent += 1
        subscription.unanswered.append(nonce)
        log.info(
            "resources_sent",
            node=self.node_id,
            type_url=subscription.type_url,
            changed=len(delta.changed),
            removed=len(delta.removed),
            size_bytes=len(response),
        )
        return response


class DeltaServer:
    """Serves snapshots. Owns the streams; everything but the encoding happens in the event loop."""

    def __init__(self) -> None:
        self._snapshot = Snapshot()
        self._streams: list[_Stream] = []
        self._nacks: deque[Nack] = deque(maxlen=_NACKS_KEPT)

    @property
    def clients(self) -> tuple[Client, ...]:
        return tuple(stream.client for stream in self._streams)

    @property
    def last_nacks(self) -> tuple[Nack, ...]:
        """The latest last."""
        return tuple(self._nacks)

    def publish(self, snapshot: Snapshot) -> None:
        """Makes a snapshot the current one; clients get what changed."""
        self._snapshot = snapshot
        for stream in self._streams:
            stream.wake()

    async def serve(self, host: str, port: int, started: Callable[[int], None]) -> None:
        """Serves until cancelled. Calls `started` with the port. Raises `OSError` if it cannot be had."""
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((self._handler(),))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}; choose another port") from error
        await server.start()
        try:
            started(bound)
            await anyio.sleep_forever()
        finally:
            with anyio.move_on_after(_STOP_DEADLINE_S, shield=True):
                await server.stop(grace=None)

    def _handler(self) -> grpc.GenericRpcHandler:
        rpc: grpc.RpcMethodHandler[discovery_pb2.DeltaDiscoveryRequest, bytes] = (
            grpc.stream_stream_rpc_method_handler(
                self._delta_aggregated_resources,
                request_deserializer=discovery_pb2.DeltaDiscoveryRequest.FromString,
                response_serializer=None,  # responses are bytes already
            )
        )
        return grpc.method_handlers_generic_handler(SERVICE, {METHOD: rpc})

    async def _delta_aggregated_resources(
        self, requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest], context: _Context
    ) -> None:
        first = await anext(requests, None)
        if first is None:
            return
        if not first.node.id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "missing node information")
        stream = _Stream(first.node.id, context.peer(), self._current)
        self._streams.append(stream)
        log.info("client_connected", node=stream.node_id, peer=context.peer())
        try:
            self._take(stream, first)
            await self._converse(stream, requests, context)
        finally:
            self._streams.remove(stream)
            log.info("client_left", node=stream.node_id)

    async def _converse(
        self,
        stream: _Stream,
        requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest],
        context: _Context,
    ) -> None:
        """Until the client ends its side, or a write finds it gone."""

        async def push() -> None:
            try:
                await stream.push(context.write)
            except grpc.aio.BaseError as error:
                log.info("client_gone", node=stream.node_id, error=str(error))
                tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(push)
            async for request in requests:
                self._take(stream, request)
            tasks.cancel_scope.cancel()

    def _take(self, stream: _Stream, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        nack = stream.take(request)
        if nack:
            self._nacks.append(nack)
            log.warning(
                "response_refused",
                node=nack.node_id,
                type_url=nack.type_url,
                code=nack.code,
                why=nack.message,
            )

    def _current(self, type_url: str) -> Snapshot:
        return self._snapshot if type_url == ADDRESS_TYPE else _NO_POLICIES


_NO_POLICIES = Snapshot()


def _respond(
    type_url: str, snapshot: Snapshot, held: Snapshot | Mapping[str, str], nonce: str
) -> tuple[Delta, bytes]:
    delta = snapshot.since(held) if isinstance(held, Snapshot) else snapshot.since_versions(held)
    response = discovery_pb2.DeltaDiscoveryResponse(
        type_url=type_url,
        nonce=nonce,
        system_version_info=snapshot.version,
        removed_resources=sorted(delta.removed),
        control_plane=discovery_pb2.ControlPlane(identifier=_IDENTIFIER),
    )
    for name in delta.changed:
        resource = response.resources.add(name=name, version=snapshot.version_of(name))
        resource.resource.type_url = type_url
        resource.resource.value = snapshot.entries[name].body
    return delta, response.SerializeToString()
