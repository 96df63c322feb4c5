"""What xds_client puts on the log of a response that names nothing that is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pykmesh.bus import Answer, Headers, Receive
from pykmesh.contracts import messages
from pykmesh.contracts.messages import BATCH_BYTES, TYPE_URLS, ConfigBatch, ResourceType
from services.xds_client import protocol
from services.xds_client.publisher import Publisher
from services.xds_client.store import Store
from tests.control.resources import Resource, pod, policy, service, uid

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_event_loop")]


class Log:
    """A bus that keeps what is published."""

    connected = True

    def __init__(self) -> None:
        self.batches: list[ConfigBatch] = []

    async def publish(self, _subject: str, data: bytes, _headers: Headers | None = None) -> None:
        self.batches.append(messages.decode(ConfigBatch, data))

    async def request(self, _subject: str, _data: bytes) -> bytes:
        raise NotImplementedError

    async def subscribe(self, _subject: str, _receive: Receive) -> None:
        raise NotImplementedError

    async def serve(self, _subject: str, _answer: Answer) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class World:
    """A store, its publisher and the log."""

    def __init__(self) -> None:
        self.store, self.log = Store(), Log()
        self._publisher = Publisher(self.store, self.log, 64, 0.0)

    async def respond(
        self,
        *resources: Resource,
        is_whole: bool = False,
        is_first: bool = False,
        kind: ResourceType = ResourceType.ADDRESS,
        gone: Sequence[str] = (),
    ) -> list[ConfigBatch]:
        """What one response puts on the log."""
        self.log.batches = []
        sent = protocol.discovery_pb2.DeltaDiscoveryResponse(
            type_url=TYPE_URLS[kind], resources=resources, removed_resources=gone
        )
        parsed = protocol.parse(sent.SerializeToString())
        await self._publisher.publish(protocol.Reading(parsed, is_whole=is_whole, is_first=is_first))
        return self.log.batches

    def held(self, kind: ResourceType = ResourceType.ADDRESS) -> set[str]:
        return set(self.store.held[kind])


@pytest.fixture
async def world() -> World:
    found = World()
    await found.respond(service("web", "10.96.0.1"), *(pod(f"p-{n}", f"10.1.0.{n}") for n in range(9)))
    await found.respond(policy("p"), kind=ResourceType.AUTHORIZATION)
    return found


async def test_what_a_whole_response_lacks_is_removed_and_what_is_unchanged_is_no_news(world: World) -> None:
    there = [service("web", "10.96.0.1"), *(pod(f"p-{n}", f"10.1.0.{n}") for n in range(7))]
    (batch,) = await world.respond(*there, pod("new", "10.1.0.99"), is_whole=True)
    assert set(batch.removed) == {uid("p-7"), uid("p-8")}
    assert [upsert.name for upsert in batch.upserts] == [uid("new")]
    assert batch.complete
    assert world.held() == {item.name for item in there} | {uid("new")}
    assert world.held(ResourceType.AUTHORIZATION) == {"shop/p"}, "another type's"


async def test_an_empty_whole_response_removes_everything_of_its_type(world: World) -> None:
    (batch,) = await world.respond(is_whole=True)
    assert len(batch.removed) == 10
    assert batch.complete
    assert world.held() == set()
    assert world.held(ResourceType.AUTHORIZATION) == {"shop/p"}


async def test_an_ordinary_response_removes_nothing_by_its_silence(world: World) -> None:
    before = world.held()
    assert await world.respond() == []
    assert world.held() == before


async def test_what_is_rejected_in_a_whole_response_is_not_gone(world: World) -> None:
    bad = pod("p-1", "10.1.0.1")
    bad.resource.value = b""
    (batch,) = await world.respond(bad, is_whole=True)
    assert uid("p-1") not in batch.removed
    assert world.held() == {uid("p-1")}


def broken(name: str) -> Resource:
    found = service(name, "10.96.0.99")
    found.resource.value = b""
    return found


async def test_what_was_rejected_and_never_held_is_removed_all_the_same(world: World) -> None:
    """map_writer may have it of an epoch before."""
    (batch,) = await world.respond(broken("a"), broken("b"), broken("c"), service("d", "10.96.0.4"))
    names = [broken(name).name for name in "abc"]
    assert batch.rejected == names
    (batch,) = await world.respond(gone=names[:1])
    assert batch.removed == names[:1]
    (batch,) = await world.respond(broken("b"), is_first=True)
    assert batch.removed == names[2:], "the control plane says it no more, and never learnt that it was held"
    assert [*world.store.rejected[ResourceType.ADDRESS]] == names[1:2]
    assert await world.respond(broken("b"), is_first=True) == []


async def test_what_was_put_back_to_what_is_held_is_rejected_no_more(world: World) -> None:
    bad = pod("p-1", "10.1.0.1")
    bad.resource.value = b""
    await world.respond(bad)
    assert world.store.rejected[ResourceType.ADDRESS]
    assert await world.respond(is_first=True) == [], "it is as it was, so it is not said"
    assert not world.store.rejected[ResourceType.ADDRESS]
    assert uid("p-1") in world.held()


async def test_who_took_a_snapshot_in_the_midst_gets_a_last_batch(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a response that says nothing new: without it he would wait for one."""
    put, taken = world.store.put, list[bool]()

    def put_while_asked(*said: Any) -> list[messages.Resource]:
        page = world.store.snapshot("")
        assert page is not None
        taken.append(page.synced)
        return put(*said)

    monkeypatch.setattr(world.store, "put", put_while_asked)
    (batch,) = await world.respond(service("web", "10.96.0.1"))
    assert taken == [False]
    assert (batch.complete, batch.synced, batch.upserts) == (True, True, [])
    monkeypatch.undo()
    assert await world.respond(service("web", "10.96.0.1")) == []


async def test_nothing_is_taken_for_gone_while_a_resource_has_no_name(world: World) -> None:
    before, nameless = world.held(), pod("p-1", "10.1.0.1")
    nameless.name = ""
    (batch,) = await world.respond(nameless, is_whole=True)
    assert (batch.removed, batch.upserts) == ([], [])
    assert world.held() == before


async def test_removals_follow_the_upserts_and_only_the_last_batch_is_complete(world: World) -> None:
    many = [pod(f"{'x' * 200}-{n}", f"10.2.{n // 250}.{n % 250}") for n in range(3000)]
    await world.respond(*many)
    new = [pod(f"{'y' * 200}-{n}", f"10.3.{n // 250}.{n % 250}") for n in range(3000)]
    batches = await world.respond(*new, is_whole=True)
    assert [batch.complete for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert [batch.seq for batch in batches] == list(range(batches[0].seq, batches[0].seq + len(batches)))
    removing = [index for index, batch in enumerate(batches) if batch.removed]
    assert removing[0] > 1, "the first batches bring what is new"
    assert removing == list(range(removing[0], len(batches)))
    assert sum(len(batch.removed) for batch in batches) == 3000 + 10
    assert max(sum(map(len, batch.removed)) for batch in batches) < BATCH_BYTES + 1000
    assert world.held() == {item.name for item in new}
