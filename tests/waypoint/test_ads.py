"""What the server of Envoys' configuration sends when: to a client that plays an Envoy, and to a real one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import grpc.aio
import pytest
from structlog.testing import capture_logs

from pykmesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status
from services.waypoint_mgr.ads import METHOD, SERVICE, AdsServer
from services.waypoint_mgr.encode import (
    CLUSTER_TYPE,
    ENDPOINT_TYPE,
    LISTENER_TYPE,
    ROUTE_TYPE,
    Resources,
    encode,
    resources,
)

from .backends import Backend, ask
from .test_instance import canary
from .world import World, ads_server, at, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

DEADLINE_S = 10.0
SHORT = {CLUSTER_TYPE: "CDS", ENDPOINT_TYPE: "EDS", LISTENER_TYPE: "LDS", ROUTE_TYPE: "RDS"}
BY_SHORT = {short: type_url for type_url, short in SHORT.items()}


def of(cluster: str = "", listener: str = "", route: str = "", endpoints: str = "") -> Resources:
    """Resources of one name each; "" has none."""
    said = {CLUSTER_TYPE: cluster, ENDPOINT_TYPE: endpoints, LISTENER_TYPE: listener, ROUTE_TYPE: route}
    return {type_url: _named(text) for type_url, text in said.items()}


def _named(text: str) -> dict[str, bytes]:
    """`a=1 b=2`: two resources."""
    return {name: body.encode() for name, _, body in (one.partition("=") for one in text.split())}


class Client:
    """One stream. Answers are given when the test says so."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def ask(
        self, short: str, *names: str, held: Mapping[str, str] | None = None, node: str = "a"
    ) -> None:
        await self._call.write(
            DeltaDiscoveryRequest(
                node=Node(id=node),
                type_url=BY_SHORT[short],
                resource_names_subscribe=names,
                initial_resource_versions=held or {},
            )
        )

    async def receive(self) -> tuple[str, DeltaDiscoveryResponse]:
        with anyio.fail_after(DEADLINE_S):
            response: DeltaDiscoveryResponse = await self._call.read()
        assert response is not grpc.aio.EOF
        return SHORT[response.type_url], response

    async def answer(self, response: DeltaDiscoveryResponse, refuse: str = "") -> None:
        detail = Status(code=13, message=refuse) if refuse else None
        await self._call.write(
            DeltaDiscoveryRequest(
                type_url=response.type_url, response_nonce=response.nonce, error_detail=detail
            )
        )

    async def expect(self, told: str, refuse: str = "") -> DeltaDiscoveryResponse:
        """The next response, such as `CDS +a +b -c`, and answers it."""
        short, response = await self.receive()
        said = [f"+{resource.name}" for resource in response.resources]
        said += [f"-{name}" for name in response.removed_resources]
        assert " ".join([short, *sorted(said)]) == told
        await self.answer(response, refuse)
        return response


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = channel.stream_stream(
            f"/{SERVICE}/{METHOD}",
            request_serializer=DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=DeltaDiscoveryResponse.FromString,
        )()
        try:
            yield Client(call)
        finally:
            call.cancel()


@asynccontextmanager
async def envoy_with(
    folder: Path, first: Resources, route: str = "r"
) -> AsyncIterator[tuple[AdsServer, Client]]:
    """A client that has taken `first`: one cluster c, its endpoints, one listener and its routes."""
    async with ads_server(folder / "ads") as server, connected(folder / "ads") as client:
        server.publish("a", first)
        for short, names in (("CDS", []), ("EDS", ["c"]), ("LDS", []), ("RDS", [route])):
            await client.ask(short, *names)
            name = {"CDS": "c", "EDS": "c", "LDS": "l", "RDS": route}[short]
            await client.expect(f"{short} +{name}")
        with anyio.fail_after(DEADLINE_S):
            assert (await server.settled("a")).is_current
        yield server, client


FIRST = of("c=1", "l=1", "r=1", "c=1")


async def test_additions_go_out_in_order_whatever_the_order_of_requests(folder: Path) -> None:
    async with ads_server(folder / "ads") as server, connected(folder / "ads") as client:
        for short, names in (("RDS", ["r"]), ("LDS", []), ("EDS", ["c"]), ("CDS", [])):
            await client.ask(short, *names)
        server.publish("a", FIRST)
        # Each comes only when the one before was answered.
        for told in ("CDS +c", "EDS +c", "LDS +l", "RDS +r"):
            await client.expect(told)
        with anyio.fail_after(DEADLINE_S):
            assert (await server.settled("a")).is_current


async def test_a_cluster_is_removed_when_listeners_and_routes_without_it_were_taken(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("d=1", "l=2", "r=2", "d=1"))
        await client.expect("CDS +d")
        await client.ask("EDS", "d")
        await client.expect("EDS +d")
        await client.expect("LDS +l")
        short, routes = await client.receive()
        assert short == "RDS"
        assert not server.status()["a"].is_current
        await client.answer(routes)
        await client.expect("CDS -c")


async def test_refused_clusters_hold_back_what_needs_them_until_they_are_right(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("c=1 bad=1", "l=2", "r=2", "c=1"))
        await client.expect("CDS +bad", refuse="bad: no such thing")
        with anyio.fail_after(DEADLINE_S):
            status = await server.settled("a")
        assert [refusal.message for refusal in status.refusals] == ["bad: no such thing"]
        assert not status.is_current
        server.publish("a", of("c=1 bad=2", "l=2", "r=2", "c=1"))
        await client.expect("CDS +bad")
        await client.expect("LDS +l")
        await client.expect("RDS +r")


async def test_a_refusal_of_what_is_published_no_more_does_not_count(folder: Path) -> None:
    """Nor while the answer to what came after is awaited."""
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("c=1 bad=1", "l=2", "r=2", "c=1"))
        await client.expect("CDS +bad", refuse="bad: no such thing")
        with anyio.fail_after(DEADLINE_S):
            await server.settled("a")
        server.publish("a", of("c=1", "l=1", "r=1", "c=1"))
        assert not server.status()["a"].refusals
        server.publish("a", of("c=1 bad=1", "l=2", "r=2", "c=1"))
        await client.expect("CDS +bad", refuse="bad: no such thing")
        with anyio.fail_after(DEADLINE_S):
            assert (await server.settled("a")).refusals


async def test_what_is_refused_and_wanted_no_more_holds_up_nothing(folder: Path) -> None:
    """Though nothing of its type is sent whose answer could say so. Envoy may have some of it."""
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("c=1 bad=1", "l=2", "r=2", "c=1"))
        await client.expect("CDS +bad", refuse="bad: no such thing")
        with anyio.fail_after(DEADLINE_S):
            assert (await server.settled("a")).refusals
        server.publish("a", of("c=1", "l=2", "r=3", "c=1"))
        assert not server.status()["a"].is_current
        await client.expect("LDS +l")
        await client.expect("RDS +r")
        await client.expect("CDS -bad")
        with anyio.fail_after(DEADLINE_S):
            assert (await server.settled("a")).is_current


async def test_a_cluster_of_which_a_change_was_refused_is_removed_as_any_other(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("c=2", "l=1", "r=1", "c=1"))
        await client.expect("CDS +c", refuse="c: wrong")
        await client.expect("EDS +c")
        server.publish("a", of("d=1", "l=2", "r=2", "d=1"))
        await client.expect("CDS +d")
        await client.ask("EDS", "d")
        await client.expect("EDS +d")
        await client.expect("LDS +l")
        await client.expect("RDS +r")
        await client.expect("CDS -c")


async def test_refused_routes_keep_the_clusters_that_the_last_good_ones_use(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("d=1", "l=1", "r=2", "d=1"))
        await client.expect("CDS +d")
        await client.ask("EDS", "d")
        await client.expect("EDS +d")
        await client.expect("RDS +r", refuse="r: wrong")
        server.publish("a", of("d=1", "l=1", "r=3", "d=1"))
        await client.expect("RDS +r")  # no removal came between
        await client.expect("CDS -c")


async def test_what_was_refused_together_is_tried_again_together(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("c=2 x=1", "l=1", "r=1", "c=1"))
        await client.expect("CDS +c +x", refuse="x: wrong")
        await client.expect("EDS +c")
        server.publish("a", of("c=2 x=2", "l=1", "r=1", "c=1"))
        await client.expect("CDS +c +x")


async def test_a_cluster_that_changed_gets_its_endpoints_again(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("c=2", "l=1", "r=1", "c=1"))
        await client.expect("CDS +c")
        await client.expect("EDS +c")


async def test_endpoints_do_not_wait_for_the_answer_to_their_clusters(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("c=1 d=1", "l=2", "r=1", "c=1 d=1"))
        _, clusters = await client.receive()
        await client.ask("EDS", "d")
        await client.expect("EDS +d")
        await client.answer(clusters)
        await client.expect("LDS +l")


async def test_routes_are_sent_again_to_a_listener_that_was_refused_before(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("c=1", "l=2", "r=1", "c=1"))
        await client.expect("LDS +l", refuse="port in use")
        server.publish("a", of("c=1", "l=3", "r=1", "c=1"))
        await client.expect("LDS +l")
        await client.expect("RDS +r")


async def test_changes_while_an_answer_is_awaited_go_as_one(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        server.publish("a", of("c=1", "l=1", "r=1", "c=2"))
        _, response = await client.receive()
        for body in ("3", "4", "5"):
            server.publish("a", of("c=1", "l=1", "r=1", f"c={body}"))
        await client.answer(response)
        last = await client.expect("EDS +c")
        assert last.resources[0].resource.value == b"5"


async def test_a_client_that_comes_back_gets_only_what_it_lacks(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        await client.ask("EDS", "c")
        again = await client.expect("EDS +c")  # who asks is answered
        version = again.resources[0].version
    async with ads_server(folder / "ads") as server, connected(folder / "ads") as client:
        server.publish("a", of("c=1", "l=2", "r=1", "c=1"))
        await client.ask("CDS", "*", held={"c": "old", "gone": "1"})
        await client.expect("CDS +c")
        await client.ask("EDS", "c", held={"c": version})
        await client.ask("LDS", "*", held={"l": "old"})
        await client.expect("EDS +c")  # its cluster changed
        await client.expect("LDS +l")
        await client.ask("RDS", "r", held={"r": "old"})
        await client.expect("RDS +r")
        await client.expect("CDS -gone")


async def test_a_name_that_there_is_not_is_told_and_sent_when_there_is(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, client):
        await client.ask("RDS", "later")
        await client.expect("RDS -later")
        server.publish("a", of("c=1", "l=1", "r=1 later=1", "c=1"))
        await client.expect("RDS +later")


async def test_nodes_get_their_own_and_one_that_is_not_known_waits(folder: Path) -> None:
    async with envoy_with(folder, FIRST) as (server, _), connected(folder / "ads") as other:
        await other.ask("CDS", node="b")
        server.publish("a", of("c=2", "l=1", "r=1", "c=1"))
        server.publish("b", of("b=1"))
        await other.expect("CDS +b")


async def test_an_empty_configuration_is_answered(folder: Path) -> None:
    async with ads_server(folder / "ads") as server, connected(folder / "ads") as client:
        server.publish("a", of())
        await client.ask("CDS")
        await client.expect("CDS")
        await client.ask("LDS")
        await client.expect("LDS")


async def test_an_envoy_refuses_what_is_wrong_and_goes_on_with_what_was_right(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        good = canary(backends, envoy.port).configuration()
        await envoy.apply(good)
        await envoy.ready()
        (name,) = good.routes
        wrong = {
            **good.routes[name],
            "virtualHosts": [{"name": "a", "domains": ["*"]}, {"name": "b", "domains": ["*"]}],
        }
        broken = {**resources(good, "::", envoy.port)}
        broken[ROUTE_TYPE] = {name: encode(ROUTE_TYPE, wrong)}
        server.publish(envoy.spec.node_id, broken)
        with anyio.fail_after(DEADLINE_S):
            (refusal,) = (await server.settled(envoy.spec.node_id)).refusals
        assert refusal.type_url == ROUTE_TYPE
        assert "domain" in refusal.message
        answer = await anyio.to_thread.run_sync(lambda: ask(at("127.0.1.1"), envoy.port))
        assert answer.status == 200
        assert (await envoy.apply(good)).is_current


async def test_an_envoy_that_lost_its_server_is_found_current_by_the_next(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(ads_server(folder / "ads"))
        async with waypoint(first, folder) as envoy:
            configuration = canary(backends, envoy.port).configuration()
            await envoy.apply(configuration)
            await envoy.ready()
            await stack.aclose()
            answer = await anyio.to_thread.run_sync(lambda: ask(at("127.0.1.1"), envoy.port))
            assert answer.status == 200
            async with ads_server(folder / "ads") as envoy.server:
                with capture_logs() as logs:
                    assert (await envoy.apply(configuration)).is_current
                assert not [log for log in logs if log["event"] == "configuration_sent" and log["changed"]]


async def test_an_envoy_that_runs_takes_a_service_more_and_a_service_less_at_once(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        assert (await envoy.apply(World().configuration())).is_current
        await envoy.ready()
        world = canary(backends, envoy.port)
        began = time.monotonic()
        assert (await envoy.apply(world.configuration())).is_current
        assert await status_of(at("127.0.1.1"), envoy.port) == 200
        world.routes.clear()
        assert (await envoy.apply(world.configuration())).is_current
        assert await status_of(at("127.0.1.1"), envoy.port) == 200
        world.known["shop/web.shop.svc.cluster.local"] = world.users.pop()
        assert (await envoy.apply(world.configuration())).is_current
        assert time.monotonic() - began < 5  # Envoy gives up a resource that it misses after 15 s


async def status_of(address: str, port: int) -> int:
    return (await anyio.to_thread.run_sync(lambda: ask(address, port))).status
