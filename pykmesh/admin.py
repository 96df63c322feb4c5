"""The administrative HTTP of each process: `/livez`, `/readyz`, `/status`, `/version` and its own pages.

A page is a function that returns an object (answered as JSON) or bytes with a content type. GET
only, one request a connection: it serves probes, scrapes and the command line, not traffic.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import anyio
import anyio.abc
import h11
import msgspec
import structlog

log = structlog.get_logger(__name__)

REQUEST_DEADLINE_S = 5.0
CONNECTIONS_MAX = 256


class Page(NamedTuple):
    """An answer; `body` may be a stream, which is sent as it comes until the client leaves."""

    body: bytes | AsyncIterator[bytes]
    content_type: str = "application/json"
    status: int = 200


Query = Mapping[str, str]
Handler = Callable[[Query], Awaitable[Page]]


class Route(NamedTuple):
    handler: Handler
    deadline_s: float


def as_json(value: Any, status: int = 200) -> Page:
    return Page(msgspec.json.encode(value) + b"\n", status=status)


class Admin:
    """Routes by path; `serve` runs until it is cancelled."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self._open = 0

    def route(self, path: str, handler: Handler, deadline_s: float = REQUEST_DEADLINE_S) -> None:
        """`deadline_s`: what the handler may take until it has its page."""
        self._routes[path] = Route(handler, deadline_s)

    def page(self, path: str, value: Callable[[], Any]) -> None:
        """A path that answers with the JSON of what `value` returns."""

        async def handler(_: Query) -> Page:
            return as_json(value())

        self.route(path, handler)

    async def serve(
        self, host: str, port: int, *, task_status: anyio.abc.TaskStatus[int] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Reports the port that it listens on. OSError when the port is taken."""
        async with await anyio.create_tcp_listener(local_host=host, local_port=port) as listener:
            task_status.started(listener.extra(anyio.abc.SocketAttribute.local_port))  # noqa: S610  (not Django's)
            await listener.serve(self._answer)

    async def _answer(self, stream: anyio.abc.SocketStream) -> None:
        """One request. Whatever is wrong with it, or with its page, ends it and nothing else."""
        async with stream:
            if self._open >= CONNECTIONS_MAX:
                return
            self._open += 1
            try:
                with anyio.fail_after(REQUEST_DEADLINE_S) as deadline:
                    page = await self._page(await self._read(stream), deadline)
                    whole = isinstance(page.body, bytes)
                    deadline.deadline = anyio.current_time() + REQUEST_DEADLINE_S if whole else math.inf
                    await _send(stream, page)
            except (h11.ProtocolError, anyio.BrokenResourceError, anyio.EndOfStream, TimeoutError):
                return
            except Exception as error:  # noqa: BLE001  (a page that fails must not end the process)
                log.error("admin_page_failed", error=f"{type(error).__name__}: {error}")
            finally:
                self._open -= 1

    @staticmethod
    async def _read(stream: anyio.abc.SocketStream) -> h11.Request:
        connection = h11.Connection(h11.SERVER)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                return event
            connection.receive_data(await stream.receive())

    async def _page(self, request: h11.Request, deadline: anyio.CancelScope) -> Page:
        if request.method != b"GET":
            return as_json({"error": "only GET"}, 405)
        try:
            target = urlsplit(request.target.decode(errors="replace"))
        except ValueError as error:
            return as_json({"error": f"no path: {error}"}, 400)
        route = self._routes.get(target.path)
        if route is None:
            return as_json({"error": f"no page {target.path}", "pages": sorted(self._routes)}, 404)
        deadline.deadline = anyio.current_time() + route.deadline_s
        try:
            return await route.handler(dict(parse_qsl(target.query)))
        except Exception as error:  # noqa: BLE001  (told to who asked, and logged)
            log.error("admin_page_failed", page=target.path, error=f"{type(error).__name__}: {error}")
            return as_json({"error": f"{type(error).__name__}: {error}"}, 500)


async def _send(stream: anyio.abc.SocketStream, page: Page) -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nhost: admin\r\n\r\n")
    connection.next_event()
    connection.next_event()
    headers = [("content-type", page.content_type), ("connection", "close")]
    if isinstance(page.body, bytes):
        headers.append(("content-length", str(len(page.body))))
    await _write(stream, connection, h11.Response(status_code=page.status, headers=headers))
    if isinstance(page.body, bytes):
        await _write(stream, connection, h11.Data(data=page.body))
    else:
        async for part in page.body:
            await _write(stream, connection, h11.Data(data=part))
    await _write(stream, connection, h11.EndOfMessage())


async def _write(stream: anyio.abc.SocketStream, connection: h11.Connection, event: h11.Event) -> None:
    data = connection.send(event)
    if data:
        await stream.send(data)
