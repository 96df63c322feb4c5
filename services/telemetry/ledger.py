"""The sums behind Istio's metrics, of connections and of requests.

Owns every series. What is counted is never dropped: it waits a little for the names of its ends, and
is then added to the series of the labels that are known, "unknown" where none are. A series keeps the
labels that it has got: names that come later hold for what is counted later, so no counter ever falls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, Final, Generic, NamedTuple, Protocol, Self, TypeVar

from services.telemetry.labels import LABELS, UNKNOWN, Edge, Labels, labels
from services.telemetry.names import Clock, Names

NAMES_WAIT_S: Final = 5.0
"""Longer than a restart of map_writer takes."""
RETRY_NAMES_S: Final = 5.0
WAITING_MAX: Final = 65_536
BOUND_MAX: Final = 131_072
SERIES_MAX: Final = 10_000
SERIES_REST_S: Final = 3600.0
"""A series without traffic for so long is dropped; when it comes again it counts from zero."""


class Summed(Protocol):
    def plus(self, other: Self, /) -> Self: ...


E = TypeVar("E", bound=Hashable)
A = TypeVar("A", bound=Summed)
Describe = Callable[[E], tuple[Labels, float]]
"""The labels of an edge as far as they are known, and until when they hold: not even now, if names miss."""


class Amounts(NamedTuple):
    """Request bytes go from the one that connects to the one that accepts; response bytes come back."""

    opened: int = 0
    closed: int = 0
    failed: int = 0
    request_bytes: int = 0
    response_bytes: int = 0

    def plus(self, other: Amounts) -> Amounts:
        return Amounts(
            self.opened + other.opened,
            self.closed + other.closed,
            self.failed + other.failed,
            self.request_bytes + other.request_bytes,
            self.response_bytes + other.response_bytes,
        )


class Series(Generic[A]):
    """The sums of one set of labels."""

    __slots__ = ("amounts", "last_counted")

    def __init__(self, amounts: A) -> None:
        self.amounts = amounts
        self.last_counted = 0.0


class _Bound(NamedTuple, Generic[A]):
    series: Series[A]
    until: float


class _Waiting(NamedTuple, Generic[A]):
    amounts: A
    since: float


def of_tcp(names: Names) -> Describe[Edge]:
    def describe(edge: Edge) -> tuple[Labels, float]:
        source, destination = names.workload(edge.source), names.workload(edge.destination)
        service = names.service(edge.service)
        until = min(end.fresh_until for end in (source, destination, service))
        return labels(edge, source.value, destination.value, service.value), until

    return describe


def without_names(edge: Edge) -> Labels:
    return labels(edge, None, None, None)


class Ledger(Generic[E, A]):
    """`unnamed`: the labels of an edge when there are too many series."""

    def __init__(
        self, describe: Describe[E], unnamed: Callable[[E], Labels], clock: Clock = time.monotonic
    ) -> None:
        self._describe = describe
        self._unnamed = unnamed
        self._clock = clock
        self._series: dict[Labels, Series[A]] = {}
        self._bound: dict[E, _Bound[A]] = {}
        self._waiting: dict[E, _Waiting[A]] = {}
        self.folded = 0
        """Times that an edge went to the series without names because there were too many series."""
        self.dropped = 0

    def add(self, edge: E, amounts: A) -> None:
        now = self._clock()
        bound = self._bound.get(edge)
        if bound is not None and bound.until > now:
            self._count(bound.series, amounts, now)
            return
        waiting = self._waiting.get(edge)
        if waiting is not None:
            self._waiting[edge] = _Waiting(waiting.amounts.plus(amounts), waiting.since)
        elif not self._bind(edge, amounts, now, patient=len(self._waiting) < WAITING_MAX):
            self._waiting[edge] = _Waiting(amounts, now)

    def unbind(self) -> None:
        """Names have changed: what is counted from now on is described anew."""
        self._bound.clear()

    def settle(self) -> None:
        """Adds what waited to its series: names have come, or will not come in time."""
        now = self._clock()
        for edge, waiting in list(self._waiting.items()):
            if self._bind(edge, waiting.amounts, now, patient=waiting.since + NAMES_WAIT_S > now):
                del self._waiting[edge]

    def _bind(self, edge: E, amounts: A, now: float, *, patient: bool) -> bool:
        """False, and nothing done, when a name is missing that is worth waiting for."""
        wanted, until = self._describe(edge)
        if until <= now:
            if patient:
                return False
            until = now + RETRY_NAMES_S
        if len(self._bound) >= BOUND_MAX:
            self._bound.clear()
        series = self._series.get(wanted)
        if series is None and len(self._series) >= SERIES_MAX:
            self.folded += 1
            wanted = self._unnamed(edge)
            series = self._series.get(wanted)
        if series is None:
            series = self._series[wanted] = Series(amounts)
            series.last_counted = now
        else:
            self._count(series, amounts, now)
        self._bound[edge] = _Bound(series, until)
        return True

    @staticmethod
    def _count(series: Series[A], amounts: A, now: float) -> None:
        series.amounts = series.amounts.plus(amounts)
        series.last_counted = now

    def drop_rested(self) -> None:
        now = self._clock()
        rested = [key for key, series in self._series.items() if series.last_counted + SERIES_REST_S < now]
        for key in rested:
            del self._series[key]
        self.dropped += len(rested)
        self._bound = {
            edge: bound
            for edge, bound in self._bound.items()
            if bound.until > now and bound.series.last_counted + SERIES_REST_S >= now
        }

    def snapshot(self) -> list[tuple[Labels, A]]:
        return [(key, series.amounts) for key, series in self._series.items()]

    def status(self) -> dict[str, Any]:
        ends = LABELS.index("source_workload"), LABELS.index("destination_workload")
        unnamed = sum(any(key[end] == UNKNOWN for end in ends) for key in self._series)
        return {
            "series": len(self._series),
            "series_with_an_unknown_end": unnamed,
            "edges": len(self._bound),
            "edges_waiting_for_names": len(self._waiting),
            "series_folded": self.folded,
            "series_dropped": self.dropped,
        }
