"""Who a client is, told to endpoints by name through a real Envoy."""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread
import pytest

from pykmesh.contracts.handoff import ID_BYTES, NOBODY, Identity
from services.waypoint_mgr import principals
from services.waypoint_mgr.principals import FORWARD, is_forwarded, misread

from .backends import Backend, ask
from .test_instance import canary
from .world import ads_server, at, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

HEADER = "x-forwarded-client-cert"
WEB = Identity(bytes([1, 2, 3, 4, 5]), bytes([6, 7, 8, 9, 10]))
SPARSE = Identity(bytes([0, 0, 0, 0, 1]), bytes(ID_BYTES - 1) + b"\1")
"""Whose address is written with a gap."""
GAP_AT_THE_END = Identity(bytes([0x10, 0, 0, 0, 0]), bytes(ID_BYTES))
NEW = Identity(bytes([9] * ID_BYTES), bytes([8] * ID_BYTES))


def ids(client: Identity) -> bytes:
    return client.namespace + client.account


NAMES = {
    "cluster.local/ns/shop/sa/web": ids(WEB),
    "far.example/ns/a/sa/b": ids(SPARSE),
    "cluster.local/ns/end/sa/x": ids(GAP_AT_THE_END),
}


async def test_endpoints_are_told_who_asks_and_nobody_can_say_it_himself(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        world = canary(backends, envoy.port)
        world.names = NAMES
        status = await envoy.apply(world.configuration())
        assert not status.refusals
        await envoy.ready()
        said: dict[str, str] = {}

        async def told(client: Identity) -> str | None:
            answer = await anyio.to_thread.run_sync(
                ask, at("127.0.1.1", client), envoy.port, "/", "GET", said
            )
            assert answer.status == 200
            found: str | None = {key.lower(): v for key, v in answer.told["headers"].items()}.get(HEADER)
            return found

        for claimed in ({}, {HEADER: "URI=spiffe://cluster.local/ns/kube-system/sa/admin"}):
            said = claimed
            assert await told(WEB) == "URI=spiffe://cluster.local/ns/shop/sa/web"
            assert await told(SPARSE) == "URI=spiffe://far.example/ns/a/sa/b"
            assert await told(GAP_AT_THE_END) == "URI=spiffe://cluster.local/ns/end/sa/x"
            assert await told(NEW) is None, "its name is not known"
            assert await told(NOBODY) is None

        world.names = {**NAMES, "cluster.local/ns/new/sa/new": ids(NEW)}
        status = await envoy.apply(world.configuration())
        assert not status.refusals
        assert await told(NEW) == "URI=spiffe://cluster.local/ns/new/sa/new"

        world.names = None
        status = await envoy.apply(world.configuration())
        assert not status.refusals
        assert await told(WEB) is None, "what a client claims goes no further without it either"


async def test_an_account_that_comes_changes_no_listener(backends: dict[str, Backend]) -> None:
    world = canary(backends, 80)
    world.names = NAMES
    before = world.configuration()
    world.names = {**NAMES, "cluster.local/ns/new/sa/new": ids(NEW)}
    after = world.configuration()
    assert before.chains == after.chains
    assert before.extensions != after.extensions


def test_as_many_names_as_a_large_mesh_has_and_none_that_is_code() -> None:
    many = {f"cluster.local/ns/n{i}/sa/a": i.to_bytes(2 * ID_BYTES, "big") for i in range(20_000)}
    bad = {"x]] os.exit() --[[/ns/a/sa/b": bytes(10), "a b/ns/c/sa/d": bytes(10), "": bytes(10)}
    source = principals.script(many | bad)["typedConfig"]["defaultSourceCode"]["inlineString"]
    assert source.count("/sa/a") == 20_000
    assert "exit" not in source
    assert "/sa/d" not in source


@pytest.mark.parametrize(("said", "wanted"), [("true", True), ("false", False), ("", False), ("yes", False)])
def test_what_the_annotation_says(said: str, wanted: bool) -> None:
    annotations = {FORWARD: said} if said else {}
    assert is_forwarded(annotations) is wanted
    assert bool(misread(annotations)) is (said == "yes")
