"""Names: asked in batches, kept for a while, never waited for."""

from __future__ import annotations

import anyio
import pytest

from pykmesh.bus import BusUnavailableError
from pykmesh.contracts import messages
from pykmesh.contracts.messages import NamesChanged, ResolveReply, ResolveRequest, Subject
from services.telemetry import names as module
from services.telemetry.names import BATCH, Cache, Names
from tests.telemetry.rows import CLIENT, SERVER, WEB, Clock, ip, workload
from tests.telemetry.waiting import until

pytestmark = pytest.mark.anyio


class MapWriter:
    """Answers as map_writer does, or is away."""

    connected = True

    def __init__(self) -> None:
        self.workloads = {ip(CLIENT): workload("client")}
        self.services = {7: WEB}
        self.away = False
        self.requests: list[ResolveRequest] = []

    async def request(self, subject: str, data: bytes) -> bytes:
        assert subject == Subject.MAP_RESOLVE
        asked = messages.decode(ResolveRequest, data)
        self.requests.append(asked)
        if self.away:
            raise BusUnavailableError("away")
        services = [self.services.get(number) for number in asked.services]
        addresses = [self.workloads.get(address) for _, address in asked.addresses]
        return messages.encode(ResolveReply(messages.VERSION, services, addresses))


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_a_question_is_asked_once_and_its_answer_kept_until_it_is_old(clock: Clock):
    cache: Cache[int, str] = Cache(clock)
    assert cache.find(1).value is None
    cache.find(1)
    assert cache.next_questions() == [1]
    cache.find(1)
    assert cache.next_questions() == []
    cache.answer([1], ["one"])
    assert cache.find(1).value == "one"
    clock.now += module.FRESH_S + 1
    assert cache.find(1).value == "one"
    assert cache.next_questions() == [1]


async def test_nobody_by_that_name_is_believed_for_a_short_time_only(clock: Clock):
    cache: Cache[int, str] = Cache(clock)
    cache.find(1)
    cache.answer(cache.next_questions(), [None])
    cache.find(1)
    assert cache.next_questions() == []
    clock.now += module.UNKNOWN_FRESH_S + 1
    cache.find(1)
    assert cache.next_questions() == [1]


async def test_the_cache_drops_what_was_used_longest_ago(clock: Clock):
    cache: Cache[int, int] = Cache(clock, limit=3)
    cache.answer([1, 2, 3], [1, 2, 3])
    cache.find(1)
    cache.answer([4], [4])
    assert len(cache) == 3
    assert [cache.find(n).value for n in (1, 2, 3, 4)] == [1, None, 3, 4]


async def test_whose_a_key_was_before_is_known_for_that_time(clock: Clock):
    cache: Cache[int, str] = Cache(clock)
    cache.change([1], ["nobody has asked for it"])
    assert len(cache) == 0
    cache.answer([1], ["one"])
    for name in ("two", None, "three"):
        clock.now += 10
        cache.change([1], [name])
    first = clock.now - 30
    assert [cache.at(1, first + after) for after in (1, 11, 31)] == ["one", "two", "three"]
    clock.now += 10
    cache.answer([1], [None])
    assert cache.at(1, clock.now - 1) == "three"
    assert cache.at(1, clock.now + 1) is None


async def test_an_address_that_becomes_somebody_elses_is_told_at_once(clock: Clock):
    found, told = Names("net1", clock), []
    found.on_change = lambda: told.append(found.workload(ip(CLIENT)).value)
    found.workloads.answer([ip(CLIENT)], [workload("client")])
    news = NamesChanged(
        messages.VERSION,
        [("net1", ip(CLIENT)), ("net2", ip(CLIENT))],
        [workload("other"), workload("of another network")],
    )
    await found.changed(messages.encode(news), {})
    assert told == [workload("other")]
    await found.changed(b"garbage", {})
    assert found.workload(ip(CLIENT)).value == workload("other")


async def test_open_questions_are_bounded_and_asked_in_batches(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "WANTED_MAX", BATCH + 10)
    cache: Cache[int, int] = Cache(clock)
    for number in range(BATCH + 20):
        cache.find(number)
    assert cache.unasked == 10
    assert len(cache.next_questions()) == BATCH
    assert len(cache.next_questions()) == 10


async def test_names_come_by_the_bus_in_one_request():
    found, writer = Names("net1"), MapWriter()
    found.bus = writer
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.run, 0.001)
        await found.settle({7}, {ip(CLIENT), ip(SERVER)}, 5)
        tasks.cancel_scope.cancel()
    assert found.service(7).value == WEB
    assert found.workload(ip(CLIENT)).value == workload("client")
    assert found.workload(ip(SERVER)).value is None
    assert len(writer.requests) == 1
    assert {network for network, _ in writer.requests[0].addresses} == {"net1"}


async def test_while_map_writer_is_away_nobody_waits_for_it_and_questions_stay_open(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "RETRY_S", 0.001)
    found, writer = Names(""), MapWriter()
    found.bus, writer.away = writer, True
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.run, 0.001)
        with anyio.fail_after(5):
            await found.settle({7}, set(), 1000)
        assert found.service(7).value is None
        writer.away = False
        await until("name", lambda: found.service(7).value == WEB)
        tasks.cancel_scope.cancel()


async def test_what_has_no_address_and_no_service_is_not_asked_for():
    found = Names("")
    assert found.service(0).value is None
    assert found.workload(ip("")).value is None
    assert found.services.next_questions() == []
    assert found.workloads.next_questions() == []
