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

from pykmesh.contracts.messages import ContractError

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
    async def request(self, subject: str, data: bytes, timeout_s: float = REQUEST_TIMEOUT_S) -> bytes: ...
    async def subscribe(self, subject: str, receive: Receive) -> None: ...
    async def serve(self, subject: str, answer: Answer) -> None: ...
    async def close(self) -> None: ...


class NatsBus:
    """Connects for as long as it takes, and again after each loss; subscriptions survive it."""

    def __init__(self, client: Client, on_error: Callable[[str], None]) -> None:
        self._client = client
        self._on_error = on_error

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

    async def request(self, subject: str, data: bytes, timeout_s: float = REQUEST_TIMEOUT_S) -> bytes:
        try:
            reply = await self._client.request(subject, data, timeout=timeout_s)
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailableError(f"request to {subject}: {error or type(error).__name__}") from error
        return reply.data

    async def subscribe(self, subject: str, receive: Receive) -> None:
        async def deliver(message: Msg) -> None:
            await receive(message.data, message.headers or {})

        await self._client.subscribe(subject, cb=deliver, pending_bytes_limit=PENDING_BYTES)

    async def serve(self, subject: str, answer: Answer) -> None:
        """What `answer` does not understand (ContractError) is told here, and answered with no byte."""

        async def reply(message: Msg) -> None:
            try:
                found = await answer(message.data)
            except ContractError as error:
                self._on_error(f"asked on {subject}: {error}")
                found = b""
            await message.respond(found)

        await self._client.subscribe(subject, cb=reply)

    async def close(self) -> None:
        with anyio.move_on_after(2, shield=True):
            await self._client.close()


async def connect(
    url: str, user: str, password_file: Path | None, on_error: Callable[[str], None]
) -> NatsBus:
    """Waits for the broker. `on_error` hears why it is not there, of what it forbids, and of wrong questions.

    A wrong password and a forbidden subject come that way only (nats-py raises for neither).
    """

    async def failed(error: Exception) -> None:
        on_error(str(error) or type(error).__name__)

    async def reconnected() -> None:
        log.info("bus_reconnected", url=url)

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
                error_cb=failed,
                reconnected_cb=reconnected,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # it sleeps for any number
                connect_timeout=2,
                ping_interval=5,
                max_outstanding_pings=2,
                drain_timeout=3,
            )
        except (nats.errors.Error, OSError, TimeoutError) as error:
            await failed(error)
            await anyio.sleep(RECONNECT_WAIT_S)
        else:
            return NatsBus(client, on_error)
