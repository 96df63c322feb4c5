"""An instance outlives who started it, is adopted, drains, and its end is noticed."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from .backends import Backend, ask
from .world import World, ads_server, http_route, kubernetes_service, mesh_service, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]


def canary(backends: dict[str, Backend], port: int) -> World:
    world = World()
    world.add_user(
        mesh_service("shop", "web", {port: [backends["own"].endpoint]}, ["127.0.1.1"]),
        kubernetes_service("shop", "web", {"port": port, "name": "http"}),
    )
    for name in ("v1", "v2"):
        world.add_backend(mesh_service("shop", name, {80: [backends[name].endpoint]}))
    rules = [
        {
            "matches": [{"headers": [{"name": "x-version", "value": "v2"}]}],
            "backendRefs": [{"name": "v2", "port": 80}],
        },
        {"backendRefs": [{"name": "v1", "port": 80, "weight": 9}, {"name": "v2", "port": 80, "weight": 1}]},
    ]
    world.routes.append(http_route("shop", "canary", {"rules": rules}))
    return world


async def test_a_header_and_weights_choose_the_backend(folder: Path, backends: dict[str, Backend]) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        status = await envoy.apply(canary(backends, envoy.port).configuration())
        assert not status.refusals
        await envoy.ready()

        def told(**headers: str) -> str:
            answer = ask("127.0.1.1", envoy.port, headers=headers)
            return str(answer.told["backend"])

        assert await anyio.to_thread.run_sync(lambda: told(**{"x-version": "v2"})) == "v2"
        seen = await anyio.to_thread.run_sync(lambda: [told() for _ in range(100)])
        assert set(seen) == {"v1", "v2"}
        assert seen.count("v1") > seen.count("v2")
