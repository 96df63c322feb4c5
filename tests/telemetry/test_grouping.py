"""Grouping: the sums of the groups are the sums of the records, whatever the records are."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pykmesh.kernel.layout import Direction, FlowKind, Reason, dtype
from services.telemetry.flows import amounts, group, meaning
from services.telemetry.labels import Edge
from services.telemetry.ledger import Amounts
from tests.telemetry.rows import CLIENT, SERVER, VIP, ip, numbered_ip, record, records

SINCE = 1_000_000_000
"""When `record` is opened: it counts as opened by the counters, and any before it at its close."""
ROW = st.fixed_dictionaries(
    {
        "local": st.integers(0, 2).map(numbered_ip),
        "remote": st.sampled_from(["10.1.0.1", "10.2.0.1", "0.0.0.1", "fd00::1", "fd00::1:0:0:1"]),
        "service": st.sampled_from([0, 1, 1 << 63]),
        "reason": st.sampled_from([0, 2, 5]),
        "kind": st.sampled_from([1, 2]),
        "direction": st.sampled_from([1, 2]),
        "protocol": st.sampled_from([6, 17]),
        "established": st.integers(0, 1),
        "opened_ns": st.sampled_from([0, SINCE - 1, SINCE, 1 << 62]),
        "sent_bytes": st.integers(0, 1 << 40),
        "received_bytes": st.integers(0, 1 << 40),
    }
)
KEY = ("local", "remote", "service", "reason", "kind", "direction", "protocol", "established")


@given(st.lists(ROW, max_size=40))
def test_each_record_is_in_the_group_of_its_like_once(rows: list[dict]):
    expected: Counter = Counter()
    for row in rows:
        expected[*(row[k] for k in KEY), row["opened_ns"] < SINCE] += np.array(
            [1, row["sent_bytes"], row["received_bytes"]], object
        )
    found: Counter = Counter()
    batch = records(*(record(**row) for row in rows)) if rows else np.zeros(0, dtype("flow_record"))
    for one in group(batch, SINCE):
        found[one.key] += np.array(one[1:], object)
    assert sorted(map(tuple, found.values())) == sorted(map(tuple, expected.values()))
    for key, (_, *sums) in ((k, v) for k, v in found.items()):
        decoded = meaning(key)
        if decoded.edge is not None:
            like = [e for e in expected if (ip(e[0]), ip(e[1]), e[2]) == decoded.edge[:3]]
            assert any(list(expected[e][1:]) == sums for e in like)


def only(row: np.ndarray) -> tuple[Edge | None, Amounts | None]:
    (found,) = group(row, SINCE)
    decoded = meaning(found.key)
    edge = decoded.edge
    return edge, amounts(found, decoded) if edge else None


def test_a_client_sends_the_request_and_receives_the_response():
    edge, counted = only(record(service=7))
    assert edge == Edge(ip(CLIENT), ip(SERVER), 7, Direction.OUTBOUND, "-")
    assert counted == Amounts(closed=1, request_bytes=83, response_bytes=1175)


def test_a_server_receives_the_request_and_sends_the_response():
    row = record(direction=Direction.INBOUND, local=SERVER, remote=CLIENT, sent_bytes=1175, received_bytes=83)
    edge, counted = only(row)
    assert (edge.source, edge.destination) == (ip(CLIENT), ip(SERVER))
    assert counted == Amounts(closed=1, request_bytes=83, response_bytes=1175)


def test_what_the_counters_of_opens_do_not_tell_of_is_opened_when_it_closes():
    _, counted = only(record(opened_ns=SINCE - 1))
    assert counted == Amounts(opened=1, closed=1, request_bytes=83, response_bytes=1175)
    _, counted = only(record(opened_ns=SINCE - 1, established=0, sent_bytes=0, received_bytes=0))
    assert counted == Amounts(failed=1)


def test_a_connection_that_was_never_established_failed_and_carried_nothing():
    edge, counted = only(record(established=0, error=111, sent_bytes=0, received_bytes=0))
    assert edge.flags == "CONNECT"
    assert counted == Amounts(failed=1)


def test_a_refusal_is_a_failure_with_the_flag_of_its_reason():
    refused = {"kind": FlowKind.REFUSED, "established": 0, "remote": VIP}
    edge, counted = only(record(**refused, reason=Reason.NO_ENDPOINT))
    assert (edge.flags, counted) == ("CONNECT", Amounts(failed=1))
    edge, counted = only(record(**refused, reason=Reason.POLICY_UNSUPPORTED))
    assert (edge.flags, counted) == ("DENY", Amounts(failed=1))


def test_datagrams_are_no_connections():
    assert only(record(protocol=17)) == (None, None)
