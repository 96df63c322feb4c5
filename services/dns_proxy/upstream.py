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
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Final

import anyio

from pykmesh.kernel.netns import socket_in
from pykmesh.kernel.records import ip_to_text, is_v4
from services.dns_proxy.health import Health
from services.dns_proxy.wire import MESSAGE_BYTES_MAX, answers

LENGTH_BYTES: Final = 2
Target = tuple[bytes, int]
"""An address of sixteen bytes, and a port."""


class UpstreamError(Exception):
    """No server could be reached, or it did not answer; the text says which and why."""


class ServerSilentError(UpstreamError):
    """A server was reached as far as one can tell, and said nothing."""


class Upstream:
    def __init__(self, timeout_s: float, health: Health) -> None:
        self._timeout_s = timeout_s
        self._health = health

    async def ask(self, netns_fd: int, targets: Sequence[Target], query: bytes) -> bytes:
        """By UDP. The answer to the client's own message; UpstreamError."""
        number = secrets.token_bytes(2)
        started = time.monotonic()
        try:
            async with self._connected(netns_fd, targets, socket.SOCK_DGRAM) as server:
                reply = await self._ask(server, number + query[2:])
        except UpstreamError:
            self._health.upstream_failures += 1
            raise
        self._health.upstream_took(time.monotonic() - started)
        return query[:2] + reply[2:]

    async def _ask(self, server: socket.socket, query: bytes) -> bytes:
        try:
            server.send(query)
            with anyio.fail_after(self._timeout_s):
                while True:
                    await anyio.wait_readable(server)
                    with contextlib.suppress(BlockingIOError):
                        reply = server.recv(MESSAGE_BYTES_MAX)
                        if answers(reply, query):
                            return reply
        except TimeoutError as error:
            raise ServerSilentError(f"no answer within {self._timeout_s:g} s") from error
        except OSError as error:
            raise UpstreamError(error.strerror or str(error)) from error

    async def ask_by_stream(
        self, netns_fd: int, targets: Sequence[Target], query: bytes, *, until_closed: bool
    ) -> AsyncGenerator[bytes, None]:
        """By TCP. One answer, or all that come until the server closes (a zone's transfer); UpstreamError."""
        started = time.monotonic()
        try:
            async with self._connected(netns_fd, targets, socket.SOCK_STREAM) as server:
                await send(server, query, self._timeout_s)
                while (reply := await receive(server, self._timeout_s)) is not None:
                    if started:
                        self._health.upstream_took(time.monotonic() - started)
                        started = 0.0
                    yield reply
                    if not until_closed:
                        return
                if started:
                    raise UpstreamError("the server closed the connection without an answer")
        except TimeoutError as error:
            self._health.upstream_failures += 1
            raise ServerSilentError(f"no answer within {self._timeout_s:g} s") from error
        except (OSError, UpstreamError) as error:
            self._health.upstream_failures += 1
            raise UpstreamError(str(error)) from error

    @contextlib.asynccontextmanager
    async def _connected(
        self, netns_fd: int, targets: Sequence[Target], kind: int
    ) -> AsyncIterator[socket.socket]:
        """One of the targets, the first that lets itself be connected to, in no order."""
        why = "it is a service without endpoints"
        for ip, port in random.sample(list(targets), len(targets)):
            self._health.upstream_requests += 1
            place, family = (ip_to_text(ip), port), socket.AF_INET if is_v4(ip) else socket.AF_INET6
            try:
                server = socket_in(netns_fd, family, kind)
            except OSError as error:
                raise UpstreamError(f"no socket in the pod's network: {error}") from error
            with server:
                try:
                    with anyio.fail_after(self._timeout_s):
                        await _connect(server, place)
                except OSError as error:  # TimeoutError among them
                    why = f"{place[0]} port {port}: {error.strerror or 'no answer'}"
                    continue
                yield server
                return
        raise UpstreamError(why)


async def _connect(server: socket.socket, place: tuple[str, int]) -> None:
    if server.type == socket.SOCK_DGRAM:
        server.connect(place)
    else:
        await asyncio.get_running_loop().sock_connect(server, place)


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
