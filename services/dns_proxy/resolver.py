"""Takes a pod's questions at its slots' sockets, and answers each: from the mesh, or from the server."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import anyio
import anyio.abc
import structlog

from pykmesh.contracts.messages import DnsOutcome
from pykmesh.kernel.records import ip_to_text
from services.dns_proxy import wire
from services.dns_proxy.answers import Answers
from services.dns_proxy.health import Health
from services.dns_proxy.slots import Slot
from services.dns_proxy.upstream import ServerSilentError, Target, Upstream, UpstreamError, receive, send

log = structlog.get_logger(__name__)

PORT: Final = 53
OPEN_MAX: Final = 2048
"""Questions that may be open at a time. More are dropped, which resolvers take for a loss and ask again."""
OPEN_OF_POD_MAX: Final = 512
IDLE_OF_POD_MAX: Final = 64
"""Connections of a pod that wait for a question. More are closed."""
BURST: Final = 32
IDLE_S: Final = 10.0
"""A client's connection without a question is closed."""
REST_S: Final = 0.1
"""How long no connection is taken when there is no descriptor or memory for one."""
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass
class Client:
    """A pod, as far as its questions go. `server_of` says whom a slot's questions are meant for."""

    netns_fd: int
    addresses: list[bytes]
    server_of: Callable[[Slot], bytes | None]
    open: int = 0
    """Its questions that are open, of all slots."""
    idle: int = 0
    """Its connections without one."""


class NoRoomError(Exception):
    """Too much is open: what came is dropped, and counted."""


class Prepared(NamedTuple):
    """What becomes of a question: an answer that is there, or who is to be asked."""

    query: wire.Query | None
    answer: Callable[[int], bytes] | None
    targets: list[Target]


class Resolver:
    def __init__(self, answers: Answers, upstream: Upstream, health: Health) -> None:
        self._answers = answers
        self._upstream = upstream
        self._health = health
        self.open = 0

    async def serve(self, slot: Slot, client: Client) -> None:
        """Runs until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._datagrams, slot, client, tasks)
            tasks.start_soon(self._connections, slot, client, tasks)

    @contextlib.contextmanager
    def _question(self, client: Client) -> Iterator[None]:
        """Counts one as open. NoRoomError."""
        if self.open >= OPEN_MAX or client.open >= OPEN_OF_POD_MAX:
            self._health.dropped += 1
            raise NoRoomError
        self.open += 1
        client.open += 1
        try:
            yield
        finally:
            self.open -= 1
            client.open -= 1

    async def _datagrams(self, slot: Slot, client: Client, tasks: anyio.abc.TaskGroup) -> None:
        while True:
            await anyio.wait_readable(slot.udp)
            with contextlib.suppress(BlockingIOError):
                for _ in range(BURST):
                    data, sender = slot.udp.recvfrom(wire.MESSAGE_BYTES_MAX)
                    if len(data) >= wire.HEADER_BYTES:
                        tasks.start_soon(self._answer_datagram, slot, client, data, sender)

    async def _answer_datagram(self, slot: Slot, client: Client, data: bytes, sender: Any) -> None:
        with contextlib.suppress(NoRoomError, ServerSilentError), self._question(client):
            found = await self._prepare(slot, client, data)
            if found.answer is not None:
                reply = found.answer(wire.udp_room(found.query) if found.query else 0)
            else:
                try:
                    reply = await self._upstream.ask(client.netns_fd, found.targets, data)
                except ServerSilentError:
                    raise
                except UpstreamError as error:
                    log.debug("upstream_failed", error=str(error))
                    reply = wire.failure(data)
            with contextlib.suppress(OSError):  # its asker has gone, or takes no more
                slot.udp.sendto(reply, sender)

    async def _connections(self, slot: Slot, client: Client, tasks: anyio.abc.TaskGroup) -> None:
        while True:
            await anyio.wait_readable(slot.tcp)
            try:
                connection, _ = slot.tcp.accept()
            except OSError as error:  # it went again, or waits until there is room for it
                if error.errno in _EXHAUSTED:
                    await anyio.sleep(REST_S)
                continue
            connection.setblocking(False)
            tasks.start_soon(self._answer_connection, slot, client, connection)

    async def _answer_connection(self, slot: Slot, client: Client, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, NoRoomError, ServerSilentError):
            while (data := await self._receive(client, connection)) is not None:
                if len(data) < wire.HEADER_BYTES:
                    return
                with self._question(client):
                    async with contextlib.aclosing(self._replies(slot, client, data)) as replies:
                        async for reply in replies:
                            await send(connection, reply, IDLE_S)

    async def _receive(self, client: Client, connection: socket.socket) -> bytes | None:
        """The next question. OSError, NoRoomError."""
        if client.idle >= IDLE_OF_POD_MAX:
            self._health.dropped += 1
            raise NoRoomError
        client.idle += 1
        try:
            return await receive(connection, IDLE_S)
        finally:
            client.idle -= 1

    async def _replies(self, slot: Slot, client: Client, data: bytes) -> AsyncGenerator[bytes, None]:
        found = await self._prepare(slot, client, data)
        if found.answer is not None:
            yield found.answer(wire.MESSAGE_BYTES_MAX)
            return
        is_last = wire.end_of_answers(found.query)
        stream = self._upstream.ask_by_stream(client.netns_fd, found.targets, data, is_last)
        try:
            async with contextlib.aclosing(stream) as replies:
                async for reply in replies:
                    yield reply
        except ServerSilentError:
            raise
        except UpstreamError as error:
            log.debug("upstream_failed", error=str(error))
            yield wire.failure(data)

    async def _prepare(self, slot: Slot, client: Client, data: bytes) -> Prepared:
        self._health.requests += 1
        slot.used_at = time.monotonic()
        server = client.server_of(slot)
        query = wire.read(data)
        if server is None:  # the slot is being freed
            return Prepared(query, lambda _: wire.failure(data), [])
        name = query.name if query is not None and query.is_for_addresses else ""
        is_6 = bool(name) and query is not None and query.is_6
        found = await self._answers.find(tuple(client.addresses), server, name, is_6=is_6)
        if query is not None and name and found.outcome is DnsOutcome.ANSWER:
            self._health.answered += 1
            texts = [ip_to_text(ip) for ip in random.sample(found.addresses, len(found.addresses))]
            return Prepared(query, lambda room: wire.answer(query, texts, found.alias, room), [])
        if name and found.outcome is DnsOutcome.UNKNOWN_CLIENT:
            return Prepared(query, lambda _: wire.failure(data), [])
        return Prepared(query, None, [(server, PORT)] if found.upstreams is None else found.upstreams)
