"""A control plane that says what a test tells it to, and watches how the client behaves.

It speaks delta ADS as istiod does: a new stream gets everything, and the removal of what the client
still names and is gone. Conduct that a control plane may not meet is kept in `violations`; nothing
of the product is used but the messages' encoding.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import anyio
import grpc
import grpc.aio

from pykmesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource

ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
TYPES = (ADDRESS, AUTHORIZATION)
SERVICE, METHOD = "envoy.service.discovery.v3.AggregatedDiscoveryService", "DeltaAggregatedResources"
DEADLINE_S = 20.0
RECEIVE_BYTES_MAX = 4 << 20
"""The largest request that istiod takes."""
NOT_HELD = "map "
"""How the reason begins when a node has no room for a resource: it is kept, without its version."""

Request: TypeAlias = DeltaDiscoveryRequest
Response: TypeAlias = DeltaDiscoveryResponse


def resource(name: str, value: bytes, type_url: str = ADDRESS, version: str | None = None) -> Resource:
    """As a control plane wraps it; the version is the content's hash."""
    found = Resource(
        name=name, version=hashlib.sha256(value).hexdigest()[:16] if version is None else version
    )
    found.resource.type_url, found.resource.value = type_url, value
    return found


class Answer(NamedTuple):
    """How the client answered: `error` is empty for an ACK, else the NACK's text."""

    error: str
    code: int

    @property
    def accepted(self) -> bool:
        return not self.error

    @property
    def reasons(self) -> dict[str, str]:
        """Why, by the name of the resource."""
        parts = (part.partition(": ") for part in self.error.split("; "))
        return {name: why for name, _, why in parts if name}


class _Sent(NamedTuple):
    response: Response
    answered: asyncio.Future[Answer]


class Conversation:
    """One stream: what is sent on it waits for its answer, in order and by type."""

    def __init__(self, plane: ScriptedAds, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._plane = plane
        self._context = context
        self.metadata = dict(context.invocation_metadata() or ())
        self.first: dict[str, Request] = {}
        self._sent: dict[str, deque[_Sent]] = {url: deque() for url in TYPES}
        self.ending: asyncio.Future[grpc.StatusCode] = asyncio.get_running_loop().create_future()
        self.ended = anyio.Event()

    async def run(self) -> None:
        reader = asyncio.create_task(self._read_all())
        either: list[asyncio.Future[Any]] = [reader, self.ending]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            self._plane.note_unanswered(sent.response for queue in self._sent.values() for sent in queue)
            self.ended.set()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
        if self.ending.done() and self.ending.result() is not grpc.StatusCode.OK:
            await self._context.abort(self.ending.result(), "as the test wants it")

    async def _read_all(self) -> None:
        while (request := await self._context.read()) is not grpc.aio.EOF:
            if request.response_nonce:
                self._take_answer(request)
            else:
                await self._take_subscription(request)

    async def _take_subscription(self, request: Request) -> None:
        complain = self._plane.complain
        if not self.first:
            self._check_node(request)
        if request.type_url in self.first:
            complain(f"a second subscription to {request.type_url}")
        if request.type_url not in TYPES:
            complain(f"a subscription to {request.type_url!r}")
        if request.HasField("error_detail"):
            complain("an error in a subscription")
        if list(request.resource_names_unsubscribe) or list(request.resource_names_subscribe) not in (
            [],
            ["*"],
        ):
            complain(f"a subscription that is no wildcard: {request}")
        self._plane.check_versions(request)
        self.first[request.type_url] = request
        if self._plane.answers_subscriptions:
            await self.write(self._plane.everything(request))
        if len(self.first) == len(TYPES):
            self._plane.note_stream(self)

    def _check_node(self, request: Request) -> None:
        parts = request.node.id.split("~")
        if len(parts) != 4 or parts[0] != "ztunnel" or not all(parts):
            self._plane.complain(f"the stream's first request has the node id {request.node.id!r}")

    def _take_answer(self, request: Request) -> None:
        complain, waiting = self._plane.complain, self._sent.get(request.type_url)
        changes = (
            request.resource_names_subscribe,
            request.resource_names_unsubscribe,
            request.initial_resource_versions,
        )
        if any(map(len, changes)):
            complain(f"a subscription in an answer: {request}")
        if waiting is None:
            self._plane.answer_of_unknown_type(request)
            return
        if not waiting:
            complain(f"an answer {request.response_nonce!r} of {request.type_url} to nothing")
            return
        sent = waiting.popleft()
        if request.response_nonce != sent.response.nonce:
            complain(f"an answer to {request.response_nonce!r}, not to {sent.response.nonce!r}")
        answer = Answer(request.error_detail.message, request.error_detail.code)
        if request.HasField("error_detail") != bool(answer.error):
            complain(f"a NACK without a text: {request}")
        self._plane.note_answer(sent.response, answer)
        if not sent.answered.done():
            sent.answered.set_result(answer)

    async def write(self, response: Response) -> asyncio.Future[Answer]:
        """Sends; the future gets the answer."""
        sent = _Sent(response, asyncio.get_running_loop().create_future())
        self._sent.setdefault(response.type_url, deque()).append(sent)
        await self._context.write(response.SerializeToString())
        return sent.answered

    async def write_bytes(self, data: bytes) -> None:
        """Something that need not be a response."""
        await self._context.write(data)

    async def end(self, code: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        self.ending.set_result(code)
        with anyio.fail_after(DEADLINE_S):
            await self.ended.wait()


class ScriptedAds:
    """The control plane. `state` is what it has to say; `push` changes it and tells the client."""

    def __init__(self) -> None:
        self.state: dict[str, dict[str, Resource]] = {url: {} for url in TYPES}
        self.believed: dict[str, dict[str, str]] = {url: {} for url in TYPES}
        """The versions that the client must name when it comes back."""
        self._is_new: set[str] = set()
        self._unsure: set[str] = set()
        self.violations: list[str] = []
        self.answers_subscriptions = True
        self.receive_bytes_max = RECEIVE_BYTES_MAX
        self.may_name_nothing = False
        """The client may hold more than it can name: then it must find out by itself what is gone."""
        self.streams: list[Conversation] = []
        self.unknown: list[Request] = []
        self.port = 0
        self._changed = anyio.Event()
        self._nonces = map("n{}".format, itertools.count(1))
        self._server: grpc.aio.Server | None = None
        self._credentials: grpc.ServerCredentials | None = None

    async def start(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self._credentials = credentials or self._credentials
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", self.receive_bytes_max),
                ("grpc.so_reuseport", 0),
            ]
        )
        handler: Any = grpc.stream_stream_rpc_method_handler(
            self._serve, request_deserializer=Request.FromString
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
        )
        address = f"127.0.0.1:{self.port}"
        if self._credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, self._credentials)
        await self._server.start()

    async def stop(self) -> None:
        """Every connection is closed at once, as by a crash."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def _serve(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await Conversation(self, context).run()

    @property
    def stream(self) -> Conversation:
        return self.streams[-1]

    async def next_stream(self, after: int | None = None) -> Conversation:
        """The first stream after the `after`th (the present one), once it is subscribed to every type."""
        number = len(self.streams) if after is None else after
        await self._until(lambda: len(self.streams) > number, f"stream {number + 1}")
        return self.streams[number]

    async def push(
        self,
        *resources: Resource,
        removed: Sequence[str] = (),
        type_url: str = ADDRESS,
        deadline_s: float = DEADLINE_S,
    ) -> Answer:
        """Changes the state, tells the client, and waits for its answer."""
        with anyio.fail_after(deadline_s):
            return await (await self.tell(*resources, removed=removed, type_url=type_url))

    async def tell(
        self, *resources: Resource, removed: Sequence[str] = (), type_url: str = ADDRESS
    ) -> asyncio.Future[Answer]:
        """The same without waiting."""
        for name in removed:
            self.state[type_url].pop(name, None)
        self.state[type_url].update({item.name: item for item in resources})
        return await self.stream.write(self.response(resources, removed, type_url))

    async def send(self, response: Response) -> Answer:
        """Sends just this, which the state knows nothing of."""
        with anyio.fail_after(DEADLINE_S):
            return await (await self.stream.write(response))

    def response(
        self, resources: Iterable[Resource], removed: Iterable[str] = (), type_url: str = ADDRESS
    ) -> Response:
        return Response(
            type_url=type_url, nonce=next(self._nonces), resources=resources, removed_resources=removed
        )

    def everything(self, request: Request) -> Response:
        """What istiod answers a wildcard subscription with."""
        state = self.state[request.type_url]
        gone = request.initial_resource_versions.keys() - state.keys()
        return self.response(state.values(), sorted(gone), request.type_url)

    async def unknown_answer(self, number: int) -> Request:
        """The `number`th answer (from 1) to a response of a type that was not asked for."""
        await self._until(lambda: len(self.unknown) >= number, "an answer to an unknown type")
        return self.unknown[number - 1]

    def client_restarted(self) -> None:
        """A new process of the client comes next: it holds nothing, whatever the old one says last."""
        self._is_new = set(TYPES)

    def complain(self, what: str) -> None:
        self.violations.append(what)

    def check(self) -> None:
        assert not self.violations, self.violations

    def check_versions(self, request: Request) -> None:
        if request.type_url in self._is_new:
            self._is_new.remove(request.type_url)
            self.believed[request.type_url] = {}
        said, believed = dict(request.initial_resource_versions), self.believed[request.type_url]
        wrong = {
            name: (said.get(name), believed.get(name))
            for name in (said.keys() | believed.keys()) - self._unsure
            if said.get(name) != believed.get(name)
        }
        if wrong and (said or not self.may_name_nothing):
            self.complain(f"versions named, and those that were accepted: {wrong}")
        self.believed[request.type_url] = said
        self._unsure -= said.keys() | believed.keys()

    def note_answer(self, response: Response, answer: Answer) -> None:
        believed, reasons = self.believed[response.type_url], answer.reasons
        for name in response.removed_resources:
            believed.pop(name, None)
        for item in response.resources:
            why = reasons.get(item.name)
            if why is None or why.startswith(NOT_HELD):
                believed[item.name] = "" if why else item.version

    def note_unanswered(self, responses: Iterable[Response]) -> None:
        for response in responses:
            self._unsure |= {item.name for item in response.resources} | set(response.removed_resources)

    def note_stream(self, stream: Conversation) -> None:
        self.streams.append(stream)
        self._wake()

    def answer_of_unknown_type(self, request: Request) -> None:
        self.unknown.append(request)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _until(self, what: Any, because: str) -> None:
        with anyio.move_on_after(DEADLINE_S):
            while not what():
                await self._changed.wait()
        assert what(), f"no {because} after {DEADLINE_S} s"


@contextlib.asynccontextmanager
async def serving(credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[ScriptedAds]:
    """A control plane for as long as the block runs; the client's conduct is checked at its end."""
    plane = ScriptedAds()
    await plane.start(credentials)
    try:
        yield plane
        plane.check()
    finally:
        await plane.stop()
