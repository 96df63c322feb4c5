"""An acknowledgement tells the truth: what it accepts is in the kernel, or nobody is there to write it."""

from __future__ import annotations

import signal
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pykmesh.cli import diff
from pykmesh.contracts.messages import REFUSED_NAMED
from pykmesh.node.mesh import Options
from tests.control import kernel_view
from tests.control.conftest import Whole
from tests.control.kernel_view import Address, Entry
from tests.control.mesh_node import MeshNode, running, until
from tests.control.resources import host, pod, pod_message, policy, service, uid
from tests.control.scripted_ads import ADDRESS, AUTHORIZATION, resource, serving

pytestmark = [pytest.mark.anyio, pytest.mark.kernel, pytest.mark.usefixtures("one_event_loop")]

FULL = "map {} is full ({} entries)"


async def test_what_was_accepted_is_in_the_maps_at_that_moment(mesh: Whole) -> None:
    for number in range(1, 40):
        pods = [pod(f"p-{number}", f"10.1.0.{number}", services=["web"])]
        answer = await mesh.plane.push(service("web", f"10.96.0.{number}"), *pods)
        assert answer.accepted
        view = kernel_view.read(mesh.node.maps_dir)
        endpoints = frozenset(f"10.1.0.{n} 8080" for n in range(1, number + 1))
        assert view.services == {f"10.96.0.{number} 80": Entry("routed", endpoints)}
        assert view.addresses[f"10.96.0.{number}"] == Address("service", "routed")
        assert len(view.addresses) == number + 1
    assert (await mesh.plane.push(removed=[host("web")])).accepted
    assert kernel_view.read(mesh.node.maps_dir).services == {}
    status = await mesh.node.page("xds_client")
    assert status["not_in_kernel"] == 0
    assert status["map_writer"] == "there"


async def test_what_was_rejected_differs_from_what_the_control_plane_said(mesh: Whole) -> None:
    """The copy of before is still in the kernel, and that is not what was said last."""
    assert (await mesh.plane.push(pod("a", "10.1.0.1"))).accepted
    look = partial(diff.said, mesh.node.instance)
    assert (await anyio.to_thread.run_sync(look)).differences == []
    bad = pod_message("a", "10.1.0.2")
    bad.workload.network_mode = 7  # type: ignore[assignment]
    assert not (await mesh.plane.push(resource(uid("a"), bad.SerializeToString()))).accepted
    (found,) = (await anyio.to_thread.run_sync(look)).differences
    assert (found.where, found.expected) == (uid("a"), "what was said last")
    assert found.found == "it rejected: workload.network_mode: 7 is unknown"
    assert (await mesh.plane.push(pod("a", "10.1.0.3"))).accepted
    assert (await anyio.to_thread.run_sync(look)).differences == []


@pytest.fixture
def tiny() -> dict[str, str]:
    return {
        "PYKMESH_SERVICES_MAX": "2", "PYKMESH_ENDPOINTS_MAX": "3", "PYKMESH_ADDRESSES_MAX": "5",
        "PYKMESH_REPORT_DEADLINE_S": "3",
    }  # fmt: skip


async def test_what_does_not_fit_is_refused_by_name_and_limit_and_written_once_there_is_room(
    tmp_path: Path, tiny: dict[str, str]
) -> None:
    async with serving() as plane:
        options = Options(xds_address=f"127.0.0.1:{plane.port}", settings=tiny)
        async with running(tmp_path, options) as node:
            pods = [pod(f"p-{n}", f"10.1.0.{n}", services=["web"]) for n in (1, 2, 3)]
            assert (await plane.push(service("web", "10.96.0.1"), *pods)).accepted

            answer = await plane.push(pod("p-4", "10.1.0.4", services=["web"]))
            assert answer.reasons == {uid("p-4"): FULL.format("endpoints", 3)}
            assert (await node.page("xds_client"))["refused_by_node"] == answer.reasons
            view = kernel_view.read(node.maps_dir)
            assert view.services["10.96.0.1 80"].endpoints == {f"10.1.0.{n} 8080" for n in (1, 2, 3)}

            answer = await plane.push(service("second", "10.96.0.2"))
            assert answer.reasons == {host("second"): FULL.format("addresses", 5)}
            assert (await plane.push(removed=[uid("p-1")])).accepted
            await _until_view(
                node,
                lambda v: v.services["10.96.0.1 80"].endpoints == {f"10.1.0.{n} 8080" for n in (2, 3, 4)},
            )
            assert kernel_view.read(node.maps_dir).addresses["10.96.0.2"].kind == "service"
            assert (await node.page("xds_client"))["refused_by_node"] == {}

            answer = await plane.push(service("third", "10.96.0.3"))
            assert answer.reasons.keys() == {host("third")}
            replaced = await plane.push(
                service("fourth", "10.96.0.4"), removed=[host("second"), host("third")]
            )
            assert replaced.accepted, "it fits in the place of what goes with the same response"
            assert set(kernel_view.read(node.maps_dir).services) == {"10.96.0.1 80", "10.96.0.4 80"}
            assert await node.errors("map_writer") == [], "no write met a map that was full"


async def test_of_more_refusals_than_a_report_names_each_answer_names_its_own(
    tmp_path: Path, tiny: dict[str, str]
) -> None:
    async with serving() as plane:
        options = Options(xds_address=f"127.0.0.1:{plane.port}", settings=tiny)
        async with running(tmp_path, options) as node:
            count = REFUSED_NAMED + 100
            pods = [pod(f"p-{n}", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}") for n in range(count)]
            assert not (await plane.push(*pods)).accepted
            for name in ("a", "z"):
                answer = await plane.push(pod(name, "10.9.9.9"))
                assert answer.reasons == {uid(name): FULL.format("addresses", 5)}
            status = await node.page("xds_client")
            assert status["unconfirmed_acks"] == 0
            assert len(status["refused_by_node"]) == REFUSED_NAMED
            assert status["refused_by_node_count"] == count - 5 + 2
            assert (await plane.push(removed=[uid("a")])).accepted


async def test_what_was_refused_is_named_without_a_version_when_the_client_comes_back(
    tmp_path: Path, tiny: dict[str, str]
) -> None:
    async with serving() as plane:
        options = Options(xds_address=f"127.0.0.1:{plane.port}", settings=tiny)
        async with running(tmp_path, options) as node:
            services = [service(f"s-{n}", f"10.96.0.{n}") for n in (1, 2, 3)]
            answer = await plane.push(*services)
            (refused,) = answer.reasons
            assert answer.reasons == {refused: FULL.format("services", 2)}
            number = len(plane.streams)
            await plane.stream.end()
            versions = dict((await plane.next_stream(number)).first[ADDRESS].initial_resource_versions)
            assert versions.pop(refused) == ""
            assert all(versions.values())
            gone = next(item.name for item in services if item.name != refused)
            assert (await plane.push(removed=[gone])).accepted
            left = {n.split(" ")[0] for n in kernel_view.read(node.maps_dir).services}
            assert left == {f"10.96.0.{n}" for n in (1, 2, 3) if host(f"s-{n}") != gone}


async def _until_view(node: Any, holds: Any) -> None:
    await until("maps as they should be", lambda: holds(kernel_view.read(node.maps_dir)))


async def _metric(node: MeshNode, process: str, name: str) -> float:
    """As Prometheus is told."""
    text = await anyio.to_thread.run_sync(_scraped, getattr(node.instance.ports, process))
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    (found,) = [sample for sample in samples if sample.name == name]
    return found.value


def _scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return bytes(answer.read()).decode()


def _said_unconfirmed(node: MeshNode) -> int:
    return (node.instance.run_dir / "logs" / "xds_client.log").read_text().count("acks_unconfirmed")


async def test_while_map_writer_is_stopped_answers_come_after_its_absence_and_status_tells_what_is_missing(
    mesh: Whole,
) -> None:
    assert (await mesh.plane.push(service("web", "10.96.0.1"))).accepted
    before = kernel_view.read(mesh.node.maps_dir)
    earlier, said = await mesh.node.page("xds_client"), _said_unconfirmed(mesh.node)
    mesh.node.signal("map_writer", signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert (await mesh.plane.push(pod("p-1", "10.1.0.1", services=["web"]))).accepted
        assert 1.0 < time.monotonic() - started < 6.0  # away when silent for 3 s; the deadline is 5 s
        assert (await mesh.plane.push(pod("p-2", "10.1.0.2", services=["web"]))).accepted
        status = await mesh.node.page("xds_client")
        assert status["map_writer"] == "away"
        assert status["not_in_kernel"] == 2
        assert status["unconfirmed_acks"] == earlier["unconfirmed_acks"] + 2
        unconfirmed = await _metric(mesh.node, "xds_client", "mesh_xds_unconfirmed_acks_total")
        assert unconfirmed == status["unconfirmed_acks"]
        assert _said_unconfirmed(mesh.node) == said + 1, "the first of a series"
        assert kernel_view.read(mesh.node.maps_dir) == before
    finally:
        mesh.node.signal("map_writer", signal.SIGCONT)
    await mesh.node.until_page("xds_client", lambda said: said["not_in_kernel"] == 0, "followed again")
    view = kernel_view.read(mesh.node.maps_dir)
    assert view.services["10.96.0.1 80"].endpoints == {"10.1.0.1 8080", "10.1.0.2 8080"}
    assert (await mesh.plane.push(pod("p-3", "10.1.0.3"))).accepted
    assert (await mesh.node.page("xds_client"))["unconfirmed_acks"] == status["unconfirmed_acks"]


async def test_a_killed_map_writer_catches_up_and_the_maps_never_lose_anything(mesh: Whole) -> None:
    pods = [pod(f"p-{n}", f"10.1.0.{n}", services=["web"]) for n in range(1, 50)]
    assert (await mesh.plane.push(service("web", "10.96.0.1"), *pods)).accepted
    await mesh.plane.push(policy("p"), type_url=AUTHORIZATION)
    with kernel_view.nothing_goes_missing(mesh.node.maps_dir):
        for number in range(50, 53):
            await mesh.node.kill("map_writer")
            answer = await mesh.plane.push(pod(f"p-{number}", f"10.1.0.{number}", services=["web"]))
            assert answer.accepted
            await mesh.node.until_page(
                "xds_client", lambda said: said["not_in_kernel"] == 0, "followed again"
            )
            view = kernel_view.read(mesh.node.maps_dir)
            assert len(view.services["10.96.0.1 80"].endpoints) == number
    assert await mesh.node.errors("xds_client") == []


async def test_a_client_that_restarts_without_map_writer_says_that_nothing_is_in_the_kernel(
    mesh: Whole,
) -> None:
    assert (await mesh.plane.push(service("web", "10.96.0.1"))).accepted
    mesh.node.signal("map_writer", signal.SIGSTOP)
    try:
        mesh.plane.client_restarted()
        number = len(mesh.plane.streams)
        await mesh.node.kill("xds_client")
        await mesh.plane.next_stream(number)
        assert (await mesh.plane.push()).accepted
        status = await mesh.node.page("xds_client")
        assert status["map_writer"] == "away"
        assert status["not_in_kernel"] == status["seq"] > 0
    finally:
        mesh.node.signal("map_writer", signal.SIGCONT)
    await mesh.node.until_page("xds_client", lambda said: said["not_in_kernel"] == 0, "followed again")


async def test_a_service_that_is_wrong_when_all_begin_anew_stays_as_the_maps_have_it(mesh: Whole) -> None:
    pods = [pod(f"p-{n}", f"10.1.0.{n}", services=["web"]) for n in (1, 2)]
    assert (await mesh.plane.push(service("web", "10.96.0.1"), *pods)).accepted
    before = kernel_view.read(mesh.node.maps_dir)
    good = mesh.plane.state[ADDRESS][host("web")]
    mesh.plane.state[ADDRESS][host("web")] = resource(host("web"), b"\x12\x01\xff")
    mesh.plane.client_restarted()
    number = len(mesh.plane.streams)
    with kernel_view.nothing_goes_missing(mesh.node.maps_dir):
        mesh.node.signal("map_writer", signal.SIGSTOP)
        await mesh.node.kill("xds_client")
        await mesh.node.kill("map_writer")
        await mesh.plane.next_stream(number)
        kept = await mesh.node.until_page("map_writer", lambda said: said.get("kept_as_in_maps"), "swept")
    assert kept["kept_as_in_maps"] == [host("web")]
    assert kernel_view.read(mesh.node.maps_dir) == before
    assert (await mesh.plane.push(removed=[uid("p-1")])).accepted
    view = kernel_view.read(mesh.node.maps_dir)
    assert view.services["10.96.0.1 80"].endpoints == {"10.1.0.2 8080"}
    assert (await mesh.plane.push(good, pods[0])).accepted
    assert kernel_view.read(mesh.node.maps_dir) == before
    assert (await mesh.node.page("map_writer"))["kept_as_in_maps"] == []


async def test_a_policy_that_a_workload_names_and_nobody_sent_is_told(mesh: Whole) -> None:
    api = pod("api", "10.1.0.1", policies=["shop/sent", "shop/missing"])
    await mesh.plane.push(api, pod("web", "10.1.0.2"))
    assert await _missing(mesh.node) == {"shop/sent": 1, "shop/missing": 1}
    await mesh.plane.push(policy("sent"), type_url=AUTHORIZATION)
    assert await _missing(mesh.node) == {"shop/missing": 1}
    workloads = await mesh.node.page("map_writer", "/workloads")
    assert {w["name"]: w["policies_missing"] for w in workloads} == {"api": ["shop/missing"], "web": []}
    await mesh.plane.push(policy("missing"), type_url=AUTHORIZATION)
    assert await _missing(mesh.node) == {}
    await mesh.plane.push(removed=["shop/sent"], type_url=AUTHORIZATION)
    assert await _missing(mesh.node) == {"shop/sent": 1}
    await mesh.plane.push(removed=[uid("api")])
    assert await _missing(mesh.node) == {}


async def _missing(node: MeshNode) -> dict[str, int]:
    found: dict[str, int] = (await node.page("map_writer"))["policies_missing"]
    assert await _metric(node, "map_writer", "mesh_policies_missing") == len(found)
    return found


@pytest.mark.parametrize("padding", [30_000, 3_000_000])
async def test_large_policies_and_many_removals_pass_the_bus(mesh: Whole, padding: int) -> None:
    """A part of a response is larger than the broker takes in one message."""
    count = 400 if padding < 1_000_000 else 8
    resyncs = (await mesh.node.page("map_writer"))["resyncs"]  # more than one where it started first
    policies = [policy(f"p-{n}-{'x' * 150}", padding=padding) for n in range(count)]
    assert (await mesh.plane.push(*policies, type_url=AUTHORIZATION, deadline_s=60)).accepted
    assert (await mesh.node.page("map_writer"))["policies"] == count
    removed = [item.name for item in policies]
    assert (await mesh.plane.push(removed=removed, type_url=AUTHORIZATION)).accepted
    status = await mesh.node.page("map_writer")
    assert status["policies"] == 0
    assert status["resyncs"] == resyncs


async def test_a_mesh_that_is_removed_at_once_is_removed_whole(mesh: Whole) -> None:
    count, padding = 40_000, "x" * 200  # names of more than the broker takes in one message
    resyncs = (await mesh.node.page("map_writer"))["resyncs"]
    pods = [pod(f"{padding}-{n}", f"10.{n // 62500 + 2}.{n // 250 % 250}.{n % 250}") for n in range(count)]
    assert (await mesh.plane.push(*pods, deadline_s=60)).accepted
    assert len(kernel_view.read(mesh.node.maps_dir).addresses) == count
    assert (await mesh.plane.push(removed=[item.name for item in pods], deadline_s=60)).accepted
    assert kernel_view.read(mesh.node.maps_dir).addresses == {}
    assert (await mesh.node.page("map_writer"))["resyncs"] == resyncs


async def test_after_the_answers_deadline_a_slow_map_writer_is_no_longer_waited_for(tmp_path: Path) -> None:
    async with serving() as plane:
        settings = {"PYKMESH_REPORT_DEADLINE_S": "0.3"}
        options = Options(xds_address=f"127.0.0.1:{plane.port}", settings=settings)
        async with running(tmp_path, options) as node:
            await node.until_page("xds_client", lambda said: said["map_writer"] == "there", "followed")
            node.signal("map_writer", signal.SIGSTOP)
            try:
                started = time.monotonic()
                assert (await plane.push(pod("p-1", "10.1.0.1"))).accepted
                assert 0.3 <= time.monotonic() - started < 1.5
                assert (await node.page("xds_client"))["not_in_kernel"] == 1
            finally:
                node.signal("map_writer", signal.SIGCONT)
            with anyio.fail_after(20):
                await node.until_page("xds_client", lambda said: said["not_in_kernel"] == 0, "followed")
