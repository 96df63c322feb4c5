"""The text of a scrape: Istio's names and labels, read back by Prometheus' own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from pykmesh.kernel.layout import Direction, Reason
from services.telemetry.labels import LABELS, Edge, labels
from services.telemetry.ledger import Amounts
from services.telemetry.metrics import Exposition, MapFill, Snapshot
from tests.telemetry.rows import CLIENT, SERVER, WEB, ip, workload

EDGE = Edge(ip(CLIENT), ip(SERVER), 7, Direction.OUTBOUND, "-")
NAMES = (workload("client"), workload("web"), WEB)
TCP_NAMES = [
    "istio_tcp_connections_opened_total",
    "istio_tcp_connections_closed_total",
    "istio_tcp_sent_bytes_total",
    "istio_tcp_received_bytes_total",
]


def scrape(*series: tuple[Edge, Amounts], **fields: object) -> dict[str, dict[tuple, float]]:
    values = {
        "series": [(labels(edge, *NAMES), amounts) for edge, amounts in series],
        "requests": [],
        "counters": [0] * len(Reason),
        "drained": 0,
        "not_understood": 0,
        "observer_lost": 0,
        "lag_bytes": 0,
        "ring_bytes": 1 << 24,
        "series_folded": 0,
        "maps": {},
    }
    text = Exposition(Snapshot(**(values | fields))).text().decode()
    found: dict[str, dict[tuple, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.items())] = sample.value
    return found


def test_each_series_has_istios_labels_and_the_four_stable_metrics():
    amounts = Amounts(opened=3, closed=2, request_bytes=83, response_bytes=1175)
    found = scrape((EDGE, amounts))
    for name, value in zip(TCP_NAMES, (3, 2, 1175, 83), strict=True):
        ((sample_labels, sample),) = found[name].items()
        assert sorted(dict(sample_labels)) == sorted(LABELS)
        assert sample == value
    assert "istio_tcp_connections_failed_total" not in found


def test_sent_is_the_response_and_received_the_request_for_either_reporter():
    """Istio: sent "during response", received "during request"."""
    amounts = Amounts(closed=1, request_bytes=10, response_bytes=99)
    found = scrape((EDGE, amounts), (EDGE._replace(direction=Direction.INBOUND), amounts))
    assert set(found["istio_tcp_sent_bytes_total"].values()) == {99}
    assert set(found["istio_tcp_received_bytes_total"].values()) == {10}
    assert len(found["istio_tcp_sent_bytes_total"]) == 2


def test_failures_have_a_series_of_their_own_by_response_flag():
    found = scrape(
        (EDGE._replace(flags="CONNECT"), Amounts(failed=4)), (EDGE._replace(flags="DENY"), Amounts(failed=1))
    )
    failed = {
        dict(key)["response_flags"]: value
        for key, value in found["istio_tcp_connections_failed_total"].items()
    }
    assert failed == {"CONNECT": 4, "DENY": 1}
    assert not set(TCP_NAMES) & set(found)


def test_what_was_lost_and_refused_is_shown_from_the_first_scrape():
    counters = list(range(100, 100 + len(Reason)))
    found = scrape(counters=counters, not_understood=1, observer_lost=2)
    lost = {dict(key)["stage"]: value for key, value in found["mesh_flow_lost_total"].items()}
    assert lost == {
        "record_lost": counters[Reason.RECORD_LOST],
        "open_lost": counters[Reason.OPEN_LOST],
        "state_lost": counters[Reason.STATE_LOST],
        "reader": 1,
        "observer": 2,
    }
    refused = {dict(key)["reason"]: value for key, value in found["mesh_refusals_total"].items()}
    assert refused["no_endpoint"] == counters[Reason.NO_ENDPOINT]
    assert refused["datagram_lost"] == counters[Reason.DATAGRAM_LOST]
    assert not {"routed", "passthrough", "record_lost", "open_lost", "state_lost", "shunned"} & set(refused)
    assert found["mesh_endpoints_shunned_total"] == {(): counters[Reason.SHUNNED]}


def test_the_ring_and_the_maps_say_how_full_they_are():
    found = scrape(lag_bytes=136, maps={"opens": MapFill(3, 1024)}, drained=9)
    assert found["mesh_ring_lag_bytes"] == {(): 136}
    assert found["mesh_flows_drained_total"] == {(): 9}
    assert found["mesh_map_entries"] == {(("map", "opens"),): 3}
    assert found["mesh_map_max_entries"] == {(("map", "opens"),): 1024}
