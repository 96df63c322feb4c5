"""The control plane serves its folder over delta ADS, to a real client, live."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import grpc
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from pykmesh.controlplane.server import ADDRESS_TYPE, AUTHORIZATION_TYPE
from pykmesh.proto import workload_pb2 as wire
from pykmesh.proto.discovery_pb2 import Node

from .ads_client import DEADLINE_S, AdsClient, connected, running
from .manifest_texts import pod, service, write

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

WEB = "shop/web.shop.svc.cluster.local"
WEB_1, WEB_2 = "Kubernetes//Pod/shop/web-1", "Kubernetes//Pod/shop/web-2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "web.yaml", service("web", clusterIP="10.96.1.1"), pod("web-1", podIP="10.244.1.1"))
    return tmp_path


_SETTINGS, _PING, _GOAWAY = 4, 6, 7  # RFC 9113, section 6
_ACK = 1


def _frame(kind: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, 0, 0, 0, 0, 0]) + payload


async def _answer(received: BufferedByteReceiveStream) -> bytes:
    """What the next answer to a ping repeats; fails if the server ends the connection before."""
    while True:
        head = await received.receive_exactly(9)
        payload = await received.receive_exactly(int.from_bytes(head[:3])) if any(head[:3]) else b""
        assert head[3] != _GOAWAY, payload
        if head[3] == _PING and head[4] == _ACK:
            return payload


async def _until_all_is_read(client: AdsClient) -> None:
    """A response to a request shows that those before it were read. It is refused, not to be counted."""
    await client.subscribe(type_url=AUTHORIZATION_TYPE)
    await client.receive(refuse="only to see it come")


async def test_the_first_response_is_the_whole_mesh(folder: Path) -> None:
    async with running(folder) as (plane, port), connected(port) as client:
        await client.subscribe()
        response = await client.receive()
        assert response.type_url == ADDRESS_TYPE
        assert client.held.keys() == {WEB, WEB_1} == plane.resources.keys()
        assert all(len(version) == 16 for version in client.versions.values())
        assert response.system_version_info
        assert "pykmesh" in response.control_plane.identifier
        workload = wire.Address.FromString(client.held[WEB_1]).workload
        assert workload.services[WEB].ports[0].target_port == 8080
        (seen,) = plane.clients
        assert seen.node_id.startswith("ztunnel~")


async def test_a_folder_that_says_nothing_is_answered_with_an_empty_response(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    async with running(tmp_path) as (_, port), connected(port) as client:
        await client.subscribe()
        response = await client.receive()
        assert not response.resources
        assert not response.removed_resources


async def test_policies_are_answered_empty_and_those_held_are_removed(folder: Path) -> None:
    async with running(folder) as (_, port), connected(port) as client:
        await client.subscribe(type_url=AUTHORIZATION_TYPE, versions={"shop/old": ""})
        response = await client.receive()
        assert response.type_url == AUTHORIZATION_TYPE
        assert not response.resources
        assert response.removed_resources == ["shop/old"]


async def test_a_change_on_disk_comes_as_a_delta_with_removals_and_news_together(folder: Path) -> None:
    async with running(folder) as (_, port), connected(port) as client:
        await client.subscribe()
        await client.receive()
        write(folder / "web.yaml", service("web", clusterIP="10.96.1.1"), pod("web-2", podIP="10.244.1.1"))
        response = await client.receive()
        assert [resource.name for resource in response.resources] == [WEB_2]
        assert response.removed_resources == [WEB_1]


async def test_a_file_that_says_the_same_in_other_words_is_no_change(folder: Path) -> None:
    async with running(folder) as (_, port), connected(port) as client:
        await client.subscribe()
        await client.receive()
        path = folder / "web.yaml"
        path.write_text(f"# a comment\n{path.read_text()}")
        write(folder / "more.yaml", pod("web-2", podIP="10.244.1.2"))
        response = await client.receive()
        assert [resource.name for resource in response.resources] == [WEB_2]


async def test_changes_of_many_files_at_once_come_as_one_delta(folder: Path) -> None:
    async with running(folder, debounce_ms=500) as (_, port), connected(port) as client:
        await client.subscribe()
        await client.receive()
        for i in range(20):
            write(folder / f"{i}.yaml", pod(f"pod-{i}"))
        assert len((await client.receive()).resources) == 20


async def test_all_clients_get_a_change(folder: Path) -> None:
    async with running(folder) as (plane, port), connected(port) as one, connected(port) as other:
        for client in (one, other):
            await client.subscribe()
            await client.receive()
        assert len(plane.clients) == 2
        (folder / "web.yaml").unlink()
        for client in (one, other):
            assert sorted((await client.receive()).removed_resources) == sorted([WEB_1, WEB])


async def test_who_comes_back_gets_what_changed_and_the_names_of_what_is_gone(folder: Path) -> None:
    async with running(folder) as (_, port), connected(port) as client:
        await client.subscribe()
        await client.receive()
    write(folder / "web.yaml", service("web", clusterIP="10.96.1.2"), pod("web-1", podIP="10.244.1.1"))
    async with running(folder) as (_, port), connected(port) as again:  # another run: versions still hold
        await again.subscribe({**client.versions, WEB_2: "1"})
        response = await again.receive()
        assert [resource.name for resource in response.resources] == [WEB]
        assert response.removed_resources == [WEB_2]


async def test_who_comes_back_to_an_unchanged_mesh_gets_an_empty_response(folder: Path) -> None:
    async with running(folder) as (_, port):
        async with connected(port) as client:
            await client.subscribe()
            await client.receive()
        async with connected(port) as again:
            await again.subscribe(client.versions)
            response = await again.receive()
            assert not response.resources
            assert not response.removed_resources


async def test_the_older_dialect_has_no_versions_and_sends_all_again(folder: Path) -> None:
    async with running(folder, dialect="1.25") as (_, port), connected(port) as client:
        await client.subscribe({WEB: ""})
        response = await client.receive()
        assert {resource.version for resource in response.resources} == {""}
        assert len(response.resources) == 2


async def test_a_wildcard_subscription_sent_again_is_answered_in_full(folder: Path) -> None:
    async with running(folder) as (_, port), connected(port) as client:
        await client.subscribe()
        await client.receive()
        await client.request(resource_names_subscribe=["*"])
        assert len((await client.receive()).resources) == 2


async def test_a_refusal_is_recorded_and_the_stream_goes_on(folder: Path) -> None:
    async with running(folder) as (plane, port), connected(port) as client:
        await client.subscribe()
        refused = await client.receive(refuse="web-1: no such node")
        await _until_all_is_read(client)
        write(folder / "more.yaml", pod("web-2"))
        response = await client.receive()
        assert [resource.name for resource in response.resources] == [WEB_2]  # not the refused ones again
        nack = plane.last_nacks[0]
        assert (nack.code, nack.message, nack.nonce) == (3, "web-1: no such node", refused.nonce)
        assert nack.type_url == ADDRESS_TYPE
        (seen,) = plane.clients
        assert seen.sent == 3


async def test_an_answer_to_nothing_sent_is_ignored(folder: Path) -> None:
    async with running(folder) as (plane, port), connected(port) as client:
        await client.subscribe()
        await client.receive()
        await client.request(response_nonce="of another life")
        await _until_all_is_read(client)
        assert plane.clients[0].acked == 1


async def test_a_client_without_node_is_refused(folder: Path) -> None:
    async with running(folder) as (plane, port), connected(port) as client:
        await client.request(node=Node())
        assert await client.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not plane.clients


async def test_a_broken_file_changes_nothing_and_is_among_the_errors(folder: Path) -> None:
    async with running(folder) as (plane, port), connected(port) as client:
        await client.subscribe()
        await client.receive()
        (folder / "web.yaml").write_text("kind: [")
        write(folder / "more.yaml", pod("web-2"))
        response = await client.receive()
        assert [resource.name for resource in response.resources] == [WEB_2]
        assert not response.removed_resources
        assert [error.file for error in plane.errors] == ["web.yaml"]


async def test_an_object_without_a_free_address_is_among_the_errors(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", service("a"), service("b"))
    async with running(tmp_path, service_cidr_v4="10.0.0.0/30") as (plane, _):  # one address to give
        (error,) = plane.errors
        assert str(error) == "a.yaml:21: Service shop/b has no address: the range 10.0.0.0/30 is full"


async def test_a_port_that_is_taken_is_an_error_that_says_so(folder: Path) -> None:
    async with running(folder) as (_, port):
        with pytest.RaisesGroup(
            pytest.RaisesExc(OSError, match=f"cannot listen on 127.0.0.1:{port}"),
            allow_unwrapped=True,
            flatten_subgroups=True,
        ):
            async with running(folder, listen_port=port):
                pass


async def test_a_client_may_ping_without_end(folder: Path) -> None:
    """Pings as the client's keepalive sends them, only faster; each is answered, and nobody is sent away."""
    async with running(folder) as (_, port), await anyio.connect_tcp("127.0.0.1", port) as connection:
        received = BufferedByteReceiveStream(connection)
        await connection.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS))
        with anyio.fail_after(DEADLINE_S):
            for number in range(50):
                await connection.send(_frame(_PING, number.to_bytes(8)))
                assert await _answer(received) == number.to_bytes(8)


async def test_a_mesh_of_more_than_four_mebibytes_is_one_message(tmp_path: Path) -> None:
    labels = {"app": "x" * 4000}
    pods = [{**pod(f"pod-{i}"), "metadata": {"name": f"pod-{i}", "labels": labels}} for i in range(1200)]
    write(tmp_path / "a.yaml", *pods)
    async with running(tmp_path) as (_, port), connected(port) as client:
        await client.subscribe()
        response = await client.receive()
        assert response.ByteSize() > 4 << 20
        assert len(response.resources) == 1200


async def test_an_end_with_clients_connected_is_prompt_and_they_see_it(folder: Path) -> None:
    async with AsyncExitStack() as stack:
        async with running(folder) as (_, port):
            client = await stack.enter_async_context(connected(port))
            await client.subscribe()
            await client.receive()
            begin = anyio.current_time()
        assert anyio.current_time() - begin < 3
        assert await client.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
