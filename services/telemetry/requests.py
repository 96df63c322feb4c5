"""Requests that waypoints have served: from what waypoint_mgr says of each Envoy to sums with Istio's labels.

An Envoy counts from its own beginning, and says all of it each time: what is counted here is how much it has
grown. What an Envoy had served before this process began is not counted, as no connection from before is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import add
from typing import Any, Final, NamedTuple

from pykmesh.contracts.messages import WorkloadName, service_name
from pykmesh.contracts.requests import Histogram, RequestSeries, RequestSums
from pykmesh.contracts.waypoints import is_workload
from pykmesh.kernel.records import NO_IP, Ip, ip_from_text
from services.telemetry.labels import Labels, request_labels
from services.telemetry.ledger import Describe, Ledger
from services.telemetry.names import Names

FORGET_S: Final = 3600.0
"""An Envoy of which nothing was heard for so long has ended, or nobody could tell of it."""
FORGOTTEN_MAX: Final = 10_000


class Grown(NamedTuple):
    """Of one histogram: how many more are in each (cumulative) bucket, and how much more they sum up to."""

    buckets: tuple[int, ...]
    total: float

    def plus(self, other: Grown) -> Grown:
        return Grown(tuple(map(add, self.buckets, other.buckets)), self.total + other.total)


class Served(NamedTuple):
    """Requests of one set of labels. How many: the last bucket of any."""

    duration_ms: Grown
    request_bytes: Grown
    response_bytes: Grown

    def plus(self, other: Served) -> Served:
        return Served(*(mine.plus(its) for mine, its in zip(self, other, strict=True)))

    @property
    def requests(self) -> int:
        return self.duration_ms.buckets[-1]


class RequestEdge(NamedTuple):
    """Requests that have one set of labels, as Envoy names them."""

    client: Ip
    endpoint: Ip
    service: str
    port: int
    response_code: str
    response_flags: str
    grpc_status: str


def of_requests(names: Names) -> Describe[RequestEdge]:
    def describe(edge: RequestEdge) -> tuple[Labels, float]:
        source, destination = names.workload(edge.client), names.workload(edge.endpoint)
        until = min(source.fresh_until, destination.fresh_until)
        return _labels(edge, source.value, destination.value), until

    return describe


def _without_names(edge: RequestEdge) -> Labels:
    return _labels(edge, None, None)


def _labels(edge: RequestEdge, source: WorkloadName | None, destination: WorkloadName | None) -> Labels:
    """What was asked of a workload's own address is asked of no service."""
    service = None if is_workload(edge.service) else service_name(edge.service, edge.port)
    ended = edge.response_code, edge.response_flags, edge.grpc_status
    return request_labels(source, destination, service, *ended)


class _Envoy:
    """One that serves: what it has said last, and the look at it that was the first heard of."""

    def __init__(self, first_look: int | None) -> None:
        self.first_look = first_look
        """Its sums are of before this process; None for an Envoy that began after it."""
        self.last: dict[RequestEdge, Served] = {}
        self.heard_s = 0.0


class Requests:
    """`began_s`: when this process began, in seconds since boot."""

    def __init__(
        self,
        names: Names,
        began_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._began_s = time.clock_gettime(time.CLOCK_BOOTTIME) if began_s is None else began_s
        self._clock = clock
        self.ledger: Ledger[RequestEdge, Served] = Ledger(of_requests(names), _without_names, clock)
        self._envoys: dict[tuple[str, float], _Envoy] = {}
        self._forgotten: dict[tuple[str, float], None] = {}
        """Whose sums were counted until nothing was heard of them any more, the latest last."""

    def take(self, sums: RequestSums) -> None:
        """Raises ValueError for an address that is none; nothing of the message is counted then."""
        said = [(_edge(series), _served(series)) for series in sums.series]
        key = sums.instance, sums.began_s
        is_older = sums.began_s < self._began_s or key in self._forgotten
        envoy = self._envoys.setdefault(key, _Envoy(sums.look if is_older else None))
        envoy.heard_s = self._clock()
        for edge, served in said:
            before = envoy.last.get(edge)
            is_from_before = before is None and envoy.first_look == sums.look
            grown = None if is_from_before else _growth(served, before)
            if grown is not None:
                self.ledger.add(edge, grown)
            if grown is not None or is_from_before:
                envoy.last[edge] = served
        self._forget()

    def _forget(self) -> None:
        old = [key for key, envoy in self._envoys.items() if envoy.heard_s + FORGET_S < self._clock()]
        for key in old:
            del self._envoys[key]
            self._forgotten[key] = None
        while len(self._forgotten) > FORGOTTEN_MAX:
            del self._forgotten[next(iter(self._forgotten))]

    def status(self) -> dict[str, Any]:
        return {**self.ledger.status(), "envoys": len(self._envoys)}


def _edge(series: RequestSeries) -> RequestEdge:
    return RequestEdge(
        _address(series.client),
        _address(series.endpoint),
        series.service,
        int(series.port),
        series.response_code,
        series.response_flags,
        series.grpc_status,
    )


def _address(text: str) -> Ip:
    return ip_from_text(text) if text else NO_IP


def _served(series: RequestSeries) -> Served:
    return Served(*map(_grown, (series.duration_ms, series.request_bytes, series.response_bytes)))


def _grown(histogram: Histogram) -> Grown:
    return Grown(tuple(histogram.buckets), histogram.total)


def _growth(now: Served, before: Served | None) -> Served | None:
    """None when there is none: an Envoy's sums do not shrink, so what seems so is an old message."""
    if before is None:
        return now
    found = Served(*(_difference(mine, its) for mine, its in zip(now, before, strict=True)))
    return found if found.requests > 0 else None


def _difference(now: Grown, before: Grown) -> Grown:
    buckets = tuple(a - b for a, b in zip(now.buckets, before.buckets, strict=True))
    return Grown(buckets, max(0.0, now.total - before.total))
