"""What the Envoys have served, read from their statistics and told on the bus (contracts.requests)."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

import anyio
import anyio.to_thread
import structlog
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from pykmesh.bus import Bus, BusUnavailableError
from pykmesh.contracts import messages
from pykmesh.contracts.messages import Subject
from pykmesh.contracts.requests import BOUNDS, Histogram, RequestSeries, RequestSums
from services.waypoint_mgr.envoy import REQUEST_HISTOGRAMS, REQUEST_SERIES_MAX, REQUEST_TAGS, REQUESTS
from services.waypoint_mgr.instances import STATISTICS_S, UNHEARD, EnvoyProcess

REPORT_S: Final = 5.0
SERIES_IN_A_MESSAGE: Final = 1000
_PREFIX: Final = f"envoy_{REQUESTS}_"
_NO_ADDRESS: Final = "-"

log = structlog.get_logger(__name__)


class StatisticsError(Exception):
    """What an Envoy says of itself is not what it was told to count."""


class Served(NamedTuple):
    """An Envoy that is to be asked."""

    name: str
    process: EnvoyProcess


def read(text: str) -> list[RequestSeries]:
    """From Envoy's statistics as Prometheus reads them. Raises StatisticsError."""
    found: defaultdict[tuple[str, ...], dict[str, _Sums]] = defaultdict(dict)
    try:
        for sample in _samples(text):
            name, _, kind = sample.name.removeprefix(_PREFIX).rpartition("_")
            tags = tuple(sample.labels[tag] for tag in REQUEST_TAGS)
            sums = found[tags].setdefault(name, _Sums())
            if kind == "bucket":
                sums.buckets[float(sample.labels["le"])] = int(sample.value)
            elif kind == "sum":
                sums.total = sample.value
        return [_series(tags, sums) for tags, sums in found.items()]
    except (KeyError, ValueError) as error:
        raise StatisticsError(f"statistics of requests: {error!r}") from error


class _Sums:
    def __init__(self) -> None:
        self.buckets: dict[float, int] = {}
        self.total = 0.0

    @property
    def histogram(self) -> Histogram:
        """Raises KeyError or ValueError when its buckets are others."""
        if len(self.buckets) != len(BOUNDS) + 1:
            raise ValueError(f"buckets up to {sorted(self.buckets)}")
        return Histogram([self.buckets[bound] for bound in (*BOUNDS, math.inf)], self.total)


def _samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        if family.name.startswith(_PREFIX):
            yield from family.samples


def _series(tags: tuple[str, ...], sums: dict[str, _Sums]) -> RequestSeries:
    client, endpoint, service, port, code, flags, grpc = map(_said, tags)
    histograms = (sums[name].histogram for name in REQUEST_HISTOGRAMS)
    return RequestSeries(client, endpoint, service, port, code, flags, grpc, *histograms)


def _said(tag: str) -> str:
    """Envoy has a dash for what there is not; a response without flags has one as its flags."""
    return "" if tag == _NO_ADDRESS else tag


class Reporter:
    def __init__(self, note_error: Callable[..., None]) -> None:
        self._note_error = note_error
        self._look = int(time.time())  # later ones than those of who did this before
        self.bus: Bus | None = None

    async def run(self, served: Callable[[], Iterable[Served]]) -> None:
        """Until cancelled."""
        while True:
            await anyio.sleep(REPORT_S)
            self._look += 1
            for one in list(served()):
                await self._tell(one)

    async def last_words(self, of: Served) -> None:
        """Of one that is about to be ended."""
        await anyio.sleep(STATISTICS_S)
        await self._tell(of)

    async def _tell(self, one: Served) -> None:
        """What cannot be had or said now is said the next time: nothing is lost while the Envoy runs."""
        try:
            began_s = one.process.began_s
            text = await one.process.statistics(f"^{REQUESTS}\\.")
            series = await anyio.to_thread.run_sync(read, text)
        except UNHEARD as error:
            log.debug("requests_not_read", instance=one.name, error=str(error))
            return
        except StatisticsError as error:
            self._note_error("requests_not_understood", instance=one.name, error=error)
            return
        if len(series) >= REQUEST_SERIES_MAX:
            self._note_error(
                "requests_not_all_counted", instance=one.name, error=f"more than {REQUEST_SERIES_MAX} series"
            )
        for start in range(0, max(len(series), 1), SERIES_IN_A_MESSAGE):
            part = series[start : start + SERIES_IN_A_MESSAGE]
            sums = RequestSums(messages.VERSION, one.name, began_s, self._look, part)
            try:
                if self.bus is not None:
                    await self.bus.publish(Subject.REQUESTS, messages.encode(sums))
            except BusUnavailableError:
                return
