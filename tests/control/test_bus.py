"""The bus on a real broker: in order, with answers or a clear error, and back after each loss."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest

from pykmesh import bus
from pykmesh.bus import BusUnavailableError, Headers, NatsBus
from pykmesh.contracts import messages
from pykmesh.contracts.messages import SnapshotRequest, Subject
from pykmesh.contracts.settings import CommonSettings
from pykmesh.node.broker import MAX_PAYLOAD_BYTES
from pykmesh.node.mesh import Options
from pykmesh.process import Runtime
from tests.control.mesh_node import MeshNode, running, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_event_loop")]


class Wired(NamedTuple):
    """A broker with the development node's permissions, and its two ends."""

    node: MeshNode
    client: NatsBus
    writer: NatsBus
    errors: list[str]


@pytest.fixture
async def wired(tmp_path: Path, one_event_loop: None) -> AsyncIterator[Wired]:
    async with running(tmp_path, Options(xds_address="127.0.0.1:1"), ("nats",)) as node:
        errors: list[str] = []
        url = f"nats://127.0.0.1:{node.instance.ports.nats}"
        client = await bus.connect(url, "xds_client", node.instance.secret("xds_client"), errors.append)
        writer = await bus.connect(url, "map_writer", node.instance.secret("map_writer"), errors.append)
        errors.clear()  # the broker may not have listened yet
        try:
            yield Wired(node, client, writer, errors)
        finally:
            await client.close()
            await writer.close()


async def _listen(end: NatsBus, subject: str) -> list[tuple[bytes, dict[str, str]]]:
    heard: list[tuple[bytes, dict[str, str]]] = []

    async def receive(data: bytes, headers: Headers) -> None:
        heard.append((data, dict(headers)))

    await end.subscribe(subject, receive)
    return heard


async def _answered(wired: Wired, question: bytes) -> bytes:
    """As soon as somebody answers."""
    with anyio.fail_after(20):
        while True:
            try:
                return await wired.writer.request(Subject.CONFIG_SNAPSHOT, question)
            except BusUnavailableError:
                await anyio.sleep(0.02)


async def test_messages_of_a_subject_arrive_in_order_with_their_headers(wired: Wired) -> None:
    heard = await _listen(wired.writer, Subject.CONFIG_LOG)
    await _until_subscribed(wired, heard)
    for number in range(500):
        await wired.client.publish(Subject.CONFIG_LOG, str(number).encode(), {"n": str(number)})
    await until("all messages", lambda: len(heard) == 500)
    assert heard == [(str(n).encode(), {"n": str(n)}) for n in range(500)]


async def _until_subscribed(wired: Wired, heard: list[tuple[bytes, dict[str, str]]]) -> None:
    with anyio.fail_after(20):
        while not heard:
            if wired.client.connected:
                await wired.client.publish(Subject.CONFIG_LOG, b"first")
            await anyio.sleep(0.02)
    # Those that were sent meanwhile are in order before what comes now.
    await wired.client.publish(Subject.CONFIG_LOG, b"last")
    await until("the last of them", lambda: heard[-1][0] == b"last")
    heard.clear()


async def test_a_request_is_answered_and_one_that_nobody_answers_says_so(wired: Wired) -> None:
    with pytest.raises(
        BusUnavailableError, match=f"request to {Subject.CONFIG_SNAPSHOT}: nats: no responders"
    ):
        await wired.writer.request(Subject.CONFIG_SNAPSHOT, b"")

    async def answer(data: bytes) -> bytes:
        return data[::-1]

    await wired.client.serve(Subject.CONFIG_SNAPSHOT, answer)
    assert await _answered(wired, b"abc") == b"cba"


async def test_a_message_that_the_broker_does_not_take_is_an_error_of_this_message_only(wired: Wired) -> None:
    heard = await _listen(wired.writer, Subject.CONFIG_LOG)
    await _until_subscribed(wired, heard)
    with pytest.raises(BusUnavailableError, match=f"publish {MAX_PAYLOAD_BYTES + 1} bytes"):
        await wired.client.publish(Subject.CONFIG_LOG, bytes(MAX_PAYLOAD_BYTES + 1))
    await wired.client.publish(Subject.CONFIG_LOG, b"small")
    await until("the small one", lambda: heard == [(b"small", {})])


async def test_what_a_process_may_not_say_or_hear_is_refused_and_told(wired: Wired) -> None:
    heard = await _listen(wired.client, Subject.CONFIG_LOG)
    await wired.writer.publish(Subject.CONFIG_LOG, b"forged")
    await until("two errors", lambda: len(wired.errors) >= 2)
    assert all("permissions violation" in error.lower() for error in wired.errors)
    assert heard == []


async def test_without_a_broker_nothing_is_kept_and_with_one_again_subscriptions_are_there(
    wired: Wired,
) -> None:
    heard = await _listen(wired.writer, Subject.CONFIG_LOG)
    await _until_subscribed(wired, heard)
    for _ in range(2):
        pid = wired.node.supervisor.pids["nats"]
        os.kill(pid, signal.SIGKILL)
        await until("the loss", lambda: not wired.client.connected)
        with pytest.raises(BusUnavailableError, match="no broker"):
            await wired.client.publish(Subject.CONFIG_LOG, b"dropped")
        await until("the broker", lambda: wired.client.connected and wired.writer.connected)
        await _until_subscribed(wired, heard)
    assert all(data != b"dropped" for data, _ in heard)


async def test_a_process_that_has_lost_the_broker_is_not_ready_until_it_is_back(wired: Wired) -> None:
    found = wired.node.instance
    settings = CommonSettings(
        nats_url=f"nats://127.0.0.1:{found.ports.nats}", nats_password_file=found.secret("xds_client")
    )
    runtime = Runtime("xds_client", settings)
    connection = await runtime.connect_bus()
    try:
        assert runtime.status()["ready"]
        os.kill(wired.node.supervisor.pids["nats"], signal.SIGKILL)
        await until("the loss", lambda: runtime.waits_for == ["bus"])
        assert not runtime.status()["ready"]
        await until("the broker", lambda: runtime.waits_for == [])
        assert runtime.status()["ready"]
    finally:
        await connection.close()


async def test_a_question_that_is_not_understood_is_told_and_answered_with_no_byte(wired: Wired) -> None:
    async def answer(data: bytes) -> bytes:
        return messages.encode(messages.decode(SnapshotRequest, data))

    await wired.client.serve(Subject.CONFIG_SNAPSHOT, answer)
    assert await _answered(wired, b"nonsense") == b""
    (told,) = wired.errors
    assert told.startswith("asked on pykmesh.v1.config.snapshot: ")
    good = messages.encode(SnapshotRequest(messages.VERSION, ""))
    assert await _answered(wired, good) == good
