"""What was right of routes and VirtualServices is kept as it was, whatever stands in it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from pykmesh.manifests.objects import GRPCRoute, HTTPRoute, TCPRoute, VirtualService
from pykmesh.manifests.parse import parse
from services.waypoint_mgr.last_good import LastGood
from services.waypoint_mgr.source import Route, Virtual
from tests.fuzz.shapes import drawn

WAYPOINT = "shop/waypoint"
DRAWN = 200


@pytest.mark.parametrize("kind", ["HTTPRoute", "GRPCRoute", "VirtualService"])
def test_whatever_is_read_is_there_for_who_comes_after(tmp_path: Path, kind: str) -> None:
    chance = Random(kind)
    said: list[Route | Virtual] = []
    for number in range(DRAWN):
        found = drawn(chance, kind, f"o{number}")
        assert isinstance(found, HTTPRoute | GRPCRoute | TCPRoute | VirtualService)
        said.append(
            Virtual.of(found, "cluster.local") if isinstance(found, VirtualService) else Route.of(found)
        )
    path = tmp_path / "last_good.json"
    good, by_ref = LastGood(path), {each.ref: each for each in said}
    good.note(WAYPOINT, by_ref)
    good.keep([WAYPOINT])
    assert LastGood(path).of(WAYPOINT) == by_ref


def test_keys_that_yaml_takes_for_something_else_are_texts(tmp_path: Path) -> None:
    manifest = b"""
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  rules: [{sessionPersistence: {cookieConfig: {on: x, 2: y}}}]
"""
    parsed = parse(manifest, "r.yaml")
    assert not parsed.errors
    route = parsed.objects[0].object
    assert isinstance(route, HTTPRoute)
    assert route.spec.rules[0].session_persistence == {"cookieConfig": {"true": "x", "2": "y"}}
    good = LastGood(tmp_path / "last_good.json")
    good.note(WAYPOINT, {Route.of(route).ref: Route.of(route)})
    good.keep([WAYPOINT])


@pytest.mark.parametrize("damaged", [b"", b"[" * 100_000, b'{"a": 1}', b"\xff"])
def test_a_file_that_is_damaged_is_as_none(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "last_good.json"
    path.write_bytes(damaged)
    assert LastGood(path).of(WAYPOINT) == {}
