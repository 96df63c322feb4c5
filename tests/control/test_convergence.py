"""Pushes, duplicates, disconnects and restarts in any order: the kernel comes to say the server's state.

What is drawn is drawn from a seed, which a failure names.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest

from pykmesh.node.mesh import Options
from tests.control import kernel_view
from tests.control.kernel_view import Entry
from tests.control.mesh_node import MeshNode, running, until
from tests.control.resources import Resource, host, pod, service, uid
from tests.control.scripted_ads import ADDRESS, Answer, ScriptedAds, resource, serving

pytestmark = [pytest.mark.anyio, pytest.mark.kernel, pytest.mark.usefixtures("one_event_loop")]

SEEDS = [int(text) for text in os.environ.get("PYKMESH_SEEDS", "1 2 3").split()]
ROUNDS, ACTIONS = 5, 6
NAMES = [f"s{n}" for n in range(4)]
PODS = [f"p{n}" for n in range(8)]
BROKEN = resource(host("broken"), b"\x12\x04\x12\x02ns")
"""A service without a hostname."""


class Script:
    """A run of random events, and what the kernel must say in the end."""

    def __init__(self, seed: int, plane: ScriptedAds, node: MeshNode) -> None:
        self._draw = random.Random(seed)
        self._plane, self._node = plane, node
        self._services: dict[str, str] = {}
        self._pods: dict[str, tuple[str, bool, list[str]]] = {}
        self._told: list[asyncio.Future[Answer]] = []
        """Answers that are awaited on the present stream."""

    async def _tell(self, *resources: Resource, removed: Sequence[str] = ()) -> None:
        self._told.append(await self._plane.tell(*resources, removed=removed))

    async def act(self) -> str:
        """Does one thing; returns what."""
        self._told = [answer for answer in self._told if not answer.done()]
        what = self._draw.choice(
            ["push", "push", "push", "push", "remove", "again", "broken", "cut", "end", "crash", "kill"]
        )
        await getattr(self, f"_{what}")()
        return what

    def expected(self) -> dict[str, Entry]:
        found = {}
        for name, vip in self._services.items():
            endpoints = {
                f"{ip} 8080" for ip, healthy, services in self._pods.values() if healthy and name in services
            }
            found[f"{vip} 80"] = Entry("routed", frozenset(endpoints))
        return found

    def _some(self) -> list[Resource]:
        """New or changed resources; the model takes them over."""
        found: dict[str, Resource] = {}
        for _ in range(self._draw.randint(1, 5)):
            if self._draw.random() < 0.4:
                name = self._draw.choice(NAMES)
                self._services[name] = f"10.96.{NAMES.index(name)}.{self._draw.randint(1, 3)}"
                found[name] = service(name, self._services[name])
            else:
                name = self._draw.choice(PODS)
                ip = f"10.1.{PODS.index(name)}.{self._draw.randint(1, 3)}"
                joined = self._draw.sample(NAMES, self._draw.randint(0, 3))
                healthy = self._draw.random() < 0.8
                self._pods[name] = ip, healthy, joined
                found[name] = pod(name, ip, services=joined, healthy=healthy)
        return list(found.values())

    async def _push(self) -> None:
        await self._tell(*self._some())

    async def _remove(self) -> None:
        """Also of what was never there."""
        gone = self._draw.choice([*NAMES, *PODS])
        self._services.pop(gone, None)
        self._pods.pop(gone, None)
        await self._tell(removed=[host(gone) if gone in NAMES else uid(gone)])

    async def _again(self) -> None:
        known = list(self._plane.state[ADDRESS].values())
        await self._tell(*self._draw.sample(known, len(known) // 2))

    async def _broken(self) -> None:
        """It is rejected by name, and what comes beside it is taken."""
        resources = self._some()
        self._plane.state[ADDRESS].update({item.name: item for item in resources})
        answer = await self._plane.send(self._plane.response([BROKEN, *resources]))
        assert answer.reasons.keys() == {BROKEN.name}

    async def _cut(self) -> None:
        """The stream ends right behind a push, which may have come or not."""
        number = len(self._plane.streams)
        await self._tell(*self._some())
        await self._plane.stream.end(self._draw.choice([grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE]))
        await self._plane.next_stream(number)
        self._told.clear()

    async def _end(self) -> None:
        """The control plane changes its mind while nobody is there to hear."""
        number = len(self._plane.streams)
        await self._plane.stream.end()
        resources = self._some()
        self._plane.state[ADDRESS].update({item.name: item for item in resources})
        # Which of both the new stream's first response has seen is open: it is told again.
        await self._plane.next_stream(number)
        self._told.clear()
        await self._tell(*resources)

    async def _crash(self) -> None:
        number = len(self._plane.streams)
        await self._plane.stop()
        gone = self._draw.choice(NAMES)
        self._services.pop(gone, None)
        self._plane.state[ADDRESS].pop(host(gone), None)
        await self._plane.start()
        await self._plane.next_stream(number)
        self._told.clear()

    async def _kill(self) -> None:
        process = self._draw.choice(["xds_client", "map_writer", "nats"])
        number = len(self._plane.streams)
        if process != "xds_client":
            await self._node.kill(process)
            return
        # An answer that is under way when it dies would be taken for the next one's.
        await asyncio.gather(*self._told)
        self._plane.client_restarted()
        await self._node.kill(process)
        await self._plane.next_stream(number)


@pytest.mark.parametrize("seed", SEEDS)
async def test_any_interleaving_converges_to_the_servers_state(tmp_path: Path, seed: int) -> None:
    async with serving() as plane:
        options = Options(xds_address=f"127.0.0.1:{plane.port}")
        async with running(tmp_path, options) as node:
            script, done = Script(seed, plane, node), list[str]()
            for _ in range(ROUNDS):
                done += [await script.act() for _ in range(ACTIONS)]
                expected = script.expected()
                await until(
                    f"the kernel as it should be after {done}",
                    lambda e=expected: _services(node) == e,  # type: ignore[misc]
                )
            plane.check()


def _services(node: MeshNode) -> dict[str, Entry] | None:
    """None while the maps are being made or written."""
    try:
        return kernel_view.read(node.maps_dir).services
    except (AssertionError, KeyError):
        return None
