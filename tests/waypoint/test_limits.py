"""The limit of requests that a Service's annotation says, through a real Envoy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import anyio.to_thread
import pytest

from services.waypoint_mgr.limits import RATE_LIMIT

from .backends import Backend, ask
from .world import World, ads_server, at, kubernetes_service, mesh_service, named, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

LIMITED, FREE = "127.0.12.1", "127.0.12.2"


def world(backends: dict[str, Backend], port: int, limit: str) -> World:
    made = World()
    for name, vip, said in (("limited", LIMITED, {RATE_LIMIT: limit}), ("free", FREE, {})):
        made.add_user(
            mesh_service("shop", name, {port: [backends["own"].endpoint]}, [vip]),
            kubernetes_service("shop", name, {"port": port, "name": "http"}, annotations=said),
        )
    return made


async def test_what_is_more_is_refused_and_others_are_left_alone(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        made = world(backends, envoy.port, "5/h").configuration()
        assert not (await envoy.apply(made)).refusals
        await envoy.ready()

        async def statuses(vip: str) -> Counter[int]:
            found = [await anyio.to_thread.run_sync(ask, at(vip), envoy.port) for _ in range(12)]
            return Counter(answer.status for answer in found)

        assert await statuses(LIMITED) == {200: 5, 429: 7}
        assert await statuses(FREE) == {200: 12}


@pytest.mark.parametrize("limit", ["5", "0/s", "5/d", "-1/s", "five/s", "1.5/s", "5/s "])
def test_what_is_no_limit_is_told_and_limits_nothing(backends: dict[str, Backend], limit: str) -> None:
    made = world(backends, 80, limit).configuration()
    (told,) = made.misread
    assert told.startswith(f"{named('shop', 'limited')}: {RATE_LIMIT} is {limit!r}")
    assert "local_ratelimit" not in str(made.chains)
