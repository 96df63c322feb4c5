"""The broker stores nothing: what it loses is found missing and fetched; nothing is deleted meanwhile."""

from __future__ import annotations

import signal

import anyio
import pytest

from tests.control import kernel_view
from tests.control.conftest import Whole
from tests.control.resources import Resource, host, pod, pod_message, service, uid
from tests.control.scripted_ads import ADDRESS, resource

pytestmark = [pytest.mark.anyio, pytest.mark.kernel, pytest.mark.usefixtures("one_event_loop")]

MANY = 20_000


@pytest.fixture
async def busy(mesh: Whole) -> Whole:
    """A mesh that holds a service with endpoints, and 500 other pods."""
    answer = await mesh.plane.push(
        service("web", "10.96.0.1", "fd96::1"), *(member(n) for n in range(1, 20)), *many(500)
    )
    assert answer.accepted
    return mesh


def member(number: int) -> Resource:
    return pod(f"m-{number}", f"10.1.0.{number}", services=["web"])


def many(count: int) -> list[Resource]:
    return [pod(f"p-{n}", f"10.2.{n // 250}.{n % 250}") for n in range(count)]


async def _until_in_the_kernel(mesh: Whole) -> None:
    await mesh.node.until_page(
        "xds_client", lambda said: said["map_writer"] == "there" and said["not_in_kernel"] == 0, "followed"
    )


async def test_a_broker_that_is_killed_and_started_again_costs_nothing(busy: Whole) -> None:
    with kernel_view.nothing_goes_missing(busy.node.maps_dir):
        for number in range(20, 24):
            await busy.node.kill("nats")
            assert (await busy.plane.push(member(number))).accepted
            await _until_in_the_kernel(busy)
            endpoints = kernel_view.read(busy.node.maps_dir).services["10.96.0.1 80"].endpoints
            assert len(endpoints) == number
    assert (await busy.node.page("xds_client"))["streams"] == 1, "the control plane need not know"


async def test_changes_made_while_there_is_no_broker_arrive_when_it_is_back(busy: Whole) -> None:
    busy.node.signal("nats", signal.SIGSTOP)
    try:
        answers = [await busy.plane.tell(removed=[uid("m-1")]), await busy.plane.tell(member(30))]
        with anyio.fail_after(30):
            assert all([(await answer).accepted for answer in answers])
        assert (await busy.node.page("xds_client"))["not_in_kernel"] == 2
    finally:
        busy.node.signal("nats", signal.SIGCONT)
    await busy.node.kill("nats")
    await _until_in_the_kernel(busy)
    endpoints = kernel_view.read(busy.node.maps_dir).services["10.96.0.1 80"].endpoints
    assert endpoints == {f"10.1.0.{n} 8080" for n in [*range(2, 20), 30]}


def large(number: int, size: int) -> Resource:
    """A pod behind the service, with an extension of `size` bytes."""
    message = pod_message(f"m-{number}", f"10.1.0.{number}", services=["web"])
    extension = message.workload.extensions.add(name="large")
    extension.config.type_url, extension.config.value = "type.googleapis.com/shop.Large", bytes(size)
    return resource(uid(f"m-{number}"), message.SerializeToString())


async def test_resources_as_large_as_any_that_is_accepted_come_through_in_the_log_and_in_snapshots(
    busy: Whole,
) -> None:
    numbers = range(20, 24)
    for number, size in zip(numbers, (2 << 20, 2 << 20, 3 << 20, (4 << 20) - 500), strict=True):
        assert (await busy.plane.push(large(number, size))).accepted
    await _until_in_the_kernel(busy)
    endpoints = kernel_view.read(busy.node.maps_dir).services["10.96.0.1 80"].endpoints
    assert endpoints == {f"10.1.0.{n} 8080" for n in range(1, 24)}
    await busy.node.kill("map_writer")
    await busy.node.until_page(
        "map_writer", lambda said: said["ready"] and said["workloads"] == 523, "in step by a snapshot"
    )
    for process in ("xds_client", "map_writer"):
        assert await busy.node.errors(process) == []


@pytest.mark.parametrize("late_s", [0.0, 0.15, 0.3, 0.6])
async def test_a_broker_that_is_killed_while_a_response_is_published_loses_nothing(
    busy: Whole, late_s: float
) -> None:
    with kernel_view.nothing_goes_missing(busy.node.maps_dir):
        seq = (await busy.node.page("xds_client"))["seq"]
        answer = await busy.plane.tell(*many(MANY), member(40))
        if late_s:
            await busy.node.until_page("xds_client", lambda said: said["seq"] > seq, "publishing")
            await anyio.sleep(late_s - 0.15)  # how far it has got, not a wait for it
        await busy.node.kill("nats")
        with anyio.fail_after(60):
            assert (await answer).accepted
        await _until_in_the_kernel(busy)
    view = kernel_view.read(busy.node.maps_dir)
    assert len(view.addresses) == 2 + 20 + MANY
    assert "10.1.0.40 8080" in view.services["10.96.0.1 80"].endpoints


async def test_a_client_that_restarts_deletes_nothing_until_the_control_plane_has_said_everything(
    busy: Whole,
) -> None:
    busy.plane.answers_subscriptions = False
    busy.plane.client_restarted()
    number = len(busy.plane.streams)
    with kernel_view.nothing_goes_missing(busy.node.maps_dir):
        await busy.node.kill("xds_client")
        stream = await busy.plane.next_stream(number)
        resyncs = (await busy.node.page("map_writer"))["resyncs"]
        await busy.node.until_page("map_writer", lambda said: said["resyncs"] >= resyncs, "resyncing")
        half = [item for item in busy.plane.state[ADDRESS].values() if item.name != uid("m-1")]
        with anyio.fail_after(30):
            assert (await (await stream.write(busy.plane.response(half)))).accepted
        epoch = (await busy.node.page("xds_client"))["epoch"]
        followed = await busy.node.until_page(
            "map_writer", lambda said: said["epoch"] == epoch, "following the new epoch"
        )
        assert followed["workloads"] > len(half) - 1, "what was there before is answered with"
    await stream.write(busy.plane.everything(stream.first[ADDRESS]))
    for url, request in stream.first.items():
        if url != ADDRESS:
            with anyio.fail_after(30):
                assert (await (await stream.write(busy.plane.everything(request)))).accepted
    await _until_in_the_kernel(busy)
    assert len(kernel_view.read(busy.node.maps_dir).services["10.96.0.1 80"].endpoints) == 19


async def test_what_was_applied_before_the_client_restarted_says_nothing_of_what_it_sends_now(
    busy: Whole,
) -> None:
    busy.plane.answers_subscriptions = False
    busy.plane.client_restarted()
    number = len(busy.plane.streams)
    await busy.node.kill("xds_client")
    stream = await busy.plane.next_stream(number)
    epoch = (await busy.node.page("xds_client"))["epoch"]
    await busy.node.until_page("map_writer", lambda said: said["epoch"] == epoch, "following the new epoch")
    await busy.node.until_page("xds_client", lambda said: said["map_writer"] == "there", "followed")
    busy.node.signal("map_writer", signal.SIGSTOP)
    try:
        del busy.plane.state[ADDRESS][uid("m-1")]
        for request in stream.first.values():
            with anyio.fail_after(30):
                assert (await (await stream.write(busy.plane.everything(request)))).accepted
        status = await busy.node.page("xds_client")
        assert status["not_in_kernel"] == status["seq"] > 0
    finally:
        busy.node.signal("map_writer", signal.SIGCONT)
    await _until_in_the_kernel(busy)
    endpoints = kernel_view.read(busy.node.maps_dir).services["10.96.0.1 80"].endpoints
    assert endpoints == {f"10.1.0.{n} 8080" for n in range(2, 20)}


async def test_what_went_while_the_client_was_away_is_swept_out_when_it_is_back(busy: Whole) -> None:
    await busy.plane.stop()
    for name in (uid("m-1"), *(item.name for item in many(500))):
        del busy.plane.state[ADDRESS][name]
    busy.plane.client_restarted()
    await busy.node.kill("xds_client")
    number = len(busy.plane.streams)
    await busy.plane.start()
    await busy.plane.next_stream(number)
    assert (await busy.plane.push()).accepted
    await _until_in_the_kernel(busy)
    view = kernel_view.read(busy.node.maps_dir)
    assert len(view.addresses) == 2 + 18
    assert view.services["10.96.0.1 80"].endpoints == {f"10.1.0.{n} 8080" for n in range(2, 20)}


async def test_everything_killed_at_once_converges_and_keeps_the_maps(busy: Whole) -> None:
    with kernel_view.nothing_goes_missing(busy.node.maps_dir):
        busy.plane.client_restarted()
        number = len(busy.plane.streams)
        for process in ("map_writer", "nats", "xds_client"):
            busy.node.signal(process, signal.SIGKILL)
        await busy.plane.next_stream(number)
        assert (await busy.plane.push(member(50))).accepted
        await _until_in_the_kernel(busy)
    assert len(kernel_view.read(busy.node.maps_dir).services["10.96.0.1 80"].endpoints) == 20
    assert (await busy.plane.push(removed=[host("web")])).accepted
    assert kernel_view.read(busy.node.maps_dir).services == {}
