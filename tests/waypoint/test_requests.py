"""Requests as Envoy counts them and as they are told on the bus."""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from pykmesh.contracts.requests import BOUNDS, RequestSeries
from services.waypoint_mgr.envoy import REQUESTS
from services.waypoint_mgr.requests import StatisticsError, read

from .backends import Backend, ask
from .test_instance import canary
from .test_policies import policy
from .world import DEADLINE_S, Waypoint, ads_server, at, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]


async def served(envoy: Waypoint, requests: int) -> dict[str, RequestSeries]:
    """By response code, once so many are counted."""
    with anyio.fail_after(DEADLINE_S):
        while True:
            found = read(await envoy.instance.statistics(f"^{REQUESTS}\\."))
            if sum(one.duration_ms.buckets[-1] for one in found) == requests:
                return {one.response_code: one for one in found}
            await anyio.sleep(0.05)


async def test_each_request_is_counted_with_who_asked_and_how_it_ended(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        world = canary(backends, envoy.port)
        rule = {"to": [{"operation": {"paths": ["/secret"]}}]}
        world.policies = [policy("shop", "no", {"action": "DENY", "rules": [rule]})]
        await envoy.apply(world.configuration())
        await envoy.ready()
        for path in ("/", "/?wait=0.3", "/secret"):
            await anyio.to_thread.run_sync(ask, at("127.0.1.1"), envoy.port, path)
        found = await served(envoy, 3)
    good, denied = found["200"], found["403"]
    assert (good.service, good.port) == ("shop/web.shop.svc.cluster.local", str(envoy.port))
    assert good.client == denied.client != ""
    assert (good.endpoint, denied.endpoint) == ("127.0.0.1", "")
    assert (good.response_flags, good.grpc_status) == ("", "")
    assert good.duration_ms.buckets[-1] == 2
    assert good.duration_ms.buckets[BOUNDS.index(250)] == 1
    assert 290 < good.duration_ms.total < 2000
    assert good.response_bytes.total > 100
    assert good.request_bytes.total == 0


@pytest.mark.parametrize(
    "text",
    [
        'envoy_requests_duration_bucket{le="1"} 1\n',
        "envoy_requests_duration_bucket{ 1\n",
        "# TYPE envoy_requests_duration histogram\n" + "".join(
            f'envoy_requests_duration_bucket{{client="",endpoint="",service="a/b",port="1",response_code="200",'
            f'response_flags="-",grpc_status="",le="{bound}"}} 1\n' for bound in (1, 2, "+Inf")
        ),
    ],
    ids=["no tags", "no text of Prometheus'", "other buckets"],
)  # fmt: skip
def test_what_is_no_count_of_requests_is_refused(text: str) -> None:
    with pytest.raises(StatisticsError, match="statistics of requests"):
        read(text)


def test_other_statistics_are_nothing_of_ours() -> None:
    assert read("# TYPE envoy_server_live gauge\nenvoy_server_live 1\n") == []
