"""What xds_client does with a response, beside what is asked of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest

from pykmesh.contracts.messages import ResourceType
from pykmesh.contracts.settings import XdsClientSettings
from pykmesh.process import Runtime
from services.xds_client import app, connection, protocol
from services.xds_client.app import XdsClient
from services.xds_client.pace import BACKOFF_MAX_S, Pace
from services.xds_client.publisher import Publisher
from services.xds_client.store import Store
from tests.control.resources import pod, uid, unknown_field
from tests.control.scripted_ads import ADDRESS, serving
from tests.unit.test_publisher import Log

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_event_loop")]


HOUR_S = 3600.0


class Node:
    """Half of a cycle."""

    def __init__(self) -> None:
        self.itself: Any = self


@pytest.fixture
def client() -> Iterator[XdsClient]:
    store = Store()
    publisher = Publisher(store, Log(), 64, 0.0)
    yield XdsClient(Runtime("xds_client", XdsClientSettings()), store, publisher)
    gc.unfreeze()


class Broken:
    """A stream that ends while its first request is written: grpc.aio says this, not the server's status."""

    def done(self) -> bool:
        return False

    async def write(self, _request: protocol.Request) -> None:
        none = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, none, none, "Internal error from Core")


@pytest.mark.parametrize(("count", "named"), [(10, 10), (2000, 0)])
async def test_after_a_large_request_that_was_cut_short_nothing_is_named_until_a_response_comes(
    client: XdsClient, count: int, named: int
) -> None:
    pods = [pod(f"p-{n}", f"10.2.{n // 250}.{n % 250}") for n in range(count)]
    sent = protocol.discovery_pb2.DeltaDiscoveryResponse(type_url=ADDRESS, resources=pods)
    await client._take(sent.SerializeToString())
    with pytest.raises(grpc.aio.AioRpcError):
        await client._open(cast("connection.Stream", Broken()))
    assert len(client._first_requests()[0].initial_resource_versions) == named
    await client._take(sent.SerializeToString())
    assert len(client._first_requests()[0].initial_resource_versions) == count


class Hours:
    """A clock that goes on by what is slept, for nobody else."""

    def __init__(self) -> None:
        self.now, self.sleeps = 0.0, 0
        self.later: Callable[[], Awaitable[None]] | None = None
        """What is done after an hour."""

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1
        if self.later is not None and self.now >= HOUR_S:
            await self.later()
            self.later = None
        await anyio.lowlevel.checkpoint()


async def test_a_control_plane_that_is_away_for_an_hour_and_back_with_less_is_followed_again() -> None:
    """Real streams to a real port at which nobody listens; nothing is forgotten meanwhile."""
    store, hours = Store(), Hours()
    async with serving() as plane, anyio.create_task_group() as tasks:
        settings = XdsClientSettings(xds_address=f"127.0.0.1:{plane.port}")
        client = XdsClient(Runtime("xds_client", settings), store, Publisher(store, Log(), 64, 0.0))
        tasks.start_soon(client.run, Pace(lambda: hours.now), hours.sleep)
        await plane.next_stream()
        await plane.push(pod("a", "10.1.0.1"), pod("b", "10.1.0.2"))
        streams, hours.later = len(plane.streams), plane.start
        await plane.stop()
        del plane.state[ADDRESS][uid("b")]
        with anyio.fail_after(20):
            while hours.later is not None:
                await anyio.sleep(0.01)
                assert (
                    store.versions(ResourceType.ADDRESS).keys() == {uid("a"), uid("b")} or hours.later is None
                )
        assert hours.sleeps < HOUR_S / BACKOFF_MAX_S * 2 + 20, "asked less often than a pause is at least"
        await plane.next_stream(streams)
        with anyio.fail_after(20):
            while store.versions(ResourceType.ADDRESS).keys() != {uid("a")}:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("asked", "detail", "too_large"),
    [
        (1 << 20, "grpc: received message larger than max (1048576 vs. 50000)", True),
        (1 << 10, "received message larger than max", True),
        (1 << 20, "request rate limit exceeded: context deadline exceeded", False),
        (1 << 20, "", True),
        (1 << 10, "", False),
    ],
)
def test_a_request_was_too_large_only_where_it_may_have_been(
    client: XdsClient, asked: int, detail: str, *, too_large: bool
) -> None:
    client._asked_bytes = asked
    assert client._was_too_large(detail) is too_large


def bulk() -> bytes:
    large = pod("a", "10.1.0.1")
    large.resource.value += unknown_field(app.BULK_BYTES)
    sent = protocol.discovery_pb2.DeltaDiscoveryResponse(type_url=ADDRESS, resources=[large])
    return sent.SerializeToString()


async def test_only_a_streams_first_response_freezes_and_what_died_since_the_last_time_is_collected(
    client: XdsClient,
) -> None:
    node = Node()
    gone = weakref.ref(node)
    await client._take(bulk())
    client._freeze()
    frozen = gc.get_freeze_count()
    assert frozen > 0
    del node
    later = [Node() for _ in range(1000)]
    await client._take(bulk())
    client._freeze()
    assert gc.get_freeze_count() <= frozen
    gc.collect()
    assert gone() is not None, "it is frozen"
    client._first_requests()
    await client._take(bulk())
    client._freeze()
    assert gc.get_freeze_count() > frozen + 900
    assert gone() is None
    assert len(later) == 1000
    assert gc.isenabled()
