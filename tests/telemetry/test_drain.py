"""Draining: every record becomes part of a sum once, at the rate of a busy node."""

from __future__ import annotations

import anyio
import pytest

from pykmesh.kernel.layout import Direction, FlowKind
from pykmesh.kernel.ring import RingReader
from services.telemetry.ledger import Amounts
from tests.telemetry.books import Books, Producer
from tests.telemetry.kernel import UDP, Instance
from tests.telemetry.waiting import until

pytestmark = pytest.mark.anyio
RATE = 30_000


async def test_what_a_busy_node_records_is_drained_without_loss(node: Instance):
    """At a rate that leaves room in the ring on a busy machine too: `bench.drain` has the figures."""
    with RingReader(node.maps_dir) as ring:
        books, producer = Books(ring), Producer(node, RATE, seconds=2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(books.drain.run, 0.01)
            producer.start()
            with anyio.fail_after(60):
                await anyio.to_thread.run_sync(producer.join)
            await until("empty ring", lambda: not ring.lag_bytes)
            tasks.cancel_scope.cancel()
        drained = books.drain.drained
        assert (drained, node.lost()) == (producer.tried, 0)
        assert books.totals() == Amounts(
            closed=drained, request_bytes=10 * drained, response_bytes=1000 * drained
        )
        assert books.published == drained


async def test_a_reader_that_comes_late_drains_what_fitted_and_the_rest_is_counted_as_lost(small: Instance):
    small.emit(2000)
    with RingReader(small.maps_dir) as ring:
        books = Books(ring)
        while books.drain.turn(max_n=100):
            pass
        assert books.totals().closed == books.drain.drained == 2000 - small.lost()
        assert small.lost() > 0


async def test_a_turn_is_bounded_and_the_rest_waits_in_the_ring(small: Instance):
    small.emit(300)
    with RingReader(small.maps_dir) as ring:
        books = Books(ring)
        assert [books.drain.turn(max_n=128) for _ in range(4)] == [128, 128, 44, 0]


async def test_a_drain_that_ends_between_turns_loses_nothing_to_the_next(small: Instance):
    small.emit(300)
    counted = 0
    for _ in range(4):
        with RingReader(small.maps_dir) as ring:
            books = Books(ring)
            books.drain.turn(max_n=100)
            counted += books.totals().closed
    assert counted == 300


async def test_each_kind_of_end_is_counted_as_what_it_is(small: Instance):
    small.emit(5)
    small.emit(4, direction=Direction.INBOUND)
    small.emit(3, established=False)
    small.emit(2, kind=FlowKind.REFUSED, established=False, reason=2)
    small.emit(7, protocol=UDP)
    with RingReader(small.maps_dir) as ring:
        books = Books(ring)
        books.drain.turn()
        sent, received = 5 * 10 + 4 * 1000, 5 * 1000 + 4 * 10
        assert books.totals() == Amounts(closed=9, failed=5, request_bytes=sent, response_bytes=received)
        assert books.drain.drained == 21
