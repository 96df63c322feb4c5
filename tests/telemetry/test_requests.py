"""Requests that waypoints have served: none twice, none from before, none lost with a message."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pykmesh.contracts.messages import VERSION
from pykmesh.contracts.requests import BOUNDS, Histogram, RequestSeries, RequestSums
from pykmesh.kernel.layout import Reason
from services.telemetry.labels import REQUEST_LABELS
from services.telemetry.metrics import Exposition, Snapshot
from services.telemetry.names import Names
from services.telemetry.requests import FORGET_S, Requests
from tests.telemetry.rows import CLIENT, SERVER, Clock, ip, workload

BEGAN_S = 100.0
"""When telemetry did."""


class Books:
    def __init__(self) -> None:
        self.clock = Clock()
        self.names = Names("", self.clock)
        self.requests = Requests(self.names, BEGAN_S, self.clock)

    def hear(
        self, count: int, *, look: int, began_s: float = BEGAN_S + 1, envoy: str = "wp-0", **said: str
    ) -> None:
        self.requests.take(RequestSums(VERSION, envoy, began_s, look, [series(count, **said)]))
        asked = self.names.workloads.next_questions()
        known = {ip(CLIENT): workload("client"), ip(SERVER): workload("web")}
        self.names.workloads.answer(asked, [known.get(address) for address in asked])
        self.requests.ledger.settle()

    def counted(self, label: str = "response_code") -> dict[str, int]:
        at, found = REQUEST_LABELS.index(label), dict[str, int]()
        for key, served in self.requests.ledger.snapshot():
            found[key[at]] = found.get(key[at], 0) + served.requests
        return found


WEB = "shop/web.shop.svc.cluster.local"


def series(
    count: int, *, code: str = "200", grpc: str = "", client: str = CLIENT, service: str = WEB
) -> RequestSeries:
    histogram = Histogram([count] * (len(BOUNDS) + 1), count / 2)
    return RequestSeries(client, SERVER, service, "80", code, "", grpc, histogram, histogram, histogram)


@pytest.fixture
def books() -> Books:
    return Books()


def test_what_an_envoy_has_grown_by_is_counted_whatever_messages_are_lost(books: Books) -> None:
    books.hear(3, look=1)
    books.hear(10, look=4)
    books.hear(10, look=5)
    books.hear(7, look=3)  # late
    books.hear(11, look=6)
    assert books.counted() == {"200": 11}


def test_what_was_served_before_this_process_is_not_counted(books: Books) -> None:
    books.hear(1000, look=7, began_s=BEGAN_S - 1)
    books.hear(50, look=7, began_s=BEGAN_S - 1, code="404")  # the same look, another message
    assert books.counted() == {}
    books.hear(1002, look=8, began_s=BEGAN_S - 1)
    books.hear(3, look=8, began_s=BEGAN_S - 1, code="500")  # begun since
    assert books.counted() == {"200": 2, "500": 3}


def test_an_envoy_that_is_started_again_counts_from_zero(books: Books) -> None:
    books.hear(10, look=1)
    books.hear(4, look=2, began_s=BEGAN_S + 50)
    books.hear(1, look=2, envoy="wp-1")
    assert books.counted() == {"200": 15}


def test_one_that_was_not_heard_of_for_long_is_not_counted_again(books: Books) -> None:
    for name in ("wp-0", "wp-1"):
        books.hear(1000, look=1, envoy=name)
    books.clock.now += FORGET_S + 1
    for name in ("wp-0", "wp-1"):
        books.hear(1000, look=2, envoy=name)
    assert books.counted() == {"200": 2000}
    books.hear(1001, look=3, envoy="wp-1")
    assert books.counted() == {"200": 2001}


def test_who_asked_and_who_answered_are_named(books: Books) -> None:
    books.hear(1, look=1)
    books.hear(1, look=1, grpc="14", code="200", client="10.9.9.9")
    assert books.counted("source_workload") == {"client": 1, "unknown": 1}
    assert books.counted("destination_workload") == {"web": 2}
    assert books.counted("destination_service_name") == {"web": 2}
    assert books.counted("request_protocol") == {"http": 1, "grpc": 1}
    assert books.counted("reporter") == {"waypoint": 2}


def test_what_was_asked_of_a_workload_itself_is_asked_of_no_service(books: Books) -> None:
    books.hear(3, look=1, service="Kubernetes//Pod/shop/web")
    for label in ("destination_service", "destination_service_name", "destination_service_namespace"):
        assert books.counted(label) == {"unknown": 3}
    assert books.counted("destination_workload") == {"web": 3}


def test_an_address_that_is_none_is_refused_and_nothing_of_it_counted(books: Books) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        books.hear(1, look=1, client="nowhere")
    assert books.counted() == {}


def test_istios_metrics_of_requests_are_what_prometheus_reads(books: Books) -> None:
    books.hear(3, look=1)
    values: dict[str, Any] = dict.fromkeys(Snapshot._fields, 0) | {"series": [], "maps": {}}
    values |= {"counters": [0] * len(Reason), "requests": books.requests.ledger.snapshot()}
    text = Exposition(Snapshot(**values)).text().decode()
    found = {
        sample.name: sample for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert found["istio_requests_total"].value == 3
    assert set(found["istio_requests_total"].labels) == set(REQUEST_LABELS)
    for name in ("istio_request_duration_milliseconds", "istio_request_bytes", "istio_response_bytes"):
        assert (found[f"{name}_count"].value, found[f"{name}_sum"].value) == (3, 1.5)
    bounds = [
        float(line.partition('le="')[2].partition('"')[0])
        for line in text.splitlines()
        if "milliseconds_bucket" in line
    ]
    assert bounds == [*BOUNDS, float("inf")]
