"""Istio's VirtualService, case by case: objects, a request through a real Envoy, the answer."""

from __future__ import annotations

import time
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
from .world import DOMAIN, World, ads_server, at, http_route, kubernetes_service, mesh_service, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

CASES: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent.parent / "data/waypoint/virtual_services.yaml").read_text()
)
NAMES = [case["case"] for case in CASES]


def virtual(namespace: str, spec: dict[str, Any]) -> Virtual:
    plain = {"metadata": {"name": "web", "namespace": namespace}, "spec": spec}
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
            world.routes += [http_route(here, f"r-{case}", route) for route in said.get("routes", ())]
        made = world.configuration()
        assert not (await envoy.apply(made)).refusals
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
        assert message.replace("HERE", f"case-{case}") in found[0]
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
