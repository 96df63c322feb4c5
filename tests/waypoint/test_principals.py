"""Who a client is, told to endpoints by name through a real Envoy."""

from __future__ import annotations

import random
from pathlib import Path

import anyio.to_thread
import pytest

from pykmesh.contracts.handoff import ID_BYTES, NOBODY, Identity
from services.waypoint_mgr.principals import FORWARD, HEADER, is_forwarded, is_identity, misread, write

from .backends import Backend, ask
from .test_instance import canary
from .world import DEADLINE_S, ads_server, at, http_route, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

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
        world.names = folder / "principals"
        assert write(world.names, NAMES) == []
        status = await envoy.apply(world.configuration())
        assert not status.refusals
        await envoy.ready()
        said: dict[str, str] = {}

        async def told(client: Identity) -> list[str]:
            """All that the endpoint hears of it, under whatever name."""
            answer = await anyio.to_thread.run_sync(
                ask, at("127.0.1.1", client), envoy.port, "/", "GET", said
            )
            assert answer.status == 200
            headers = answer.told["headers"].items()
            return [value for name, value in headers if is_identity(name)]

        forged = "URI=spiffe://cluster.local/ns/kube-system/sa/admin"
        spellings = (HEADER, "X_Forwarded_Client_Cert", "x-forwarded_client-cert", "x_forwarded-client-cert")
        for claimed in ({}, *({name: forged} for name in spellings)):
            said = claimed
            assert await told(WEB) == ["URI=spiffe://cluster.local/ns/shop/sa/web"]
            assert await told(SPARSE) == ["URI=spiffe://far.example/ns/a/sa/b"]
            assert await told(GAP_AT_THE_END) == ["URI=spiffe://cluster.local/ns/end/sa/x"]
            assert await told(NEW) == [], "its name is not known"
            assert await told(NOBODY) == []

        write(world.names, {**NAMES, "cluster.local/ns/new/sa/new": ids(NEW)})
        with anyio.fail_after(DEADLINE_S):  # who was not known is looked up again after seconds
            while await told(NEW) != ["URI=spiffe://cluster.local/ns/new/sa/new"]:  # noqa: ASYNC110
                await anyio.sleep(0.1)

        world.names, said = None, {HEADER: forged}
        status = await envoy.apply(world.configuration())
        assert not status.refusals
        assert await told(WEB) == [], "what a client claims goes no further without it either"


async def test_of_many_names_each_is_found(folder: Path, backends: dict[str, Backend]) -> None:
    """The first, the last, those between, and none for who is between those that are there."""
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        world = canary(backends, envoy.port)
        world.names = folder / "principals"
        step, count = (1 << 80) // 20_000, 20_000
        all_ids = [(number * step).to_bytes(2 * ID_BYTES, "big") for number in range(count)]
        assert (
            write(world.names, {f"td/ns/n/sa/{'x' * (n % 9)}{n}": ids for n, ids in enumerate(all_ids)}) == []
        )
        await envoy.apply(world.configuration())
        await envoy.ready()
        chance = random.Random(1)
        for number in (0, 1, count - 1, *chance.sample(range(count), 20)):
            for off, name in ((0, f"URI=spiffe://td/ns/n/sa/{'x' * (number % 9)}{number}"), (1, None)):
                found = (number * step + off).to_bytes(2 * ID_BYTES, "big")
                client = Identity(found[:ID_BYTES], found[ID_BYTES:])
                answer = await anyio.to_thread.run_sync(ask, at("127.0.1.1", client), envoy.port, "/")
                assert answer.told["headers"].get(HEADER) == name


async def test_no_route_says_who_asks(folder: Path, backends: dict[str, Backend]) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        world = canary(backends, envoy.port)
        world.names = folder / "principals"
        write(world.names, NAMES)
        forged = {"name": "X-Forwarded-Client-Cert", "value": "URI=spiffe://a/ns/b/sa/c"}
        for modifier in ({"set": [forged]}, {"add": [forged]}, {"remove": [forged["name"]]}):
            changed = {"type": "RequestHeaderModifier", "requestHeaderModifier": modifier}
            rule = {"filters": [changed], "backendRefs": [{"name": "v1", "port": 80}]}
            world.routes = [http_route("shop", "web", {"rules": [rule]})]
            made = world.configuration()
            assert any(
                "X-Forwarded-Client-Cert, which says who asks" in one.message for one in made.conditions
            )
            assert not (await envoy.apply(made)).refusals
            await envoy.ready()
            answer = await anyio.to_thread.run_sync(ask, at("127.0.1.1", WEB), envoy.port, "/")
            assert answer.told["headers"][HEADER] == "URI=spiffe://cluster.local/ns/shop/sa/web"


def test_what_is_no_name_or_has_the_ids_of_another_is_nobodys(tmp_path: Path) -> None:
    path, odd = (
        tmp_path / "principals",
        {"trust:8443/ns/a/sa/b": bytes(10), "a\nb/ns/c/sa/d": bytes([1] * 10)},
    )
    twins = {"cluster.local/ns/a/sa/one": ids(NEW), "cluster.local/ns/a/sa/two": ids(NEW)}
    assert write(path, {**NAMES, **odd, **twins}) == sorted([*odd, *twins])
    assert sorted(line.split()[1] for line in path.read_text().splitlines()) == sorted(NAMES)
    for bad in (b"\xff\xfe", path.read_bytes().replace(b"\n", b"\r\n")):
        path.write_bytes(bad)
        write(path, NAMES)
        assert path.read_bytes().isascii()
        assert b"\r" not in path.read_bytes()
    inode = path.stat().st_ino
    write(path, NAMES)
    assert path.stat().st_ino == inode, "nothing is written where nothing changed"


@pytest.mark.parametrize(("said", "wanted"), [("true", True), ("false", False), ("", False), ("yes", False)])
def test_what_the_annotation_says(said: str, wanted: bool) -> None:
    annotations = {FORWARD: said} if said else {}
    assert is_forwarded(annotations) is wanted
    assert bool(misread(annotations)) is (said == "yes")
