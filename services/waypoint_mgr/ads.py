"""Delta ADS for Envoys, over a unix socket: each node, by its id, gets resources of its own.

What is new is made before what is old is broken: clusters with their endpoints, then listeners, then routes,
each when Envoy has taken the one before; clusters are removed when it has taken listeners and routes without
them. While clusters are refused nothing that may need them is sent: what was good last stays. One response
a type is under way at a time; changes that come meanwhile go as one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import anyio
import grpc
import grpc.aio
import msgspec
import structlog

from pykmesh.proto import discovery_pb2
from services.waypoint_mgr.encode import (
    CLUSTER_TYPE,
    ENDPOINT_TYPE,
    LISTENER_TYPE,
    ROUTE_TYPE,
    Resources,
)

SERVICE: Final = "envoy.service.discovery.v3.AggregatedDiscoveryService"
METHOD: Final = "DeltaAggregatedResources"

_ORDER: Final = (CLUSTER_TYPE, ENDPOINT_TYPE, LISTENER_TYPE, ROUTE_TYPE)
_WILDCARDS: Final = (CLUSTER_TYPE, LISTENER_TYPE)
_STOP_DEADLINE_S: Final = 2.0
_OPTIONS: Final = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))

log = structlog.get_logger(__name__)

_Request: TypeAlias = discovery_pb2.DeltaDiscoveryRequest
_Response: TypeAlias = discovery_pb2.DeltaDiscoveryResponse
_Context: TypeAlias = "grpc.aio.ServicerContext[_Request, _Response]"
_Versions: TypeAlias = dict[str, str]
_SOME: Final = ""
"""The version of what was refused: Envoy has it as it was before, or does not have it."""


class Refusal(msgspec.Struct, frozen=True):
    """A response that an Envoy did not take; what it had before it has still."""

    type_url: str
    message: str
    at: float
    """Unix time."""

    @property
    def is_its_own(self) -> bool:
        """It concerns the one Envoy: what it got may be good for others. Somebody else has its port."""
        return "cannot bind" in self.message


class NodeStatus(msgspec.Struct, frozen=True):
    """`is_current`: it is connected and has taken all that was published last. Refusals are of that too."""

    is_connected: bool
    is_current: bool
    refusals: tuple[Refusal, ...] = ()


class _Published(msgspec.Struct, frozen=True):
    """What a node shall have; the versions are hashes of the content, so they outlive this process."""

    resources: Resources
    versions: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, resources: Resources) -> _Published:
        versions = {
            type_url: {name: hashlib.blake2b(body, digest_size=8).hexdigest() for name, body in named.items()}
            for type_url, named in resources.items()
        }
        return cls(resources, versions)


class _Subscription:
    """One type on one stream."""

    def __init__(self, type_url: str, held: Mapping[str, str]) -> None:
        self.type_url = type_url
        self.names: set[str] = set()
        self.sent: _Versions = dict(held)
        """What Envoy has, or will when it has taken the response under way."""
        self.missing: set[str] = set()
        """Names that were answered: there is none such."""
        self.is_answered = bool(held)
        self.under_way: tuple[str, _Versions] | None = None
        """The nonce of a response that waits for its answer, and what it said."""
        self.refused: _Versions = {}
        self.refusal: Refusal | None = None

    def wanted(self, versions: Mapping[str, str]) -> _Versions:
        if self.type_url in _WILDCARDS:
            return dict(versions)
        return {name: versions[name] for name in self.names if name in versions}

    def changed(self, wanted: _Versions) -> _Versions:
        """What to send. A refused response is tried again, as a whole, when something of it is different."""
        if not self.refusal_stands(wanted):
            self.refused = {}
        has = self.sent | self.refused
        return {name: version for name, version in wanted.items() if has.get(name) != version}

    def refusal_stands(self, wanted: _Versions) -> bool:
        """What was refused is still wanted as it was."""
        return bool(self.refused) and all(wanted.get(name) == v for name, v in self.refused.items())

    def gone(self, wanted: _Versions) -> set[str]:
        """Of what is asked for by name only that which never was: the rest goes with what names it."""
        if self.type_url in _WILDCARDS:
            return self.sent.keys() - wanted.keys()
        return self.names - wanted.keys() - self.missing - self.sent.keys()

    def subscribe(self, request: _Request) -> None:
        """A name that is asked for is answered, whether it was sent before or not."""
        held = request.initial_resource_versions
        for name in set(request.resource_names_subscribe) - {"*"}:
            self.names.add(name)
            self.missing.discard(name)
            if name not in held:
                self.sent.pop(name, None)
        for name in request.resource_names_unsubscribe:
            self.names.discard(name)
            self.sent.pop(name, None)

    def forget(self, names: Iterable[str]) -> None:
        """They are to be sent again."""
        for name in names:
            self.sent.pop(name, None)

    def retry(self) -> None:
        """What was refused is sent as it is."""
        self.refused, self.refusal = {}, None

    def respond(self, nonce: str, changed: _Versions, gone: set[str]) -> None:
        self.under_way = (nonce, changed)
        self.is_answered = True
        self.missing = (self.missing | gone) - changed.keys()
        self.forget(gone)
        self.sent |= changed

    def answer(self, request: _Request) -> None:
        if self.under_way is None or self.under_way[0] != request.response_nonce:
            return
        _, said = self.under_way
        self.under_way = None
        if not request.HasField("error_detail"):
            self.refused, self.refusal = {}, None
            return
        self.refused = self.refused | said
        self.sent |= dict.fromkeys(said, _SOME)
        self.refusal = Refusal(self.type_url, request.error_detail.message, time.time())


class _Due(NamedTuple):
    """A response to give."""

    sub: _Subscription
    changed: _Versions
    gone: set[str]


class _Stream:
    """One Envoy's conversation: requests come in by `take`, responses go out by `push`."""

    def __init__(self, node_id: str, published: _Published | None) -> None:
        self.node_id = node_id
        self._published = published
        self._subscriptions: dict[str, _Subscription] = {}
        self._due = anyio.Event()
        self._nonces = 0
        self.has_taken = False
        """It had all that was published at some time."""
        self._sent_clusters: set[str] = set()
        """Before endpoints were first asked for."""

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Of what is published now: those of before hold up nothing."""
        subs = self._subscriptions.values()
        return tuple(sub.refusal for sub in subs if sub.refusal and self._is_refused(sub))

    def _is_refused(self, sub: _Subscription) -> bool:
        return sub.refusal_stands(self._wanted(sub))

    @property
    def is_current(self) -> bool:
        """All is asked for and taken."""
        if self._published is None or self.refusals:
            return False
        return all(self._is_asked_for(type_url) for type_url in _ORDER) and self._is_at_rest

    @property
    def is_settled(self) -> bool:
        """Nothing happens any more: all is taken, or what was refused holds up the rest."""
        return self.is_current or (bool(self.refusals) and self._is_at_rest)

    @property
    def _is_at_rest(self) -> bool:
        return self._next() is None and not any(sub.under_way for sub in self._subscriptions.values())

    def publish(self, published: _Published) -> None:
        self._published = published
        self._due.set()

    def take(self, request: _Request) -> None:
        sub = self._subscriptions.get(request.type_url)
        if sub is None:
            sub = _Subscription(request.type_url, request.initial_resource_versions)
            self._subscriptions[request.type_url] = sub
            if request.type_url == ENDPOINT_TYPE:
                sub.forget(self._sent_clusters)
                self._sent_clusters.clear()
        if request.response_nonce:
            sub.answer(request)
            if sub.refusal:
                log.warning(
                    "configuration_refused",
                    node=self.node_id,
                    type_url=request.type_url,
                    why=sub.refusal.message,
                )
        sub.subscribe(request)
        self.has_taken = self.has_taken or self.is_current
        self._due.set()

    def retry(self) -> None:
        for sub in self._subscriptions.values():
            if sub.refusal and sub.refusal.is_its_own:
                sub.retry()
        self._due.set()

    async def push(self, write: Callable[[_Response], Awaitable[object]]) -> None:
        """Sends whatever is due, until cancelled."""
        while True:
            await self._due.wait()
            self._due = anyio.Event()
            while response := self._next_response():
                await write(response)

    def _next_response(self) -> _Response | None:
        due = self._next()
        return self._respond(*due) if due else None

    def _next(self) -> _Due | None:
        """Additions and changes in order, then removals in the opposite one. None: nothing, or not yet."""
        if self._published is None:
            return None
        for type_url in _ORDER:
            sub = self._subscriptions.get(type_url)
            if sub and not sub.under_way and (due := self._additions(sub)):
                return due
            if not self._may_go_on_from(type_url):
                return None
        if self.refusals or not self._is_asked_for(ROUTE_TYPE):
            return None  # what is old may be in use still
        for type_url in reversed(_WILDCARDS):
            sub = self._subscriptions.get(type_url)
            if sub and (gone := sub.gone(self._wanted(sub))):
                return _Due(sub, {}, gone)
        return None

    def _may_go_on_from(self, type_url: str) -> bool:
        """Endpoints go with clusters: Envoy answers for these when they have all of those."""
        subs = self._subscriptions
        if type_url == CLUSTER_TYPE:
            return CLUSTER_TYPE in subs
        if type_url in subs and subs[type_url].under_way:
            return False
        if type_url != ENDPOINT_TYPE:
            return True
        clusters = subs[CLUSTER_TYPE]
        are_refused = any(self._is_refused(subs[each]) for each in (CLUSTER_TYPE, type_url) if each in subs)
        return not clusters.under_way and not are_refused and self._is_asked_for(ENDPOINT_TYPE)

    def _additions(self, sub: _Subscription) -> _Due | None:
        """The first answer is given though it be empty: a new Envoy waits for it, or for a name's."""
        wanted = self._wanted(sub)
        changed = sub.changed(wanted)
        is_wildcard = sub.type_url in _WILDCARDS
        gone = set() if is_wildcard else sub.gone(wanted)
        if not changed and not gone and (sub.is_answered or not is_wildcard):
            return None
        return _Due(sub, changed, gone)

    def _is_asked_for(self, type_url: str) -> bool:
        """Envoy asks for endpoints when it has a cluster, and for routes when it has a listener."""
        sub = self._subscriptions.get(type_url)
        if type_url in _WILDCARDS:
            return sub is not None
        published = self._published.versions.get(type_url, {}) if self._published else {}
        return published.keys() <= (sub.names if sub else set())

    def _respond(self, sub: _Subscription, changed: _Versions, gone: set[str]) -> _Response:
        self._nonces += 1
        response = _Response(type_url=sub.type_url, nonce=str(self._nonces), removed_resources=sorted(gone))
        bodies = self._published.resources.get(sub.type_url, {}) if self._published else {}
        for name, version in changed.items():
            resource = response.resources.add(name=name, version=version)
            resource.resource.type_url = sub.type_url
            resource.resource.value = bodies[name]
        routes = self._subscriptions.get(ROUTE_TYPE)
        if sub.type_url == LISTENER_TYPE and sub.refusal and routes:
            routes.forget(list(routes.sent))  # they may have come for a listener that was refused
        sub.respond(response.nonce, changed, gone)
        if sub.type_url == CLUSTER_TYPE:
            self._send_endpoints_again(changed)
        log.info(
            "configuration_sent",
            node=self.node_id,
            type_url=sub.type_url,
            changed=len(changed),
            removed=len(gone),
            size_bytes=response.ByteSize(),
        )
        return response

    def _send_endpoints_again(self, clusters: Iterable[str]) -> None:
        """A cluster that changed waits until it gets its endpoints once more."""
        endpoints = self._subscriptions.get(ENDPOINT_TYPE)
        if endpoints:
            endpoints.forget(clusters)
        else:
            self._sent_clusters.update(clusters)

    def _wanted(self, sub: _Subscription) -> _Versions:
        versions = self._published.versions.get(sub.type_url, {}) if self._published else {}
        return sub.wanted(versions)


class AdsServer:
    """Owns the streams and what each node shall have. All of it happens in the event loop."""

    def __init__(self) -> None:
        self._published: dict[str, _Published] = {}
        self._streams: list[_Stream] = []
        self._turn = anyio.Event()

    def publish(self, node_id: str, resources: Resources) -> None:
        """Makes these the node's resources; what changed is sent, now or when it connects."""
        published = self._published[node_id] = _Published.of(resources)
        for stream in self._streams:
            if stream.node_id == node_id:
                stream.publish(published)
        self._wake()

    def forget(self, node_id: str) -> None:
        """Nothing more is sent to the node; what it has it keeps."""
        self._published.pop(node_id, None)

    def has_taken(self, node_id: str) -> bool:
        """Whether a node that is connected has had all that was published to it, at some time."""
        return any(stream.node_id == node_id and stream.has_taken for stream in self._streams)

    def retry(self, node_id: str) -> None:
        """Sends once more what a node refused for reasons of its own."""
        for stream in self._streams:
            if stream.node_id == node_id:
                stream.retry()

    def status(self) -> dict[str, NodeStatus]:
        """By node id: all that were published to and all that are connected."""
        streams = {stream.node_id: stream for stream in self._streams}
        return {
            node_id: NodeStatus(
                is_connected=node_id in streams,
                is_current=node_id in streams and streams[node_id].is_current,
                refusals=streams[node_id].refusals if node_id in streams else (),
            )
            for node_id in self._published.keys() | streams.keys()
        }

    async def settled(self, node_id: str) -> NodeStatus:
        """When the node has taken, or refused, what was published to it."""
        while not any(one.node_id == node_id and one.is_settled for one in self._streams):
            await self._turn.wait()
        return self.status()[node_id]

    async def serve(self, path: Path, started: Callable[[], None]) -> None:
        """Serves at a unix socket until cancelled. Raises `OSError` if it cannot be had."""
        path.unlink(missing_ok=True)  # noqa: ASYNC240  (once)
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((self._handler(),))
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {path}: {error}") from error
        await server.start()
        try:
            started()
            await anyio.sleep_forever()
        finally:
            with anyio.move_on_after(_STOP_DEADLINE_S, shield=True):
                await server.stop(grace=None)

    def _handler(self) -> grpc.GenericRpcHandler:
        rpc: grpc.RpcMethodHandler[_Request, _Response] = grpc.stream_stream_rpc_method_handler(
            self._converse,
            request_deserializer=_Request.FromString,
            response_serializer=_Response.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {METHOD: rpc})

    async def _converse(self, requests: AsyncIterator[_Request], context: _Context) -> None:
        """Until the client ends its side, or a write finds it gone."""
        first = await anext(requests, None)
        if first is None:
            return
        stream = _Stream(first.node.id, self._published.get(first.node.id))
        self._streams.append(stream)
        log.info("envoy_connected", node=stream.node_id)

        async def push() -> None:
            try:
                await stream.push(context.write)
            except grpc.aio.BaseError as error:
                log.info("envoy_gone", node=stream.node_id, error=str(error))
                tasks.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(push)
                self._take(stream, first)
                async for request in requests:
                    self._take(stream, request)
                tasks.cancel_scope.cancel()
        finally:
            self._streams.remove(stream)
            self._wake()
            log.info("envoy_left", node=stream.node_id)

    def _take(self, stream: _Stream, request: _Request) -> None:
        stream.take(request)
        self._wake()

    def _wake(self) -> None:
        """Something may have come about that is waited for."""
        self._turn.set()
        self._turn = anyio.Event()
