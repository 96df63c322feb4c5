"""A drain with sums to compare, and what writes records at a steady rate."""

from __future__ import annotations

import threading
import time

from pykmesh.kernel.ring import RingReader
from services.telemetry.flows import Drain, Records
from services.telemetry.ledger import NAMES_WAIT_S, Amounts, Ledger, of_tcp, without_names
from services.telemetry.names import Names
from tests.telemetry.kernel import Instance
from tests.telemetry.rows import Clock

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

    def __init__(self, node: Instance, rate: int, seconds: float) -> None:
        super().__init__()
        self._node, self._rate, self._seconds = node, rate, seconds
        self.tried = self.written = 0
        self.took_s = self.spent_s = 0.0

    def run(self) -> None:
        started = time.monotonic()
        while self.took_s < self._seconds:
            due = int((self.took_s + STEP_S) * self._rate) - self.tried
            self.written += self._node.emit(due, pairs=50)
            self.tried += due
            time.sleep(max(started + self.tried / self._rate - time.monotonic(), 0))
            self.took_s = time.monotonic() - started
        self.spent_s = time.thread_time()
