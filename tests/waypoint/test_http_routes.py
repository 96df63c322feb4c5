"""Gateway API's HTTPRoute, case by case: objects, a request through a real Envoy, the answer."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
import yaml

from pykmesh.contracts.waypoints import Endpoint
from pykmesh.manifests.objects import ObjectRef
from services.waypoint_mgr.routes import Configuration

from .backends import DEADLINE_S, Answer, Backend, ask
from .world import (
    TO_WEB,
    Waypoint,
    World,
    ads_server,
    at,
    gateway,
    http_route,
    kubernetes_service,
    mesh_service,
    refusal_aside,
    waypoint,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

CASES: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent.parent / "data/waypoint/http_routes.yaml").read_text()
)


class Routed:
    """All cases at once: each in a namespace of its own, its service web at an address of its own."""

    def __init__(self, envoy: Waypoint, configuration: Configuration) -> None:
        self.port = envoy.port
        self.conditions = configuration.conditions

    def ask(self, case: int, request: dict[str, Any]) -> Answer:
        headers = dict(request.get("headers", {}))
        if "host" in request:
            headers["Host"] = request["host"].replace("PORT", str(self.port))
        told, path = at(address(case)), request.get("path", "/")
        return ask(told, self.port, path, request.get("method", "GET"), headers)


def address(case: int) -> str:
    return f"127.0.2.{case + 1}"


def namespace(case: int) -> str:
    return f"case-{case}"


@contextmanager
def refusing() -> Iterator[Endpoint]:
    """An address that nobody listens at, and nobody else can."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield Endpoint("127.0.0.1", sock.getsockname()[1])


def add_case(
    world: World, index: int, case: dict[str, Any], port: int, endpoints: dict[str, Endpoint]
) -> None:
    here = namespace(index)
    own = [endpoints[name] for name in case.get("web_endpoints", ["own"])] if case.get("own", True) else []
    world.add_user(
        mesh_service(here, "web", {port: own}, [address(index)]),
        kubernetes_service(here, "web", {"port": port, "name": "http", **case.get("port", {})}),
    )
    for name in ("own", "v1", "v2", "mirror"):
        world.add_backend(mesh_service(here, name, {80: [endpoints[name]]}))
    world.add_backend(mesh_service(here, "none", {80: []}))
    for number, said in enumerate(case.get("routes", [])):
        spec = dict(said)
        name, created = spec.pop("name", f"route-{number}"), spec.pop("created", "")
        parents = [
            {key: here if value == "HERE" else value for key, value in parent.items()}
            for parent in spec.pop("parentRefs", [TO_WEB])
        ]
        place = spec.pop("namespace", here)
        world.routes.append(http_route(place, name, {"parentRefs": parents, **spec}, created))


@pytest.fixture(scope="module")
async def routed(
    one_event_loop: None, tmp_path_factory: pytest.TempPathFactory, backends: dict[str, Backend]
) -> AsyncIterator[Routed]:
    folder = tmp_path_factory.mktemp("w")
    world = World()
    world.gateway = gateway(lets_in="All")
    with refusing() as nobody:
        endpoints = {name: backend.endpoint for name, backend in backends.items()} | {"refusing": nobody}
        world.add_backend(mesh_service("elsewhere", "v2", {80: [endpoints["v2"]]}))
        async with ads_server(folder / "ads") as server, waypoint(server, folder, "e") as envoy:
            for index, case in enumerate(CASES):
                add_case(world, index, case, envoy.port, endpoints)
            configuration = world.configuration()
            status = await envoy.apply(configuration)
            assert not status.refusals
            assert await refusal_aside(configuration) == ""
            await envoy.ready()
            yield Routed(envoy, configuration)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case["case"] for case in CASES])
async def test_a_request_is_answered_as_gateway_api_says(
    index: int, routed: Routed, backends: dict[str, Backend]
) -> None:
    case = CASES[index]
    for request in case["requests"]:
        await anyio.to_thread.run_sync(check, routed, index, request, backends)
    check_conditions(routed, index, case.get("conditions", {}))


def check(routed: Routed, case: int, request: dict[str, Any], backends: dict[str, Backend]) -> None:
    expect = request["expect"]
    if "shares" in expect:
        answers = [routed.ask(case, request) for _ in range(request["times"])]
        counted = Counter(answer.told.get("backend", str(answer.status)) for answer in answers)
        assert counted.keys() == expect["shares"].keys()
        for name, (least, most) in expect["shares"].items():
            assert least <= counted[name] <= most, counted
        return
    answer = routed.ask(case, request)
    assert answer.status == expect.get("status", 200), request
    for key in {"backend", "path"} & expect.keys():
        assert answer.told[key] == expect[key], request
    if "host" in expect:
        assert answer.told["headers"]["host"] == expect["host"]
    if "location" in expect:
        assert answer.headers["location"] == expect["location"].replace("PORT", str(routed.port))
    check_headers(answer.told.get("headers", {}), expect.get("headers", {}))
    check_headers(answer.headers, expect.get("response", {}))
    if "mirrored" in expect:
        while backends["mirror"].seen.get(timeout=DEADLINE_S)["path"] != request["path"]:
            pass


def check_headers(seen: dict[str, str], expected: dict[str, str | None]) -> None:
    for name, value in expected.items():
        assert (name in seen) if value == "ANY" else (seen.get(name) == value), seen


def check_conditions(routed: Routed, case: int, expected: dict[str, str]) -> None:
    """Without a word about them, all is well."""
    about_web = ObjectRef("Service", namespace(case), "web")
    said = [condition for condition in routed.conditions if condition.parent == about_web]
    by_text = {f"{one.type}={one.status} {one.reason}": one.message for one in said}
    for text, part in expected.items():
        assert part in by_text[text], by_text
    if not expected:
        assert by_text.keys() <= {"Accepted=True Accepted", "ResolvedRefs=True ResolvedRefs"}
