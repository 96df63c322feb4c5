"""Streams end, servers restart, tokens rotate: xds_client comes back and says what it holds."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import grpc
import pytest
import trustme

from pykmesh.node.mesh import Options
from services.xds_client.pace import BUDGET
from tests.control import kernel_view
from tests.control.conftest import Client
from tests.control.kernel_view import Entry
from tests.control.mesh_node import CLIENT, running
from tests.control.resources import host, pod, policy, service, uid
from tests.control.scripted_ads import (
    ADDRESS,
    AUTHORIZATION,
    RECEIVE_BYTES_MAX,
    Conversation,
    ScriptedAds,
    serving,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_event_loop")]

SOON_S = 0.5  # far less than any back-off that has grown


@pytest.fixture
async def held(client: Client) -> Client:
    """A client that holds something of each type."""
    await client.plane.push(service("web", "10.96.0.1"), pod("web-1", "10.1.0.1", services=["web"]))
    await client.plane.push(policy("p"), type_url=AUTHORIZATION)
    return client


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN]
)
async def test_after_an_ordinary_end_it_comes_back_at_once_with_all_versions(
    held: Client, code: grpc.StatusCode
) -> None:
    for _ in range(8):  # with a back-off that doubled, the last would take seconds
        number, ended = len(held.plane.streams), time.monotonic()
        await held.plane.stream.end(code)
        stream = await held.plane.next_stream(number)
        assert time.monotonic() - ended < SOON_S
        assert stream.first[ADDRESS].initial_resource_versions.keys() == {host("web"), uid("web-1")}
        assert stream.first[AUTHORIZATION].initial_resource_versions.keys() == {"shop/p"}
    assert await held.node.errors("xds_client") == []


async def test_a_control_plane_that_ends_a_stream_before_it_said_anything_is_told_with_its_words(
    held: Client,
) -> None:
    held.plane.answers_subscriptions = False
    number = len(held.plane.streams)
    await held.plane.stream.end()
    stream = await held.plane.next_stream(number)
    await stream.end(grpc.StatusCode.UNKNOWN)  # istiod without ambient: "ztunnel requires …"
    said = await held.node.until_page("xds_client", lambda said: said["errors"], "told")
    assert said["errors"][-1]["event"] == "stream_failed"
    assert (said["errors"][-1]["code"], said["errors"][-1]["detail"]) == ("UNKNOWN", "as the test wants it")


async def test_a_failure_after_a_response_does_not_lengthen_the_next_back_off(held: Client) -> None:
    for _ in range(8):
        assert (await held.plane.push()).accepted
        number, ended = len(held.plane.streams), time.monotonic()
        await held.plane.stream.end(grpc.StatusCode.UNAVAILABLE)
        await held.plane.next_stream(number)
        assert time.monotonic() - ended < SOON_S
    (error,) = (await held.node.page("xds_client"))["errors"]
    assert error["code"] == "UNAVAILABLE"


async def test_a_server_that_never_answers_is_asked_less_and_less_often(held: Client) -> None:
    held.plane.answers_subscriptions = False
    times = []
    for _ in range(7):
        number = len(held.plane.streams)
        await held.plane.stream.end(grpc.StatusCode.UNAVAILABLE)
        await held.plane.next_stream(number)
        times.append(time.monotonic())
    assert times[-1] - times[-2] > 0.16  # at least half of 0.01 s doubled five times, where 0.32 s is meant
    held.plane.answers_subscriptions = True
    number = len(held.plane.streams)
    await held.plane.stream.end()
    await held.plane.next_stream(number)
    assert (await held.plane.push(pod("web-2", "10.1.0.2"))).accepted


async def _end_each_for(
    time_s: float, plane: ScriptedAds, end: Callable[[Conversation], Awaitable[None]]
) -> int:
    """Ends each stream as soon as it is there; how many came."""
    first = number = len(plane.streams)
    await plane.stream.end()
    with anyio.move_on_after(time_s):
        while True:
            stream = await plane.next_stream(number)
            number += 1
            await end(stream)
    return len(plane.streams) - first


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE])
async def test_a_server_that_ends_each_stream_at_once_is_not_asked_without_end(
    held: Client, code: grpc.StatusCode
) -> None:
    streams = await _end_each_for(3.0, held.plane, lambda stream: stream.end(code))
    assert BUDGET < streams < 40
    if held.plane.stream.ending.done():
        await held.plane.next_stream()
    assert (await held.plane.push(pod("web-2", "10.1.0.2"))).accepted


async def test_a_server_that_sends_garbage_is_asked_less_and_less_often(held: Client) -> None:
    held.plane.answers_subscriptions = False
    streams = await _end_each_for(3.0, held.plane, lambda stream: stream.write_bytes(b"\xff\xff\xff\xff"))
    assert 5 < streams < 15  # 0.01 s, doubled: the tenth pause is 2.5 s at least
    (error,) = (await held.node.page("xds_client"))["errors"]
    assert error["event"] == "response_not_understood"


async def test_what_went_while_it_was_away_is_removed_and_what_came_is_there(held: Client) -> None:
    await held.plane.stop()
    del held.plane.state[ADDRESS][uid("web-1")]
    held.plane.state[ADDRESS][uid("web-2")] = pod("web-2", "10.1.0.2", services=["web"])
    number = len(held.plane.streams)
    await held.plane.start()
    await held.plane.next_stream(number)
    assert (await held.plane.push()).accepted  # answered after what came first
    assert await held.node.held() == {host("web"), uid("web-2")}
    assert held.plane.believed[ADDRESS].keys() == {host("web"), uid("web-2")}


@pytest.mark.kernel
async def test_more_than_a_request_takes_is_not_named_and_what_went_meanwhile_is_found_out(
    tmp_path: Path,
) -> None:
    """To the maps, where what stays is not touched."""
    async with serving() as plane:
        limit = {"PYKMESH_MAX_REQUEST_BYTES": "3000"}
        options = Options(xds_address=f"127.0.0.1:{plane.port}", settings=limit)
        async with running(tmp_path, options) as node:
            pods = [pod(f"p-{n}", f"10.1.0.{n}", services=["web"]) for n in range(1, 101)]
            services = [service("web", "10.96.0.1"), service("old", "10.96.0.2")]
            assert (await plane.push(*services, *pods)).accepted
            assert (await plane.push(policy("p"), type_url=AUTHORIZATION)).accepted
            before, seq = kernel_view.read(node.maps_dir), (await node.page("xds_client"))["seq"]
            resyncs = (await node.page("map_writer"))["resyncs"]
            gone = {host("old"), *(item.name for item in pods[90:])}
            for name in gone:
                del plane.state[ADDRESS][name]
            plane.may_name_nothing = True
            number = len(plane.streams)
            await plane.stream.end()
            stream = await plane.next_stream(number)
            assert dict(stream.first[ADDRESS].initial_resource_versions) == {}
            assert stream.first[AUTHORIZATION].initial_resource_versions.keys() == {"shop/p"}
            assert (await plane.push()).accepted

            assert await node.held() == {host("web"), *(item.name for item in pods[:90])}
            view = kernel_view.read(node.maps_dir)
            endpoints = frozenset(f"10.1.0.{n} 8080" for n in range(1, 91))
            assert view.services == {"10.96.0.1 80": Entry("routed", endpoints)}
            lost = {"10.96.0.2", *(f"10.1.0.{n}" for n in range(91, 101))}
            assert before.addresses.keys() - view.addresses.keys() == lost
            status = await node.page("xds_client")
            assert status["seq"] == seq + 1, "one batch, of removals"
            assert status["resources"] == {"address": 91, "authorization": 1}
            assert (await node.page("map_writer"))["resyncs"] == resyncs

            assert (await plane.push(pod("p-1", "10.1.0.1"))).accepted, "only the first response is whole"
            assert len(await node.held()) == 91


async def test_what_is_more_than_istiod_takes_in_a_request_does_not_keep_it_away(held: Client) -> None:
    padding = "x" * 200
    pods = [pod(f"{padding}-{n}", f"10.2.{n // 250}.{n % 250}") for n in range(20_000)]
    assert (await held.plane.push(*pods, deadline_s=60)).accepted
    named = sum(len(item.name) + len(item.version) for item in pods)
    assert named > RECEIVE_BYTES_MAX
    held.plane.may_name_nothing = True
    held.plane.state[ADDRESS].clear()
    number = len(held.plane.streams)
    await held.plane.stream.end()
    await held.plane.next_stream(number)
    assert (await held.plane.push()).accepted
    assert await held.node.held() == set()
    assert await held.node.errors("xds_client") == []


async def test_a_server_that_finds_a_request_too_large_gets_it_without_versions(held: Client) -> None:
    pods = [pod(f"p-{n}", f"10.2.{n // 250}.{n % 250}") for n in range(8_000)]
    assert (await held.plane.push(*pods)).accepted
    held.plane.may_name_nothing = True
    for gone in (uid("p-7"), uid("p-9")):
        await held.plane.stop()
        del held.plane.state[ADDRESS][gone]
        held.plane.receive_bytes_max = 50_000
        number = len(held.plane.streams)
        await held.plane.start()
        stream = await held.plane.next_stream(number)
        assert dict(stream.first[ADDRESS].initial_resource_versions) == {}
        assert (await held.plane.push()).accepted
        assert gone not in await held.node.held()
    held.plane.receive_bytes_max = RECEIVE_BYTES_MAX
    await held.plane.stop()
    number = len(held.plane.streams)
    await held.plane.start()
    stream = await held.plane.next_stream(number)
    assert len(stream.first[ADDRESS].initial_resource_versions) == 8_000


async def test_a_server_that_limits_the_rate_is_named_all_that_is_held(held: Client) -> None:
    number = len(held.plane.streams)
    await held.plane.stream.end(grpc.StatusCode.RESOURCE_EXHAUSTED)
    stream = await held.plane.next_stream(number)
    assert stream.first[ADDRESS].initial_resource_versions.keys() == {host("web"), uid("web-1")}


async def test_everything_is_kept_while_no_server_is_there(held: Client) -> None:
    await held.plane.stop()
    status = await held.node.until_page("xds_client", lambda said: not said["connected"], "alone")
    assert status["resources"] == {"address": 2, "authorization": 1}
    await held.node.until_page("xds_client", lambda said: said["errors"], "aware of it")
    await held.node.until_ready("xds_client")


async def test_a_stream_that_ends_behind_a_large_response_ends_nothing_else(held: Client) -> None:
    """The answer to the first is due when the stream is over and the second still being read."""
    pods = [pod(f"p-{n}", f"10.{2 + n // 62500}.{n // 250 % 250}.{n % 250}") for n in range(20_000)]
    pid = held.node.supervisor.pids["xds_client"]
    for _ in range(3):
        number = len(held.plane.streams)
        held.plane.state[ADDRESS].update({item.name: item for item in pods})
        await held.plane.stream.write(held.plane.response([pod("web-1", "10.1.0.9")]))
        await held.plane.stream.write(held.plane.response(pods))
        await held.plane.stream.end()
        await held.plane.next_stream(number)
    assert (await held.plane.push(pod("web-2", "10.1.0.2"), deadline_s=60)).accepted
    assert held.node.supervisor.pids["xds_client"] == pid


async def test_a_new_process_names_nothing_and_gets_everything(held: Client) -> None:
    held.plane.client_restarted()
    number = len(held.plane.streams)
    await held.node.kill("xds_client")
    stream = await held.plane.next_stream(number)
    assert dict(stream.first[ADDRESS].initial_resource_versions) == {}
    assert (await held.plane.push()).accepted
    assert await held.node.held() == {host("web"), uid("web-1")}


async def test_with_a_root_file_it_speaks_tls_and_the_token_is_read_anew_for_each_stream(
    tmp_path: Path,
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("istiod.istio-system.svc")
    root, token = tmp_path / "root.pem", tmp_path / "token"
    authority.cert_pem.write_to_path(root)
    token.write_text("first\n")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    async with serving(grpc.ssl_server_credentials([pair])) as plane:
        options = Options(
            xds_address=f"127.0.0.1:{plane.port}", xds_root_cert=root, xds_token_file=token,
            xds_server_name="istiod.istio-system.svc", cluster_id="east",
        )  # fmt: skip
        async with running(tmp_path, options, CLIENT) as node:
            assert plane.stream.metadata["authorization"] == "Bearer first"
            assert plane.stream.metadata["clusterid"] == "east"
            assert (await plane.push(pod("web-1", "10.1.0.1"))).accepted
            token.write_text("second")
            number = len(plane.streams)
            await plane.stream.end()
            assert (await plane.next_stream(number)).metadata["authorization"] == "Bearer second"

            for broken in (None, b"", b"\xff\xfe", b"two\nlines"):
                token.unlink(missing_ok=True)
                if broken is not None:
                    token.write_bytes(broken)
                number, pid = len(plane.streams), node.supervisor.pids["xds_client"]
                await plane.stream.end()
                said = await node.until_page(
                    "xds_client",
                    lambda said: any("token" in e.get("error", "") for e in said["errors"]),
                    "aware",
                )
                assert str(token) in said["errors"][-1]["error"]
                token.write_text("third")
                assert (await plane.next_stream(number)).metadata["authorization"] == "Bearer third"
                assert node.supervisor.pids["xds_client"] == pid


async def test_a_server_of_another_authority_is_not_spoken_with(tmp_path: Path) -> None:
    root = tmp_path / "root.pem"
    trustme.CA().cert_pem.write_to_path(root)
    certificate = trustme.CA().issue_cert("localhost", "127.0.0.1")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    async with serving(grpc.ssl_server_credentials([pair])) as plane:
        options = Options(xds_address=f"127.0.0.1:{plane.port}", xds_root_cert=root)
        async with running(tmp_path, options, CLIENT, ready=False) as node:
            said = await node.until_page("xds_client", lambda said: said["errors"], "aware of it")
            assert said["waits_for"] == ["control plane"]
            assert said["errors"][0]["code"] == "UNAVAILABLE"
            assert plane.streams == []
            root.write_text("no certificate")
            await node.until_page(
                "xds_client", lambda said: str(root) in str(said["errors"]), "aware of the root certificate"
            )


async def test_the_node_says_who_it_is(tmp_path: Path) -> None:
    async with serving() as plane:
        options = Options(
            xds_address=f"127.0.0.1:{plane.port}", node_name="node-a", namespace="mesh", network="net-1",
            settings={"PYKMESH_NODE_IP": "10.0.0.7", "PYKMESH_SERVICE_ACCOUNT": "agent"},
        )  # fmt: skip
        async with running(tmp_path, options, CLIENT):
            node = plane.stream.first[ADDRESS].node
    assert node.id == "ztunnel~10.0.0.7~pykmesh-node-a.mesh~mesh.svc.cluster.local"
    assert node.user_agent_name.startswith("pykmesh/")
    assert dict(node.metadata) == {
        "NAME": "pykmesh-node-a", "NAMESPACE": "mesh", "INSTANCE_IPS": "10.0.0.7", "NODE_NAME": "node-a",
        "CLUSTER_ID": "Kubernetes", "NETWORK": "net-1", "SERVICE_ACCOUNT": "agent",
    }  # fmt: skip
