"""The text that Prometheus scrapes, from a snapshot of the sums.

Owns no number: what is shown was counted in the ledger, by the kernel, or by the reader. Names and
labels of traffic are Istio's, so that its dashboards and Kiali read them; what the mesh says of itself
begins with `mesh_`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from pykmesh.contracts.requests import BOUNDS
from pykmesh.kernel.layout import Reason
from services.telemetry.labels import LABELS, NO_FLAGS, REQUEST_LABELS, Labels
from services.telemetry.ledger import Amounts
from services.telemetry.requests import Grown, Served

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
LOST_STAGES: Final = (Reason.RECORD_LOST, Reason.OPEN_LOST, Reason.STATE_LOST)
NOT_REFUSED: Final = frozenset({Reason.ROUTED, Reason.PASSTHROUGH, Reason.SHUNNED, *LOST_STAGES})

# Istio speaks from the side of who accepts: sent is what went back "during response", received what
# came "during request" (istio.io/latest/docs/reference/config/metrics), for either reporter.
_TCP: Final = (
    ("istio_tcp_connections_opened", "Connections that were established.", "opened"),
    ("istio_tcp_connections_closed", "Established connections that ended.", "closed"),
    ("istio_tcp_sent_bytes", "Bytes of responses, of connections that ended.", "response_bytes"),
    ("istio_tcp_received_bytes", "Bytes of requests, of connections that ended.", "request_bytes"),
)
_HISTOGRAMS: Final = (
    (
        "istio_request_duration_milliseconds",
        "From a request's first byte to its answer's last.",
        "duration_ms",
    ),
    ("istio_request_bytes", "Sizes of requests' bodies.", "request_bytes"),
    ("istio_response_bytes", "Sizes of answers' bodies.", "response_bytes"),
)
_BOUNDS: Final = (*map(str, BOUNDS), "+Inf")
_FLAGS: Final = LABELS.index("response_flags")
_FAILED: Final = ("istio_tcp_connections_failed", "Connections that never were, refused ones included.")


class MapFill(NamedTuple):
    entries: int
    max_entries: int


class Snapshot(NamedTuple):
    """All that one scrape shows. `counters`: the kernel's, by enum reason."""

    series: list[tuple[Labels, Amounts]]
    requests: list[tuple[Labels, Served]]
    counters: list[int]
    drained: int
    not_understood: int
    observer_lost: int
    lag_bytes: int
    ring_bytes: int
    series_folded: int
    maps: dict[str, MapFill]


class Exposition(Collector):
    """One scrape. Large ones take a while: for a thread."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def text(self) -> bytes:
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        yield from self._traffic()
        yield from self._requests()
        yield self._lost()
        yield self._refusals()
        yield from self._own()
        yield from self._fill()

    def _traffic(self) -> Iterator[Metric]:
        established = [(key, amounts) for key, amounts in self._snapshot.series if key[_FLAGS] == NO_FLAGS]
        failed = [(key, amounts) for key, amounts in self._snapshot.series if key[_FLAGS] != NO_FLAGS]
        for name, text, field in _TCP:
            family = CounterMetricFamily(name, text, labels=LABELS)
            for key, amounts in established:
                family.add_metric(key, getattr(amounts, field))
            yield family
        family = CounterMetricFamily(*_FAILED, labels=LABELS)
        for key, amounts in failed:
            family.add_metric(key, amounts.failed)
        yield family

    def _requests(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "istio_requests", "Requests that waypoints served.", labels=REQUEST_LABELS
        )
        for key, served in self._snapshot.requests:
            family.add_metric(key, served.requests)
        yield family
        for name, text, field in _HISTOGRAMS:
            histogram = HistogramMetricFamily(name, text, labels=REQUEST_LABELS)
            for key, served in self._snapshot.requests:
                grown: Grown = getattr(served, field)
                histogram.add_metric(key, list(zip(_BOUNDS, grown.buckets, strict=True)), grown.total)
            yield histogram

    def _lost(self) -> Metric:
        family = CounterMetricFamily(
            "mesh_flow_lost",
            "Records (a full ring, a record not understood, a slow observer) and opens that are missing, and "
            "sockets without a state.",
            labels=("stage",),
        )
        for reason in LOST_STAGES:
            family.add_metric((reason.label,), self._snapshot.counters[reason])
        family.add_metric(("reader",), self._snapshot.not_understood)
        family.add_metric(("observer",), self._snapshot.observer_lost)
        return family

    def _refusals(self) -> Metric:
        family = CounterMetricFamily(
            "mesh_refusals", "Connections and datagrams that the mesh refused.", labels=("reason",)
        )
        for reason in Reason:
            if reason not in NOT_REFUSED:
                family.add_metric((reason.label,), self._snapshot.counters[reason])
        return family

    def _own(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        yield CounterMetricFamily(
            "mesh_flows_drained",
            "Records read from the ring, TCP and UDP: one for each socket and for each refusal.",
            value=snapshot.drained,
        )
        yield CounterMetricFamily(
            "mesh_endpoints_shunned",
            "Times that another endpoint was drawn for one that had refused a connection.",
            value=snapshot.counters[Reason.SHUNNED],
        )
        yield CounterMetricFamily(
            "mesh_series_folded",
            "Times that traffic was counted without names because there were too many series.",
            value=snapshot.series_folded,
        )
        yield GaugeMetricFamily("mesh_ring_lag_bytes", "What waits in the ring.", value=snapshot.lag_bytes)
        yield GaugeMetricFamily("mesh_ring_size_bytes", "Size of the ring.", value=snapshot.ring_bytes)

    def _fill(self) -> Iterator[Metric]:
        """Of the configuration's maps map_writer says the same, under the same names."""
        entries = GaugeMetricFamily("mesh_map_entries", "Entries, counted now and then.", labels=("map",))
        limits = GaugeMetricFamily("mesh_map_max_entries", "How many entries fit.", labels=("map",))
        for name, fill in self._snapshot.maps.items():
            entries.add_metric((name,), fill.entries)
            limits.add_metric((name,), fill.max_entries)
        yield from (entries, limits)
