"""Istio's VirtualService, case by case: objects, a request through a real Envoy, the answer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
import pytest
import yaml

from pykmesh.manifests.objects import VirtualService, from_plain
from services.waypoint_mgr.attachments import Condition
from services.waypoint_mgr.source import Virtual

from .backends import Answer, Backend, ask
from .world import (
    DOMAIN,
    World,
    ads_server,
    at,
    http_route,
    kubernetes_service,
    mesh_service,
    refusal_aside,
    tcp_route,
    waypoint,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

CASES: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent.parent / "data/waypoint/virtual_services.yaml").read_text()
)
NAMES = [case["case"] for case in CASES]


def virtual(namespace: str, spec: dict[str, Any], name: str = "web") -> Virtual:
    plain = {"metadata": {"name": name, "namespace": namespace}, "spec": spec}
    made = from_plain(plain, VirtualService)
    assert isinstance(made, VirtualService)
    return Virtual.of(made, DOMAIN)


def address(case: int) -> str:
    return f"127.0.10.{case + 1}"


class Served:
    """All cases at once: each in a namespace of its own, its service web at an address of its own."""

    def __init__(self, port: int, told: tuple[Condition, ...]) -> None:
        self.port, self.told = port, told

    def ask(self, case: int, request: dict[str, Any]) -> Answer:
        headers = dict(request.get("headers", {}))
        if "host" in request:
            headers["Host"] = request["host"]
        path, method = request.get("path", "/"), request.get("method", "GET")
        return ask(at(address(case)), self.port, path, method, headers)


@pytest.fixture(scope="module")
async def served(
    tmp_path_factory: pytest.TempPathFactory, backends: dict[str, Backend]
) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("vs")
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        world = World()
        for case, said in enumerate(CASES):
            here = f"case-{case}"
            own = mesh_service(here, "web", {envoy.port: [backends["own"].endpoint]}, [address(case)])
            world.add_user(own, kubernetes_service(here, "web", {"port": envoy.port, "name": "http"}))
            for name in ("v1", "v2", "mirror"):
                world.add_backend(mesh_service(here, name, {80: [backends[name].endpoint]}))
            spec = said.get("spec") or {"hosts": ["web"], "http": said["http"]}
            spec = yaml.safe_load(yaml.safe_dump(spec).replace("HERE", here))
            if "*" in spec["hosts"][0]:
                spec["exportTo"] = ["."]
            world.virtuals.append(virtual(here, spec))
            world.virtuals += [virtual(here, one, name) for name, one in said.get("delegates", {}).items()]
            world.routes += [http_route(here, f"r-{case}", route) for route in said.get("routes", ())]
        made = world.configuration()
        assert not (await envoy.apply(made)).refusals
        assert await refusal_aside(made) == ""
        await envoy.ready()
        yield Served(envoy.port, made.virtuals)


@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
async def test_a_request_goes_where_the_virtual_service_says(
    served: Served, backends: dict[str, Backend], case: int
) -> None:
    said = CASES[case]
    for request in said["requests"]:
        began = time.monotonic()
        answer = await anyio.to_thread.run_sync(served.ask, case, request)
        assert time.monotonic() - began >= request.get("at_least_s", 0)
        check(answer, request["expect"], served.port)
    if "mirrored" in said:
        with anyio.fail_after(10):
            while (await anyio.to_thread.run_sync(backends["mirror"].seen.get))["path"] != said["mirrored"]:
                pass
    conditions = [one for one in served.told if one.of.namespace == f"case-{case}"]
    for kind, message in said.get("told", {}).items():
        found = [one.message for one in conditions if f"{one.type}={one.status}" == kind]
        assert found, conditions
        assert any(message.replace("HERE", f"case-{case}") in one for one in found), found
    if "told" not in said:
        assert all(one.status and one.type != "PartiallyInvalid" for one in conditions), conditions


def check(answer: Answer, expect: dict[str, Any], port: int) -> None:
    assert answer.status == expect.get("status", 200), (answer.headers, answer.told)
    for name in ("backend", "path"):
        if name in expect:
            assert answer.told[name] == expect[name]
    for name, value in expect.get("headers", {}).items():
        assert answer.told["headers"].get(name) == value
    for name, value in expect.get("response", {}).items():
        wanted = value.replace("PORT", str(port)) if value else value
        assert answer.headers.get(name) == wanted
    if "body" in expect:
        assert answer.body == expect["body"].encode()


TCP_ADDRESS = "127.0.8.2"


def tcp(backend: str, weight: int = 1, **match: Any) -> dict[str, Any]:
    found = {"route": [{"destination": {"host": backend}, "weight": weight}]}
    return found | ({"match": [match]} if match else {})


async def who_answers(
    folder: Path,
    backends: dict[str, Backend],
    *routes: dict[str, Any],
    times: int = 10,
    with_route: bool = False,
) -> tuple[Counter[str], list[str]]:
    """Of so many connections, and what is told but that all is well."""
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        world = World()
        world.add_user(
            mesh_service("shop", "web", {envoy.port: [backends["own"].endpoint]}, [TCP_ADDRESS]),
            kubernetes_service("shop", "web", {"port": envoy.port, "name": "tcp"}),
        )
        for name in ("v1", "v2"):
            world.add_backend(mesh_service("shop", name, {80: [backends[name].endpoint]}))
        world.virtuals.append(virtual("shop", {"hosts": ["web"], "tcp": list(routes)}))
        if with_route:
            world.routes = [tcp_route("shop", "own", {"name": "v2", "port": 80})]
        made = world.configuration()
        assert not (await envoy.apply(made)).refusals
        await envoy.ready()

        def who() -> str:
            try:
                return str(ask(at(TCP_ADDRESS), envoy.port).told["backend"])
            except ConnectionError:
                return ""

        found = Counter([await anyio.to_thread.run_sync(who) for _ in range(times)])
        wrong = [one for one in made.virtuals if not one.status or one.type == "PartiallyInvalid"]
        return found, [one.message for one in wrong]


async def test_connections_go_where_the_virtual_service_says(
    folder: Path, backends: dict[str, Backend]
) -> None:
    split = [{"destination": {"host": name}, "weight": weight} for name, weight in (("v1", 3), ("v2", 1))]
    found, told = await who_answers(folder, backends, {"route": split}, times=200)
    assert found.keys() == {"v1", "v2"}
    assert 110 < found["v1"] < 190
    assert told == []


@pytest.mark.parametrize(
    ("routes", "who", "told"),
    [
        ([tcp("v1", port=1), tcp("v2")], "v2", ""),
        ([tcp("v1", port=1)], "own", ""),
        ([tcp("v1", gateways=["edge"]), tcp("v2", gateways=["mesh"])], "v2", ""),
        (
            [tcp("v1", sourceLabels={"a": "b"}), tcp("v2")],
            "v2",
            "tcp[0]: match.sourceLabels (it never matches)",
        ),
        ([tcp("v1", weight=0)], "v1", ""),
        ([tcp("nobody")], "", "tcp[0]: there is no host nobody.shop.svc.cluster.local with port"),
    ],
    ids=["another port", "nothing matches", "another gateway", "labels", "weightless and alone", "nobody"],
)
async def test_of_connections_the_first_match_counts(
    folder: Path, backends: dict[str, Backend], routes: list[dict[str, Any]], who: str, told: str
) -> None:
    found, said = await who_answers(folder, backends, *routes, times=3)
    assert found == {who: 3}
    assert told in "".join(said)
    assert bool(told) == bool(said)


async def test_tcp_routes_go_before(folder: Path, backends: dict[str, Backend]) -> None:
    found, told = await who_answers(folder, backends, tcp("v1"), times=3, with_route=True)
    assert found == {"v2": 3}
    assert "has TCPRoutes, which go before" in told[0]


@pytest.mark.parametrize(
    ("route", "why"),
    [
        ({}, "route"),
        ({"route": []}, "route"),
        ({"route": [{"destination": {"host": "a"}}, {"destination": {"host": "b"}}]}, "weights"),
        (
            {"route": [{"destination": {"host": "a"}, "headers": {"request": {"remove": ["b"]}}}]},
            "no headers",
        ),
        ({"match": [{"port": 0}], "route": [{"destination": {"host": "a"}}]}, "port"),
    ],
)
def test_a_route_of_connections_that_is_wrong_is_refused(route: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        virtual("shop", {"hosts": ["web"], "tcp": [route]})


@pytest.mark.parametrize(
    ("http", "why"),
    [
        ({}, "one of route"),
        ({"redirect": {"uri": "/"}, "route": [{"destination": {"host": "v1"}}]}, "one of route"),
        ({"route": [{"destination": {}}]}, "host"),
        ({"match": [{"uri": {}}], "directResponse": {"status": 200}}, "uri needs"),
        ({"match": [{"uri": {"exact": "/", "prefix": "/"}}], "directResponse": {"status": 200}}, "only one"),
        ({"redirect": {"redirectCode": 200}}, "redirectCode"),
        ({"directResponse": {"status": 99}}, "status"),
        ({"timeout": "soon", "directResponse": {"status": 200}}, "timeout"),
        ({"timeout": "87000000h", "directResponse": {"status": 200}}, "timeout"),
        ({"retries": {"backoff": "0s"}, "directResponse": {"status": 200}}, "backoff"),
        ({"fault": {"delay": {"fixedDelay": "0s"}}, "directResponse": {"status": 200}}, "fixedDelay"),
        ({"redirect": {"uri": "/a\nb"}}, "uri"),
        ({"headers": {"request": {"set": {"a": "b\0"}}}, "directResponse": {"status": 200}}, "set"),
        ({"fault": {"abort": {"percentage": {"value": 101}}}, "directResponse": {"status": 200}}, "value"),
        ({"match": [{"headers": {"a b": {}}}], "directResponse": {"status": 200}}, "headers"),
        ({"route": [{"destination": {"host": "a"}}, {"destination": {"host": "b"}}]}, "weights"),
    ],
)
def test_a_spec_that_is_wrong_is_refused(http: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        virtual("shop", {"hosts": ["web"], "http": [http]})
