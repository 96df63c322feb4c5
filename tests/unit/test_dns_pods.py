"""In which pods the proxy listens, and what the programs read of it; the namespaces are the test's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anyio
import pytest

from pykmesh.kernel.records import (
    DNS_KEY,
    DNS_LISTENER,
    DNS_SLOTS,
    NO_IP,
    POD_KEY,
    POD_VALUE,
    ip_from_text,
    port_number,
)
from services.dns_proxy import pods
from services.dns_proxy.health import Health
from services.dns_proxy.pods import Pods
from services.dns_proxy.resolver import Resolver
from services.dns_proxy.slots import Slot, _pair

COOKIE = 7


class FakeMap:
    """One map, in memory."""

    def __init__(self, entries: dict[bytes, bytes]) -> None:
        self.entries = entries

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(list(self.entries.items()))

    def get(self, key: bytes) -> bytes | None:
        return self.entries.get(key)

    def write(self, keys: bytes, values: bytes) -> None:
        for number in range(len(keys) // DNS_KEY.size):
            key = keys[number * DNS_KEY.size :][: DNS_KEY.size]
            self.entries[key] = values[number * DNS_LISTENER.size :][: DNS_LISTENER.size]

    def erase(self, keys: bytes) -> None:
        for at in range(0, len(keys), DNS_KEY.size):
            del self.entries[keys[at : at + DNS_KEY.size]]


class FakePins:
    """An instance with one pod."""

    def __init__(self) -> None:
        client = POD_VALUE.pack(ip_from_text("10.1.0.1"), NO_IP, 0, 1)
        self.pods = FakeMap({POD_KEY.pack(COOKIE): client})
        self.listeners = FakeMap({})
        self.servers = FakeMap({})

    def are_current(self) -> bool:
        return True

    def listening(self) -> dict[int, tuple[int, int]]:
        """By slot: the beat and the port."""
        found = {}
        for key, value in self.listeners.items():
            beat_ns, port, _ = DNS_LISTENER.unpack(value)
            found[DNS_KEY.unpack(key)[1]] = beat_ns, port_number(port)
        return found


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> FakePins:
    def ask_for_namespaces(_path: Path, cookies: Sequence[int]) -> dict[int, int]:
        return {cookie: os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC) for cookie in cookies}

    def listen(_netns_fd: int, cookie: int, wanted: Sequence[tuple[int, int]]) -> list[Slot]:
        return [Slot(DNS_KEY.pack(cookie, slot), *_pair(socket.AF_INET, port)) for slot, port in wanted[:4]]

    monkeypatch.setattr(pods, "ask_for_namespaces", ask_for_namespaces)
    monkeypatch.setattr(pods, "listen", listen)
    return FakePins()


async def run(pins: FakePins, look: Callable[[], None]) -> None:
    """A process from its start to an orderly end; `look` at what it does."""
    resolver = Resolver(None, None, Health())  # type: ignore[arg-type]
    found = Pods(pins, Path("/"), resolver, 60.0, print)  # type: ignore[arg-type]
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            await tasks.start(found.run)
            look()
            tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_an_orderly_end_has_no_beat_and_the_next_process_takes_the_ports_back(pins: FakePins) -> None:
    ports: list[list[int]] = []

    def look() -> None:
        beats, found = zip(*pins.listening().values(), strict=True)
        assert all(beats)
        ports.append(list(found))

    for _ in range(2):
        await run(pins, look)
        assert [beat for beat, _ in pins.listening().values()] == [0] * 4
    assert ports[0] == ports[1]


@pytest.mark.anyio
async def test_what_is_written_of_a_pod_goes_when_it_has_gone(pins: FakePins) -> None:
    await run(pins, lambda: None)
    pins.pods.entries.clear()
    await run(pins, lambda: None)
    assert pins.listening() == {}


@pytest.mark.anyio
async def test_slots_that_could_not_be_had_are_had_later(
    pins: FakePins, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen, is_up = pods.listen, False

    def late(netns_fd: int, cookie: int, wanted: Sequence[tuple[int, int]]) -> list[Slot]:
        return listen(netns_fd, cookie, wanted if is_up else wanted[:1])

    monkeypatch.setattr(pods, "listen", late)
    monkeypatch.setattr(pods, "REFILL_S", 0.05)
    found = Pods(pins, Path("/"), Resolver(None, None, Health()), 60.0, print)  # type: ignore[arg-type]
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            await tasks.start(found.run)
            assert pins.listening().keys() == {0}
            is_up = True
            while len(pins.listening()) < DNS_SLOTS // 2:  # noqa: ASYNC110  (it does not say when)
                await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()
