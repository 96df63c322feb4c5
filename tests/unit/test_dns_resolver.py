"""The proxy between a client and servers on loopback: who is asked, what is handed on, how much is open."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import dns.message
import dns.rcode
import dns.rrset
import pytest

from pykmesh.contracts.messages import VERSION, DnsOutcome, DnsReply
from pykmesh.kernel.records import ip_from_text
from services.dns_proxy import resolver, upstream
from services.dns_proxy.health import Health
from services.dns_proxy.resolver import Client, Resolver
from services.dns_proxy.slots import Slot, _pair
from services.dns_proxy.upstream import Target, Upstream

LOOPBACK, SERVER = "127.0.0.1", ip_from_text("10.96.0.53")
ZONE = [
    "z.test. 5 IN SOA ns. root. 7 3 3 3 3",
    "a.z.test. 5 IN A 192.0.2.1",
    "z.test. 5 IN SOA ns. root. 7 3 3 3 3",
]


class FakeAnswers:
    """map_writer's: an answer for `mesh.test`, else the way to the server."""

    def __init__(self) -> None:
        self.targets: list[Target] = []

    async def find(self, _client: tuple[bytes, ...], _server: bytes, name: str, **_: bool) -> DnsReply:
        outcome = DnsOutcome.ANSWER if name == "mesh.test" else DnsOutcome.FORWARD
        return DnsReply(VERSION, outcome, "", [], self.targets)


class Proxy:
    """A resolver, and what it is made of."""

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self.health = Health()
        self.answers = FakeAnswers()
        self.resolver = Resolver(self.answers, Upstream(0.5, self.health), self.health)  # type: ignore[arg-type]
        self._tasks = tasks

    def serve(self, client: Client, slot: Slot | None = None) -> Slot:
        slot = slot or a_slot()
        self._tasks.start_soon(self._serve, slot, client)
        return slot

    async def _serve(self, slot: Slot, client: Client) -> None:
        with contextlib.closing(slot):
            await self.resolver.serve(slot, client)


@pytest.fixture
def _no_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(_netns_fd: int, family: int, kind: int) -> socket.socket:
        return socket.socket(family, kind | socket.SOCK_NONBLOCK)

    monkeypatch.setattr(upstream, "socket_in", here)


@contextlib.asynccontextmanager
async def proxy() -> AsyncIterator[Proxy]:
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            yield Proxy(tasks)
            tasks.cancel_scope.cancel()


def a_slot() -> Slot:
    return Slot(b"", *_pair(socket.AF_INET, 0))


async def until(what: Callable[[], bool]) -> None:
    while not what():  # noqa: ASYNC110  (of what nobody tells)
        await anyio.sleep(0.002)


def a_client() -> Client:
    return Client(-1, [ip_from_text("10.1.0.1")], lambda _: SERVER)


@contextlib.contextmanager
def bound(kind: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK) as found:
        found.bind((LOOPBACK, 0))
        if kind == socket.SOCK_STREAM:
            found.listen()
        yield found


def target(server: socket.socket) -> Target:
    return ip_from_text(LOOPBACK), server.getsockname()[1]


def query(name: str = "other.test.", kind: str = "TXT") -> bytes:
    return dns.message.make_query(name, kind).to_wire()


async def ask(slot: Slot, data: bytes) -> dns.message.Message:
    """By UDP."""
    with bound(socket.SOCK_DGRAM) as own:
        own.connect((LOOPBACK, slot.port))
        await asyncio.get_running_loop().sock_sendall(own, data)
        return dns.message.from_wire(await asyncio.get_running_loop().sock_recv(own, 4096))


@contextlib.asynccontextmanager
async def connection(slot: Slot) -> AsyncIterator[anyio.abc.SocketStream]:
    async with await anyio.connect_tcp(LOOPBACK, slot.port) as found:
        yield found


async def send(stream: anyio.abc.SocketStream, data: bytes) -> None:
    await stream.send(len(data).to_bytes(2, "big") + data)


async def receive(stream: anyio.abc.SocketStream) -> dns.message.Message:
    """anyio.EndOfStream."""
    size = await stream.receive(2)
    data = b""
    while len(data) < int.from_bytes(size, "big"):
        data += await stream.receive()
    return dns.message.from_wire(data)


async def answer_datagrams(server: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        data, sender = await loop.sock_recvfrom(server, 4096)
        await loop.sock_sendto(
            server, dns.message.make_response(dns.message.from_wire(data)).to_wire(), sender
        )


@pytest.mark.anyio
@pytest.mark.usefixtures("_no_namespaces")
async def test_an_endpoint_that_refuses_datagrams_is_passed_by() -> None:
    with bound(socket.SOCK_DGRAM) as server, bound(socket.SOCK_DGRAM) as gone:
        refusing = target(gone)
        gone.close()
        async with proxy() as found, anyio.create_task_group() as tasks:
            tasks.start_soon(answer_datagrams, server)
            slot = found.serve(a_client())
            found.answers.targets = [target(server), refusing, refusing, refusing]
            for _ in range(5):
                assert (await ask(slot, query())).rcode() == dns.rcode.NOERROR
            assert found.health.upstream_failures == 0
            found.answers.targets = [refusing]
            assert (await ask(slot, query())).rcode() == dns.rcode.SERVFAIL
            assert found.health.upstream_failures == 1
            tasks.cancel_scope.cancel()


async def keep_answering(server: socket.socket, tasks: anyio.abc.TaskGroup, records: list[str]) -> None:
    """Each message on each connection, with all the records; no connection is closed."""
    while True:
        client, _ = await asyncio.get_running_loop().sock_accept(server)
        tasks.start_soon(_answer_all, client, records)


async def _answer_all(client: socket.socket, records: list[str]) -> None:
    with client:
        while (data := await upstream.receive(client, 20)) is not None:
            reply = dns.message.make_response(dns.message.from_wire(data))
            for text in records:
                name, ttl, of, kind, rest = text.split(" ", 4)
                reply.answer.append(dns.rrset.from_text(name, int(ttl), of, kind, rest))
            await upstream.send(client, reply.to_wire(), 20)


@pytest.mark.anyio
@pytest.mark.usefixtures("_no_namespaces")
@pytest.mark.parametrize("records", [ZONE, []], ids=["a zone", "nothing"])
async def test_after_a_transfer_the_next_question_is_answered_though_the_server_keeps_its_connection(
    records: list[str],
) -> None:
    with bound(socket.SOCK_STREAM) as server:
        async with proxy() as found, anyio.create_task_group() as tasks:
            tasks.start_soon(keep_answering, server, tasks, records)
            found.answers.targets = [target(server)]
            async with connection(found.serve(a_client())) as stream:
                for kind in ("AXFR", "TXT", "AXFR"):
                    await send(stream, query("z.test.", kind))
                    assert (await receive(stream)).question[0].rdtype.name == kind
            assert found.health.upstream_failures == 0
            tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.usefixtures("_no_namespaces")
async def test_a_transfer_that_breaks_off_ends_the_clients_connection_and_is_no_failure() -> None:
    with bound(socket.SOCK_STREAM) as server:
        async with proxy() as found, anyio.create_task_group() as tasks:
            tasks.start_soon(keep_answering, server, tasks, ZONE[:2])
            found.answers.targets = [target(server)]
            async with connection(found.serve(a_client())) as stream:
                await send(stream, query("z.test.", "AXFR"))
                assert len((await receive(stream)).answer) == 2
                with pytest.raises(anyio.EndOfStream):
                    await receive(stream)
            assert found.health.upstream_failures == 0
            tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.usefixtures("_no_namespaces")
async def test_a_pods_questions_are_counted_together_and_leave_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolver, "OPEN_OF_POD_MAX", 2)
    with bound(socket.SOCK_DGRAM) as silent, bound(socket.SOCK_DGRAM) as own:
        async with proxy() as found:
            found.answers.targets = [target(silent)]
            one, client = found.serve(a_client()), a_client()
            for slot in (found.serve(client), found.serve(client), found.serve(client)):
                own.sendto(query(), (LOOPBACK, slot.port))
            await until(lambda: found.health.dropped == 1)
            assert found.resolver.open == client.open == 2
            assert (await ask(one, query("mesh.test.", "A"))).rcode() == dns.rcode.NOERROR
            await until(lambda: client.open == 0)
            assert found.resolver.open == 0


@pytest.mark.anyio
@pytest.mark.usefixtures("_no_namespaces")
async def test_connections_without_a_question_are_no_questions_and_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolver, "IDLE_OF_POD_MAX", 2)
    with bound(socket.SOCK_STREAM) as silent:
        async with proxy() as found, contextlib.AsyncExitStack() as opened:
            found.answers.targets = [target(silent)]
            client = a_client()
            slots = [found.serve(client), found.serve(client)]
            first, second = [await opened.enter_async_context(connection(slot)) for slot in slots]
            await until(lambda: client.idle == 2)
            assert found.resolver.open == 0
            third = await opened.enter_async_context(connection(slots[0]))
            with pytest.raises(anyio.EndOfStream):
                await receive(third)
            assert found.health.dropped == 1
            await send(first, query())
            await until(lambda: (client.idle, client.open) == (1, 1))
            fourth = await opened.enter_async_context(connection(slots[0]))
            for stream in (second, fourth):
                await send(stream, query("mesh.test.", "A"))
                assert (await receive(stream)).rcode() == dns.rcode.NOERROR


class Through:
    """A socket, but for what is overridden."""

    def __init__(self, real: socket.socket, **own: Callable[..., Any]) -> None:
        self._real = real
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.anyio
async def test_a_question_that_is_cancelled_before_its_first_step_holds_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolver, "OPEN_OF_POD_MAX", 1)
    async with proxy() as found:
        slot, client, scope = a_slot(), a_client(), anyio.CancelScope()
        real = slot.udp

        def receive_and_cancel(size: int) -> Any:
            data = real.recvfrom(size)
            scope.cancel()
            return data

        slot.udp = Through(real, recvfrom=receive_and_cancel)  # type: ignore[assignment]
        with scope, contextlib.closing(slot), bound(socket.SOCK_DGRAM) as own:
            own.sendto(query("mesh.test.", "A"), (LOOPBACK, slot.port))
            await found.resolver.serve(slot, client)
        assert (await ask(found.serve(client), query("mesh.test.", "A"))).rcode() == dns.rcode.NOERROR


@pytest.mark.anyio
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_without_room_for_a_connection_the_proxy_rests_and_takes_it_later(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(resolver, "REST_S", 0.02)
    tries, slot = 0, a_slot()
    real, is_exhausted = slot.tcp, True

    def accept() -> Any:
        nonlocal tries
        tries += 1
        if is_exhausted:
            raise OSError(number, "none is left")
        return real.accept()

    slot.tcp = Through(real, accept=accept)  # type: ignore[assignment]
    async with proxy() as found:
        found.serve(a_client(), slot)
        async with connection(slot) as stream:
            await until(lambda: tries > 0)
            with anyio.move_on_after(0.1):
                await anyio.sleep_forever()
            assert tries < 10
            is_exhausted = False
            await send(stream, query("mesh.test.", "A"))
            assert (await receive(stream)).rcode() == dns.rcode.NOERROR
