"""Live flows: the last ones at once, those to come as they come, and never silent about what is missing."""

from __future__ import annotations

import gc
from typing import Any

import anyio
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykmesh.admin import Page
from pykmesh.contracts.flows import Flow, Lost, parse
from pykmesh.kernel.layout import Direction, FlowKind, Reason
from services.telemetry import live as module
from services.telemetry.live import Live, Tail
from services.telemetry.names import Names
from tests.telemetry.rows import CLIENT, SERVER, VIP, WEB, ip, record, records, service_address, workload

pytestmark = pytest.mark.anyio


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Everybody is known."""
    monkeypatch.setattr(module, "PACE_S", 0)
    monkeypatch.setattr(module, "NAMES_WAIT_S", 0.01)
    found = Names("")
    found.services.answer([7], [WEB])
    found.workloads.answer([ip(CLIENT), ip(SERVER), ip(VIP)], [workload("client"), workload("web"), None])
    return found


@pytest.fixture
def live(names: Names) -> Live:
    return Live(names, buffer=8)


def numbered(first: int, count: int) -> np.ndarray:
    return records(*(record(retransmits=n) for n in range(first, first + count)))


async def lines(page: Page, count: int) -> list[Flow | Lost]:
    found: list[Flow | Lost] = []
    with anyio.fail_after(10):
        async for part in page.body:
            found += [line for line in map(parse, part.splitlines()) if line is not None]
            if len(found) >= count:
                break
    return found


async def answer(live: Live, **query: str) -> list[Any]:
    return await lines(await live.page(query), 1000)


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(1, 9))
def test_the_tail_holds_the_last_records_in_order(sizes: list[int], limit: int):
    tail, pushed = Tail(limit), 0
    for size in sizes:
        if size:
            tail.push(numbered(pushed, size))
        pushed += size
    assert tail.rows()["retransmits"].tolist() == list(range(pushed))[-limit:]


async def test_the_last_flows_are_shown_and_the_answer_ends(live: Live):
    live.publish(numbered(0, 5))
    live.publish(numbered(5, 6))
    assert [flow.retransmits for flow in await answer(live)] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert [flow.retransmits for flow in await answer(live, last="2")] == [9, 10]
    assert await answer(live, last="0") == []


async def test_a_follower_sees_the_last_ones_then_each_that_comes_once(live: Live):
    live.publish(numbered(0, 3))
    page = await live.page({"follow": "1", "last": "2"})
    live.publish(numbered(3, 4))
    assert [flow.retransmits for flow in await lines(page, 6)] == [1, 2, 3, 4, 5, 6]


async def test_a_follower_that_is_too_slow_is_told_how_many_it_lost(
    live: Live, monkeypatch: pytest.MonkeyPatch
):
    page = await live.page({"follow": "1"})
    (follower,) = live._followers
    follower._limit = 10
    live.publish(numbered(0, 25))
    live.note_unrecorded(3)
    found = await lines(page, 12)
    flows, lost = [f for f in found if isinstance(f, Flow)], [f for f in found if isinstance(f, Lost)]
    assert len(flows) == 10
    assert {(one.where, one.flows) for one in lost} == {("observer", 15), ("ring", 3)}
    assert live.lost == 15


async def test_a_slow_follower_costs_no_other_its_flows(live: Live):
    slow, quick = await live.page({"follow": "1"}), await live.page({"follow": "1"})
    assert len(live._followers) == 2
    for first in range(0, module.QUEUE_RECORDS * 2, module.QUEUE_RECORDS):
        live.publish(np.repeat(numbered(first, 1), module.QUEUE_RECORDS))
        assert len([f for f in await lines(quick, module.QUEUE_RECORDS) if isinstance(f, Flow)]) >= 8192
    assert live.lost == module.QUEUE_RECORDS
    del slow


async def test_a_follower_that_has_left_is_forgotten(live: Live):
    page = await live.page({"follow": "1"})
    assert live.status()["followers"] == 1
    del page
    gc.collect()
    assert live.status()["followers"] == 0


async def test_too_many_followers_are_refused(live: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FOLLOWERS_MAX", 1)
    held = await live.page({"follow": "1"})
    assert (await live.page({"follow": "1"})).status == 503
    assert held.status == 200


async def test_a_silent_stream_says_that_it_lives(live: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    page = await live.page({"follow": "1"})
    with anyio.fail_after(10):
        assert await anext(aiter(page.body)) == b"\n"


async def test_verdicts_and_protocols_are_filtered_before_the_queue(live: Live):
    live.publish(
        records(
            record(),
            record(established=0),
            record(kind=FlowKind.REFUSED, established=0),
            record(protocol=17),
        )
    )
    found = await answer(live, verdict="failed,refused")
    assert [flow.verdict for flow in found] == ["failed", "refused"]
    assert [flow.protocol for flow in await answer(live, protocol="udp")] == ["UDP"]


async def test_a_query_that_is_not_understood_is_refused_by_name(live: Live):
    for query in ({"last": "x"}, {"last": "-1"}, {"verdict": "dropped"}):
        page = await live.page(query)
        assert page.status == 400
        assert next(iter(query.values())) in msgspec.json.decode(page.body)["error"]


async def test_a_connection_is_shown_from_its_source_whichever_end_reports(live: Live):
    way = {"service": 7, "vip": VIP, "vip_port": 80, "srtt_us": 296, "retransmits": 1}
    live.publish(record(**way))
    back = {"local_port": 8080, "remote_port": 41234, "sent_bytes": 1175, "received_bytes": 83}
    live.publish(record(direction=Direction.INBOUND, local=SERVER, remote=CLIENT, **back))
    outbound, inbound = await answer(live)
    assert (outbound.direction, inbound.direction) == ("outbound", "inbound")
    for flow in (outbound, inbound):
        assert (flow.source.address, flow.source.port, flow.source.workload) == (CLIENT, 41234, "client-1")
        assert (flow.destination.address, flow.destination.port, flow.destination.namespace) == (
            SERVER,
            8080,
            "shop",
        )
        assert (flow.sent_bytes, flow.received_bytes) == (83, 1175)
        assert (flow.verdict, flow.reason, flow.protocol, flow.duration_ms) == ("closed", "", "TCP", 12.3)
    assert (outbound.service.name, outbound.service.namespace, outbound.service.port) == ("web", "shop", 80)
    assert (outbound.srtt_us, outbound.retransmits) == (296, 1)
    assert inbound.service is None


async def test_failures_and_refusals_say_why(live: Live):
    live.publish(record(established=0, error=111))
    refused = {"kind": FlowKind.REFUSED, "established": 0, "remote": VIP, "vip": VIP, "local_port": 0}
    live.publish(record(**refused, reason=Reason.NO_ENDPOINT, service=7, remote_port=80, vip_port=80))
    failed, refusal = await answer(live)
    assert (failed.verdict, failed.reason) == ("failed", "ECONNREFUSED")
    assert (refusal.verdict, refusal.reason, refusal.source.port) == ("refused", "no_endpoint", None)
    assert (refusal.service.name, refusal.destination.address, refusal.destination.workload) == (
        "web",
        VIP,
        "",
    )


async def test_a_refusal_without_a_service_port_names_the_service_by_its_address(live: Live, names: Names):
    names.workloads.answer([ip(VIP)], [service_address()])
    refused = {"kind": FlowKind.REFUSED, "established": 0, "remote": VIP, "vip": VIP, "local_port": 0}
    live.publish(record(**refused, reason=Reason.NO_PORT, remote_port=81, vip_port=81))
    (flow,) = await answer(live)
    assert (flow.service.name, flow.service.namespace, flow.service.port) == ("web", "shop", 81)
    assert (flow.destination.address, flow.destination.workload) == (VIP, "")


async def test_what_nobody_counts_or_knows_is_null_or_empty(live: Live):
    live.publish(record(protocol=17, service=99, vip=VIP, vip_port=53, local="", local_port=0))
    (flow,) = await answer(live)
    assert (flow.sent_bytes, flow.received_bytes) == (None, None)
    assert (flow.source.address, flow.source.workload) == ("", "")
    assert (flow.service.name, flow.service.namespace, flow.service.port) == (VIP, "", 53)
