"""Sends questions on to the server that was asked, from a socket in the pod's network namespace.

So routes, addresses and whoever filters are the pod's. The socket is not in the pod's cgroup: the mesh's
programs do not see it, and a server that is a service is reached at an endpoint which map_writer names.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Final

import anyio

from pykmesh.kernel.netns import socket_in
from pykmesh.kernel.records import ip_to_text, is_v4
from services.dns_proxy.health import Health
from services.dns_proxy.wire import MESSAGE_BYTES_MAX, answers

LENGTH_BYTES: Final = 2
_NO_TARGET: Final = "the mesh lets nobody reach it, or it is a service without endpoints"
Target = tuple[bytes, int]
"""An address of sixteen bytes, and a port."""


class UpstreamError(Exception):
    """No server could be reached, or it did not answer; the text says which and why."""


class ServerSilentError(UpstreamError):
    """A server was reached as far as one can tell, and said nothing, or not all of its answer."""


class Upstream:
    def __init__(self, timeout_s: float, health: Health) -> None:
        self._timeout_s = timeout_s
        self._health = health

    async def ask(self, netns_fd: int, targets: Sequence[Target], query: bytes) -> bytes:
        """By UDP. The answer to the client's own message; UpstreamError."""
        number = secrets.token_bytes(2)
        started = time.monotonic()
        try:
            reply = await self._ask_one_of(netns_fd, targets, number + query[2:])
        except UpstreamError:
            self._health.upstream_failures += 1
            raise
        self._health.upstream_took(time.monotonic() - started)
        return query[:2] + reply[2:]

    async def _ask_one_of(self, netns_fd: int, targets: Sequence[Target], query: bytes) -> bytes:
        """The first in no order that does not refuse; one that is silent may have got the question."""
        why = _NO_TARGET
        for target in random.sample(list(targets), len(targets)):
            with self._socket(netns_fd, target, socket.SOCK_DGRAM) as server:
                try:
                    server.connect(_place(target))
                    return await self._ask(server, query)
                except OSError as error:
                    why = _said_of(target, error)
        raise UpstreamError(why)

    async def _ask(self, server: socket.socket, query: bytes) -> bytes:
        """OSError for what the network says of the server; ServerSilentError."""
        server.send(query)
        with anyio.move_on_after(self._timeout_s):
            while True:
                await anyio.wait_readable(server)
                with contextlib.suppress(BlockingIOError):
                    reply = server.recv(MESSAGE_BYTES_MAX)
                    if answers(reply, query):
                        return reply
        raise ServerSilentError(f"no answer within {self._timeout_s:g} s")

    async def ask_by_stream(
        self, netns_fd: int, targets: Sequence[Target], query: bytes, is_last: Callable[[bytes], bool]
    ) -> AsyncGenerator[bytes, None]:
        """By TCP. Answers up to the last one (a zone's transfer has several); UpstreamError.

        Once something came, what fails is no failure of the server's, and ends in ServerSilentError.
        """
        started = time.monotonic()
        has_come = False
        try:
            async with self._connected(netns_fd, targets) as server:
                await send(server, query, self._timeout_s)
                while (reply := await receive(server, self._timeout_s)) is not None:
                    if not has_come:
                        self._health.upstream_took(time.monotonic() - started)
                        has_come = True
                    yield reply
                    if is_last(reply):
                        return
                raise UpstreamError("the server closed the connection before its last answer")
        except (OSError, UpstreamError) as error:
            if has_come:
                raise ServerSilentError(f"not all of the answer: {error}") from error
            self._health.upstream_failures += 1
            if isinstance(error, TimeoutError):
                raise ServerSilentError(f"no answer within {self._timeout_s:g} s") from error
            raise UpstreamError(str(error)) from error

    @contextlib.asynccontextmanager
    async def _connected(self, netns_fd: int, targets: Sequence[Target]) -> AsyncIterator[socket.socket]:
        """One of the targets, the first that lets itself be connected to, in no order."""
        why = _NO_TARGET
        for target in random.sample(list(targets), len(targets)):
            with self._socket(netns_fd, target, socket.SOCK_STREAM) as server:
                try:
                    with anyio.fail_after(self._timeout_s):
                        await asyncio.get_running_loop().sock_connect(server, _place(target))
                except OSError as error:  # TimeoutError among them
                    why = _said_of(target, error)
                    continue
                yield server
                return
        raise UpstreamError(why)

    @contextlib.contextmanager
    def _socket(self, netns_fd: int, target: Target, kind: int) -> Iterator[socket.socket]:
        self._health.upstream_requests += 1
        try:
            found = socket_in(netns_fd, socket.AF_INET if is_v4(target[0]) else socket.AF_INET6, kind)
        except OSError as error:
            raise UpstreamError(f"no socket in the pod's network: {error}") from error
        with found:
            yield found


def _place(target: Target) -> tuple[str, int]:
    ip, port = target
    return ip_to_text(ip), port


def _said_of(target: Target, error: OSError) -> str:
    address, port = _place(target)
    return f"{address} port {port}: {error.strerror or 'no answer'}"


async def send(connection: socket.socket, message: bytes, timeout_s: float) -> None:
    """A message with its length before it (RFC 1035, 4.2.2). OSError, TimeoutError among them."""
    data = len(message).to_bytes(LENGTH_BYTES, "big") + message
    with anyio.fail_after(timeout_s):
        await asyncio.get_running_loop().sock_sendall(connection, data)


async def receive(connection: socket.socket, timeout_s: float) -> bytes | None:
    """The next message; None at the end of the stream. OSError, TimeoutError among them."""
    with anyio.fail_after(timeout_s):
        length = await _exactly(connection, LENGTH_BYTES)
        return None if length is None else await _exactly(connection, int.from_bytes(length, "big"))


async def _exactly(connection: socket.socket, size: int) -> bytes | None:
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < size:
        part = await loop.sock_recv(connection, size - len(data))
        if not part:
            return None
        data += part
    return data
