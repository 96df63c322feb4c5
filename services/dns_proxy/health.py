"""What Prometheus is told of the proxy: ztunnel's names for questions, `mesh_` for the proxy itself."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from prometheus_client.core import HistogramMetricFamily, Metric

from pykmesh import metrics

BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Health:
    """Counts, by whoever acts."""

    def __init__(self) -> None:
        self.requests = 0
        self.answered = 0
        """Of the requests, by the mesh alone."""
        self.dropped = 0
        """Requests, and connections, that came while too many were open."""
        self.upstream_requests = 0
        self.upstream_failures = 0
        self._took = [0] * (len(BUCKETS_S) + 1)
        self._took_s = 0.0

    def upstream_took(self, seconds: float) -> None:
        self._took[bisect_left(BUCKETS_S, seconds)] += 1
        self._took_s += seconds

    def collect(self) -> Iterator[Metric]:
        yield metrics.counter("istio_dns_requests", "Questions of enrolled pods.", self.requests)
        yield metrics.counter(
            "istio_dns_upstream_requests", "Questions that were sent on.", self.upstream_requests
        )
        yield metrics.counter(
            "istio_dns_upstream_failures", "Questions that no server answered.", self.upstream_failures
        )
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        yield HistogramMetricFamily(
            "istio_dns_upstream_request_duration_seconds",
            "How long servers took to answer.",
            buckets=list(zip(bounds, accumulate(self._took), strict=True)),
            sum_value=self._took_s,
        )
        yield metrics.counter("mesh_dns_answered", "Questions that the mesh answered.", self.answered)
        yield metrics.counter(
            "mesh_dns_dropped", "Questions and connections dropped: too many were open.", self.dropped
        )
