"""A process's own health for Prometheus, on its admin port under `/metrics`.

Of the traffic's metrics telemetry is in charge; these say how the mesh itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pykmesh.admin import Admin, Page, Query


class _Health(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


def add_page(admin: Admin, read: Callable[[], Iterable[Metric]]) -> None:
    """`read` is called at each scrape, in the loop."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Health(read))

    async def page(_: Query) -> Page:
        return Page(generate_latest(registry), CONTENT_TYPE_LATEST)

    admin.route("/metrics", page)


def gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=value)


def counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(name, what, value=value)


def by_label(name: str, what: str, label: str, values: Mapping[str, float]) -> Metric:
    """A gauge for each value of one label."""
    family = GaugeMetricFamily(name, what, labels=[label])
    for labelled, value in values.items():
        family.add_metric([labelled], value)
    return family
