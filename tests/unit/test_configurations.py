"""What the Envoys of a waypoint are told while some of its objects are such as none of them takes."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from pykmesh.contracts.messages import VERSION
from pykmesh.contracts.settings import WaypointMgrSettings
from pykmesh.contracts.waypoints import Endpoint, MeshService, ServicePort, WaypointsReply
from pykmesh.manifests.parse import parse
from services.waypoint_mgr import configurations
from services.waypoint_mgr.ads import AdsServer, NodeStatus, Refusal
from services.waypoint_mgr.configurations import Configurations
from services.waypoint_mgr.fleet import Fleet
from services.waypoint_mgr.keys import Keys
from services.waypoint_mgr.root_files import RootFiles
from services.waypoint_mgr.source import Objects

pytestmark = pytest.mark.anyio
DOMAIN = "cluster.local"
WAYPOINT = f"shop/wp.shop.svc.{DOMAIN}"
GATEWAY = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop}
spec:
  gatewayClassName: pykmesh-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}}]
"""
ROUTE = """
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  parentRefs: [{{group: "", kind: Service, name: web}}]
  rules: [{{matches: [{{path: {{value: /{path}}}}}], backendRefs: [{{name: web, port: 80}}]}}]
"""
SERVICE = """
---
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: {namespace}
  labels: {{istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: shop}}
spec: {{clusterIP: {ip}, ports: [{{name: http, port: 80}}]}}
"""
ADDRESSES = {"shop": "10.96.0.1", "guest": "10.96.0.2"}


class Envoys:
    """One, which takes nothing in which one of some words stands: as it serves, and when it is asked."""

    def __init__(self, *poison: str) -> None:
        self.poison = set(poison)
        self.published: Mapping[str, Mapping[str, bytes]] = {}
        self.taken = b""
        self.asked = 0

    def publish(self, _: str, resources: Mapping[str, Mapping[str, bytes]]) -> None:
        self.published = resources
        if not self._why(self._text):
            self.taken = self._text

    @property
    def _text(self) -> bytes:
        return b"".join(body for named in self.published.values() for body in named.values())

    def _why(self, text: bytes) -> str:
        return " ".join(sorted(word for word in self.poison if word.encode() in text))

    def status(self) -> dict[str, NodeStatus]:
        why = self._why(self._text)
        refusals = (Refusal("type", why, time.time()),) if why else ()
        return {"wp~1": NodeStatus(True, bool(self.published) and not why, refusals)}

    async def refusal(self, config: Any) -> str:
        self.asked += 1
        await anyio.sleep(0.001)
        return self._why(json.dumps(config).encode())

    def forget(self, _: str) -> None: ...
    def retry(self, _: str) -> None: ...


class World:
    def __init__(self, directory: Path, envoys: Envoys) -> None:
        self.envoys = envoys
        self.errors: list[str] = []
        members = SimpleNamespace(
            members={"wp~1": SimpleNamespace(name="wp~1", waypoint=WAYPOINT, port=1)}, address="::"
        )
        self.made = Configurations(
            cast(
                "WaypointMgrSettings",
                SimpleNamespace(envoys_dir=directory, cluster_domain=DOMAIN, otlp_endpoint=""),
            ),
            cast("AdsServer", envoys),
            cast("Fleet", members),
            cast("Keys", SimpleNamespace(found={}, errors={})),
            cast("RootFiles", SimpleNamespace(roots=None)),
            lambda: None,
            lambda event, **_: self.errors.append(event),
        )
        services = [
            MeshService(
                f"{ns}/web.{ns}.svc.{DOMAIN}", [ip], [ServicePort(80, [Endpoint("10.0.0.1", 80)])], [ip]
            )
            for ns, ip in ADDRESSES.items()
        ]
        self._mesh = WaypointsReply(VERSION, True, {WAYPOINT: [each.name for each in services]}, services)
        self.routes: dict[tuple[str, str], str] = {}

    async def until(self, holds: Callable[[], bool], deadline_s: float = 20.0) -> None:
        with anyio.fail_after(deadline_s):
            while not holds():
                self.follow()
                await anyio.sleep(0.005)

    def follow(self) -> None:
        text = GATEWAY + "".join(SERVICE.format(namespace=ns, ip=ip) for ns, ip in ADDRESSES.items())
        text += "".join(
            ROUTE.format(namespace=ns, name=name, path=path) for (ns, name), path in self.routes.items()
        )
        if text != getattr(self, "_text", None):
            parsed = parse(text.encode(), "all.yaml")
            assert not parsed.errors
            self._text, self._objects = text, Objects.of((each.object for each in parsed.objects), DOMAIN)
        self.made.follow(self._objects, self._mesh)

    def serves(self, *words: str) -> bool:
        return all(word.encode() in self.envoys.taken for word in words)

    def told(self, name: str) -> str:
        said = self.made.found[WAYPOINT].conditions if WAYPOINT in self.made.found else ()
        return next((each.message for each in said if each.of.name == name and not each.status), "")


@asynccontextmanager
async def running(directory: Path, monkeypatch: pytest.MonkeyPatch, *poison: str) -> AsyncIterator[World]:
    envoys = Envoys(*poison)
    monkeypatch.setattr(configurations, "refusal", envoys.refusal)
    world = World(directory, envoys)
    async with anyio.create_task_group() as tasks:
        await tasks.start(world.made.run)
        yield world
        tasks.cancel_scope.cancel()


async def test_others_go_on_and_who_is_to_blame_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch, "poison") as world:
        world.routes = {("shop", "a"): "first", ("guest", "b"): "poison", ("guest", "c"): "third"}
        await world.until(lambda: world.serves("first", "third"))
        await world.until(lambda: world.told("b") == "no Envoy takes it: poison")
        assert world.made.reduced == {}
        world.routes["shop", "d"] = "fourth"
        await world.until(lambda: world.serves("fourth"))
        asked = world.envoys.asked
        world.routes["shop", "e"] = "fifth"
        await world.until(lambda: world.serves("fifth"))
        assert world.envoys.asked == asked, "who is to blame is known"
        world.routes["guest", "b"] = "second"
        await world.until(lambda: world.serves("second"))
        assert world.told("b") == ""


async def test_what_was_taken_counts_while_it_is_such_as_none_takes_also_for_who_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for again in (False, True):
        async with running(tmp_path, monkeypatch, "poison") as world:
            if not again:
                world.routes = {("shop", "a"): "first", ("guest", "b"): "second"}
                await world.until(lambda: world.serves("first", "second"))
                await world.until(lambda: world.made._good.of(WAYPOINT).keys() != set())
            world.routes = {("shop", "a"): "first", ("guest", "b"): "poison"}
            await world.until(lambda: bool(world.told("b")) and world.serves("first"))
            await world.until(lambda: world.serves("second"))
            await world.made.keep_good([WAYPOINT])


async def test_one_who_goes_on_writing_what_none_takes_keeps_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch, "poison") as world:
        world.routes["shop", "a"] = "first"
        for number in range(10):
            world.routes["guest", f"b{number}"] = "poison"
            world.routes["shop", "a"] = f"turn{number}"
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                world.follow()
                await anyio.sleep(0.005)
        assert b"turn" in world.envoys.taken
        await world.until(lambda: world.serves("turn9"))


async def test_who_is_taken_after_all_is_acquitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "ACQUIT_S", 0.2)
    async with running(tmp_path, monkeypatch, "poison") as world:
        world.routes = {("shop", "a"): "first", ("guest", "b"): "poison"}
        await world.until(lambda: bool(world.told("b")))
        world.envoys.poison.clear()
        await world.until(lambda: world.serves("poison"))
        assert world.told("b") == ""


async def test_where_nobody_is_to_blame_it_gets_less_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What every configuration has."""
    async with running(tmp_path, monkeypatch, "web_shop") as world:
        world.routes = {("shop", "a"): "first"}
        await world.until(lambda: WAYPOINT in world.made.reduced)
        assert world.errors.count("configuration_reduced") == 1
        world.envoys.poison.clear()
        world.routes["shop", "b"] = "second"
        await world.until(lambda: world.serves("first", "second"))
        assert world.made.reduced == {}


async def test_what_makes_an_exception_is_to_blame_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = configurations.translate

    def translate(waypoint: Any, users: Any, known: Any, services: Any, wanted: Any, *rest: Any) -> Any:
        if any("poison" in str(route.spec) for route in wanted.routes):
            raise OverflowError("too much")
        return real(waypoint, users, known, services, wanted, *rest)

    monkeypatch.setattr(configurations, "translate", translate)
    async with running(tmp_path, monkeypatch) as world:
        world.routes = {("shop", "a"): "first", ("guest", "b"): "poison", ("guest", "c"): "third"}
        await world.until(lambda: world.serves("first", "third"))
        await world.until(lambda: "OverflowError: too much" in world.told("b"))
