"""The proxy between a client and servers on loopback: who is asked, what is handed on, how much is open."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import anyio
import dns.message
import dns.rcode
import dns.rrset
import pytest

from pykmesh.contracts.messages import VERSION, DnsOutcome, DnsReply
from pykmesh.kernel.records import ip_from_text
from services.dns_proxy import upstream
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

    def serve(self, client: Client) -> Slot:
        slot = Slot(b"", *_pair(socket.AF_INET, 0))
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
