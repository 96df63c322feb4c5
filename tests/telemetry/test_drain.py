"""Draining: every record becomes part of a sum once, at the rate of a busy node."""

from __future__ import annotations

import threading
import time

import anyio
import pytest

from pykmesh.kernel.layout import Direction, FlowKind
from pykmesh.kernel.ring import RingReader
from services.telemetry.flows import Drain, Records
from services.telemetry.ledger import NAMES_WAIT_S, Amounts, Ledger, of_tcp, without_names
from services.telemetry.names import Names
from tests.telemetry.kernel import UDP, Instance
from tests.telemetry.rows import Clock
from tests.telemetry.waiting import until

pytestmark = pytest.mark.anyio
RATE = 300_000
STEP_S = 0.01


class Books:
    """A drain whose names are nobody's."""

    def __init__(self, ring: RingReader) -> None:
        self.clock = Clock()
        self.ledger = Ledger(of_tcp(Names("", self.clock)), without_names, self.clock)
        self.published = 0
        self.drain = Drain(ring, self.ledger, self._publish)

    def _publish(self, records: Records) -> None:
        self.published += len(records)

    def totals(self) -> Amounts:
        self.clock.now += NAMES_WAIT_S + 1
        self.ledger.settle()
        sums = Amounts()
        for _, amounts in self.ledger.snapshot():
            sums = sums.plus(amounts)
        return sums


class Producer(threading.Thread):
    """Writes at a steady rate for a while; the kernel's work is done without the interpreter's lock."""

    def __init__(self, node: Instance, seconds: float) -> None:
        super().__init__()
        self._node = node
        self._seconds = seconds
        self.tried = self.written = 0
        self.took_s = 0.0

    def run(self) -> None:
        started = time.monotonic()
        while self.took_s < self._seconds:
            due = int((self.took_s + STEP_S) * RATE) - self.tried
            self.written += self._node.emit(due, pairs=50)
            self.tried += due
            time.sleep(max(started + self.tried / RATE - time.monotonic(), 0))
            self.took_s = time.monotonic() - started


async def test_three_hundred_thousand_records_a_second_are_drained_without_loss(node: Instance):
    with RingReader(node.maps_dir) as ring:
        books, producer = Books(ring), Producer(node, seconds=2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(books.drain.run, 0.01)
            spent = time.thread_time()
            producer.start()
            with anyio.fail_after(60):
                await anyio.to_thread.run_sync(producer.join)
            await until("empty ring", lambda: not ring.lag_bytes)
            spent = time.thread_time() - spent
            tasks.cancel_scope.cancel()
        drained = books.drain.drained
        rate = producer.tried / producer.took_s
        cost_us = spent / drained * 1e6
        told = f"{rate:,.0f} records/s, {drained:,} drained, {node.lost()} lost, {cost_us:.2f} us of CPU each"
        print(f"\n{told}")  # noqa: T201  (the measure)
        assert producer.tried == drained + node.lost()
        assert node.lost() == 0
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
