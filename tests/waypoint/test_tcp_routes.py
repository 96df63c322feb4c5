"""TCPRoutes through a real Envoy: to whom connections go, and what their authors are told."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
import pytest

from pykmesh.manifests.objects import TCPRoute, from_plain
from services.waypoint_mgr.routes import Configuration
from services.waypoint_mgr.source import Route

from .backends import Backend, ask
from .world import (
    TO_WEB,
    World,
    ads_server,
    at,
    http_route,
    kubernetes_service,
    mesh_service,
    tcp_route,
    waypoint,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

ADDRESS = "127.0.8.1"
V1, V2, NOBODY = ({"name": name, "port": 80} for name in ("v1", "v2", "nobody"))
GATEWAY = {"name": "waypoint", "group": "gateway.networking.k8s.io", "kind": "Gateway"}


def world(backends: dict[str, Backend], port: int, *routes: Route, name: str = "tcp") -> World:
    made = World()
    made.add_user(
        mesh_service("shop", "web", {port: [backends["own"].endpoint]}, [ADDRESS]),
        kubernetes_service("shop", "web", {"port": port, "name": name}),
    )
    for backend in ("v1", "v2"):
        made.add_backend(mesh_service("shop", backend, {80: [backends[backend].endpoint]}))
    made.routes = list(routes)
    return made


async def answers(
    folder: Path, backends: dict[str, Backend], *routes: Route, times: int = 20
) -> tuple[Counter[str], Configuration]:
    """Who answered so many connections; "" for those that were closed."""
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        made = world(backends, envoy.port, *routes).configuration()
        status = await envoy.apply(made)
        assert not status.refusals
        await envoy.ready()

        def who() -> str:
            try:
                return str(ask(at(ADDRESS), envoy.port).told["backend"])
            except ConnectionError:
                return ""

        return Counter([await anyio.to_thread.run_sync(who) for _ in range(times)]), made


async def test_connections_go_to_the_backends_by_their_weights(
    folder: Path, backends: dict[str, Backend]
) -> None:
    route = tcp_route("shop", "split", {**V1, "weight": 3}, {**V2, "weight": 1})
    found, made = await answers(folder, backends, route, times=200)
    assert found.keys() == {"v1", "v2"}
    assert 110 < found["v1"] < 190
    assert [(one.type, one.status) for one in made.conditions] == [("Accepted", True), ("ResolvedRefs", True)]


@pytest.mark.parametrize(
    ("backend", "resolved"), [(NOBODY, False), ({**V1, "weight": 0}, True)], ids=["missing", "weightless"]
)
async def test_what_is_for_nobody_is_closed(
    folder: Path, backends: dict[str, Backend], backend: dict[str, Any], resolved: bool
) -> None:
    found, made = await answers(folder, backends, tcp_route("shop", "lost", backend), times=3)
    assert found == {"": 3}
    assert {one.type: one.status for one in made.conditions}["ResolvedRefs"] == resolved


async def test_one_for_the_waypoint_is_for_services_without_their_own(
    folder: Path, backends: dict[str, Backend]
) -> None:
    of_all = tcp_route("shop", "all", V2, parentRefs=[GATEWAY])
    found, _ = await answers(folder, backends, of_all)
    assert found == {"v2": 20}
    found, _ = await answers(folder, backends, of_all, tcp_route("shop", "own", V1))
    assert found == {"v1": 20}


def test_a_port_that_carries_http_has_no_tcp_routes(backends: dict[str, Backend]) -> None:
    route = tcp_route("shop", "split", V1)
    by_name = world(backends, 80, route, name="http").configuration()
    by_route = world(
        backends, 80, route, http_route("shop", "http", {"parentRefs": [TO_WEB | {"port": 80}]})
    ).configuration()
    for made, why in ((by_name, "nothing but TCP"), (by_route, "port 80 goes by HTTPRoute")):
        (condition,) = (one for one in made.conditions if one.of.kind == "TCPRoute")
        assert (condition.type, condition.status) == ("Accepted", False)
        assert why in condition.message
    of_all = tcp_route("shop", "all", V2, parentRefs=[GATEWAY])
    routes = world(backends, 80, of_all, name="http").configuration().routes
    assert "v2" not in str(routes)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({}, "rules"),
        ({"rules": []}, "rules"),
        ({"rules": [{"backendRefs": [V1]}, {"backendRefs": [V2]}]}, "length <= 1"),
        ({"rules": [{"backendRefs": []}]}, "backendRefs"),
        ({"rules": [{"backendRefs": [{**V1, "filters": [{"type": "CORS", "cors": {}}]}]}]}, "no filters"),
    ],
)
def test_a_route_that_is_wrong_is_refused_by_the_field(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        from_plain({"metadata": {"name": "x"}, "spec": spec}, TCPRoute)
