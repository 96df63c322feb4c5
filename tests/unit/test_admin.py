"""The administrative HTTP answers what it can, and no request ends the process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from pykmesh import admin
from pykmesh.admin import Admin, Page, Query, as_json

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_event_loop")]

Ask = Callable[[bytes], Any]


@asynccontextmanager
async def serving() -> AsyncIterator[Ask]:
    """Sends bytes on a connection of its own; returns all that comes until it is closed."""
    served = Admin()
    served.page("/status", lambda: {"fine": True})

    async def echo(query: Query) -> Page:
        return as_json(dict(query), 418)

    async def stream(_: Query) -> Page:
        async def parts() -> AsyncIterator[bytes]:
            for part in (b"one\n", b"two\n"):
                yield part

        return Page(parts(), "text/plain")

    served.route("/echo", echo)
    served.route("/stream", stream)
    async with anyio.create_task_group() as tasks:
        port = await tasks.start(served.serve, "127.0.0.1", 0)

        async def ask(data: bytes) -> bytes:
            found = b""
            with anyio.fail_after(10):
                async with await anyio.connect_tcp("127.0.0.1", port) as connection:
                    await connection.send(data)
                    try:
                        while True:
                            found += await connection.receive()
                    except (anyio.EndOfStream, anyio.BrokenResourceError):
                        return found

        yield ask
        tasks.cancel_scope.cancel()


def split(answer: bytes) -> tuple[int, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def test_a_page_is_answered_as_json() -> None:
    async with serving() as ask:
        assert split(await ask(b"GET /status HTTP/1.1\r\nhost: a\r\n\r\n")) == (200, {"fine": True})
        assert split(await ask(b"GET /status HTTP/1.0\r\n\r\n")) == (200, {"fine": True})
        assert split(await ask(b"GET /echo?a=1&b=%20x&a=2 HTTP/1.1\r\nhost: a\r\n\r\n")) == (
            418,
            {"a": "2", "b": " x"},
        )
        assert split(await ask(b"GET http://a/status HTTP/1.1\r\nhost: a\r\n\r\n")) == (200, {"fine": True})


async def test_a_stream_is_sent_as_it_comes() -> None:
    async with serving() as ask:
        answer = await ask(b"GET /stream HTTP/1.1\r\nhost: a\r\n\r\n")
        assert b"one\n" in answer
        assert b"two\n" in answer


async def test_what_is_not_there_is_told_with_what_is() -> None:
    async with serving() as ask:
        status, body = split(await ask(b"GET /nothing HTTP/1.1\r\nhost: a\r\n\r\n"))
        assert (status, body["pages"]) == (404, ["/echo", "/status", "/stream"])
        assert split(await ask(b"POST /status HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"))[0] == 405
        assert split(await ask(b"GET //[ HTTP/1.1\r\nhost: a\r\n\r\n"))[0] == 400


MALFORMED = {
    "nothing": b"",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60),
    "no version": b"GET /status\r\n\r\n",
    "no host": b"GET /status HTTP/1.1\r\n\r\n",
    "a line that never ends": b"GET /" + b"x" * 100_000,
    "headers without end": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000,
    "a header with a NUL": b"GET / HTTP/1.1\r\nhost: a\0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    "a broken target": b"GET //[ HTTP/1.1\r\nhost: a\r\n\r\n",
    "a target that is no text": b"GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n",
    "a target with odd escapes": b"GET /echo?%zz&=&&&%ff=%00 HTTP/1.1\r\nhost: a\r\n\r\n",
    "CONNECT": b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
}


async def test_malformed_requests_end_nothing_but_their_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "REQUEST_DEADLINE_S", 0.3)
    async with serving() as ask:
        for what, data in MALFORMED.items():
            await ask(data)
            assert split(await ask(b"GET /status HTTP/1.1\r\nhost: a\r\n\r\n"))[0] == 200, what


async def test_a_client_that_says_nothing_is_left_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "REQUEST_DEADLINE_S", 0.2)
    async with serving() as ask:
        assert await ask(b"GET /status HTTP/1.1\r\n") == b""
