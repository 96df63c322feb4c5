"""The bus: a small port, and NATS behind it.

Core NATS only, on purpose. What a reader needs after a loss is xds_client's snapshot, which exists
anyway; a stream in the broker would be a second store, and one that can be wiped (decision record
`docs/decisions/0001-core-nats.md`). Nothing here keeps a message: publishing while the broker is
away drops it, and the reader finds the gap by the sequence numbers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

import anyio
import nats
import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg

log = structlog.get_logger(__name__)

RECONNECT_WAIT_S = 0.25
REQUEST_TIMEOUT_S = 5.0
PENDING_BYTES = 256 * 1024 * 1024

Headers = Mapping[str, str]
Receive = Callable[[bytes, Headers], Awaitable[None]]
Answer = Callable[[bytes], Awaitable[bytes]]


class BusUnavailableError(Exception):
    """The broker, or who answers on a subject, is away."""


class Bus(Protocol):
    """What the processes need of a bus. Messages of one subject arrive in the order of publishing."""

    @property
    def connected(self) -> bool: ...
    async def publish(self, subject: str, data: bytes, headers: Headers | None = None) -> None: ...
    async def request(self, subject: str, data: bytes) -> bytes: ...
    async def subscribe(self, subject: str, receive: Receive) -> None: ...
    async def serve(self, subject: str, answer: Answer) -> None: ...
    async def close(self) -> None: ...


class NatsBus:
    """Connects for as long as it takes, and again after each loss; subscriptions survive it."""

    def __init__(self, client: Client, errors: list[str]) -> None:
        self._client = client
        self.errors = errors

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    async def publish(self, subject: str, data: bytes, headers: Headers | None = None) -> None:
        if not self._client.is_connected:
            raise BusUnavailableError(f"publish to {subject}: no broker")
        try:
            await self._client.publish(subject, data, headers=dict(headers) if headers else None)
        except nats.errors.Error as error:
            raise BusUnavailableError(f"publish {len(data)} bytes to {subject}: {error}") from error

    async def request(self, subject: str, data: bytes) -> bytes:
        try:
            reply = await self._client.request(subject, data, timeout=REQUEST_TIMEOUT_S)
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailableError(f"request to {subject}: {error or type(error).__name__}") from error
        return reply.data

    async def subscribe(self, subject: str, receive: Receive) -> None:
        async def deliver(message: Msg) -> None:
            await receive(message.data, message.headers or {})

        await self._client.subscribe(subject, cb=deliver, pending_bytes_limit=PENDING_BYTES)

    async def serve(self, subject: str, answer: Answer) -> None:
        async def reply(message: Msg) -> None:
            await message.respond(await answer(message.data))

        await self._client.subscribe(subject, cb=reply)

    async def close(self) -> None:
        with anyio.move_on_after(2, shield=True):
            await self._client.close()


async def connect(
    url: str,
    user: str,
    password_file: Path | None,
    *,
    on_connect: Callable[[], None] | None = None,
) -> NatsBus:
    """Waits for the broker. `on_connect` is called at the first connection and after each loss."""
    errors: list[str] = []

    async def on_error(error: Exception) -> None:
        if not errors or errors[-1] != str(error):
            log.warning("bus_error", error=str(error) or type(error).__name__)
        errors[:] = [str(error)]

    async def reconnected() -> None:
        errors.clear()
        log.info("bus_reconnected", url=url)
        if on_connect:
            on_connect()

    password = await anyio.Path(password_file).read_text() if password_file else None
    client = Client()
    while True:
        try:
            await client.connect(
                url,
                user=user if password else None,
                password=password.strip() if password else None,
                name=user,
                inbox_prefix=f"_INBOX_{user}".encode(),
                error_cb=on_error,
                reconnected_cb=reconnected,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # it sleeps for any number
                connect_timeout=2,
                ping_interval=5,
                max_outstanding_pings=2,
                drain_timeout=3,
            )
            break
        except (nats.errors.Error, OSError, TimeoutError) as error:
            await on_error(error)
            await anyio.sleep(RECONNECT_WAIT_S)
    errors.clear()
    if on_connect:
        on_connect()
    return NatsBus(client, errors)
