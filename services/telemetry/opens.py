"""Opened connections: what the programs' counters grew by since the last look.

Owns the totals that were seen, and removes entries that rest, so that the map holds what is in use.

The counters live longer than this process. A start takes what they hold as read by the process before
it, which is an ordinary reset of a counter: a connection that was opened before counts as opened when its
record is drained, at its close. So what is closed was opened, after any end of the process before, but
- a scrape may show a close before its open: until the next look, and until the names of its ends are there
- labels that change while a connection lasts (names that come late) count its close under the new ones
- a series that rested for an hour is dropped with its opens (`ledger.SERIES_REST_S`), and closes begin anew
- an open that found the map full is missing for good (`open_lost`)
and what was under way to be opened during the first look may be counted as opened twice.

All of this is of TCP. A datagram socket is opened once for each endpoint that it talks to and closed once:
of UDP, which is in none of Istio's metrics, more may be opened than ever closes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

from services.telemetry.names import Clock

REST_S: Final = 300.0
CROWDED_REST_S: Final = 10.0
"""How long an entry rests at least before it goes when the map is three quarters full."""
REMOVED_AT_ONCE: Final = 4096


class Counters(Protocol):
    """A per-CPU map of counters (`kernel.maps.PinnedMap`)."""

    max_entries: int

    def sums(self) -> dict[bytes, int]: ...
    def take(self, key: bytes) -> int | None: ...


class Opened(NamedTuple):
    key: bytes
    connections: int


class Opens:
    """`read` blocks for as long as the map is large: for a thread, one at a time."""

    def __init__(self, counters: Counters, clock: Clock = time.monotonic) -> None:
        self._counters = counters
        self._clock = clock
        self._totals: dict[bytes, int] = {}
        self._changed: dict[bytes, float] = {}
        """When each entry last grew, the longest at rest first."""
        self.max_entries = counters.max_entries
        self._see(counters.sums())
        self.since_ns = time.monotonic_ns()
        """CLOCK_MONOTONIC, the clock of the programs: what was opened before is not among what is read."""

    @property
    def entries(self) -> int:
        return len(self._totals)

    def read(self) -> list[Opened]:
        """What was opened since the last look, removals of resting entries included."""
        return [*self._see(self._counters.sums()), *self._remove_resting()]

    def _see(self, sums: dict[bytes, int]) -> list[Opened]:
        now, totals = self._clock(), self._totals
        grown = [(key, total) for key, total in sums.items() if totals.get(key) != total]
        found = []
        for key, total in grown:
            before = totals.get(key, 0)
            # Below what was seen: somebody else removed the entry, and it was made anew.
            count = total - before if total >= before else total
            totals[key] = total
            self._changed.pop(key, None)
            self._changed[key] = now
            if count:
                found.append(Opened(key, count))
        return found

    def _remove_resting(self) -> Iterator[Opened]:
        """An entry is read and removed in one step of the kernel, so what came since `sums` is counted.

        Only what a program adds that found the entry just before, some nanoseconds, is lost with it.
        """
        crowded = len(self._totals) * 4 > self.max_entries * 3
        before = self._clock() - (CROWDED_REST_S if crowded else REST_S)
        oldest = itertools.islice(self._changed.items(), REMOVED_AT_ONCE)
        resting = [key for key, changed in oldest if changed < before]
        for key in resting:
            total = self._counters.take(key)
            grown = (total or 0) - self._totals.pop(key)
            del self._changed[key]
            if grown > 0:
                yield Opened(key, grown)
