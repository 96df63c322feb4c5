"""What real istiods sent, step by step, is in the kernel's maps as soon as it is acknowledged.

After each step every entry of `services`, `endpoints` and `addresses` is compared with an independent
reading of the recording's `expect.json` (see recordings.py for what is left out), and nothing else may
be there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import anyio.to_thread
import pytest

from pykmesh.cli import diff
from pykmesh.kernel import pins
from pykmesh.node import run
from tests.control import kernel_view, older, recordings
from tests.control.conftest import Whole
from tests.control.mesh_node import until
from tests.control.recordings import RECORDINGS, Message, Step
from tests.control.scripted_ads import TYPES, Response, ScriptedAds, serving
from tests.mesh.node import Node

pytestmark = [pytest.mark.anyio, pytest.mark.kernel, pytest.mark.usefixtures("one_event_loop")]

VERSIONS = ("istiod-1.25.5", "istiod-1.31-eed52ebb66ad")
SCENARIOS = ("basics", "service-entries", "reconnect", "waypoints", "policies", "waypoint-status")


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("version", VERSIONS)
async def test_after_each_step_the_maps_say_what_istiod_said(
    mesh: Whole, version: str, scenario: str
) -> None:
    await mesh.node.until_page("xds_client", lambda said: said["map_writer"] == "there", "followed")
    await _compare(mesh.plane, mesh.node.maps_dir, recordings.steps(RECORDINGS / version / scenario))


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("version", older.VERSIONS)
async def test_after_each_step_the_maps_say_what_an_older_istiod_would_have_said(
    mesh: Whole, version: str, scenario: str
) -> None:
    await mesh.node.until_page("xds_client", lambda said: said["map_writer"] == "there", "followed")
    found = older.steps(RECORDINGS / VERSIONS[0] / scenario, version)
    await _compare(mesh.plane, mesh.node.maps_dir, found)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_recorded_mesh_of_a_thousand_services_is_whole_after_each_step(
    mesh: Whole, version: str
) -> None:
    """Its `expect.json` has counts of what there is, and a digest."""
    await mesh.node.until_page("xds_client", lambda said: said["map_writer"] == "there", "followed")
    player = Player(mesh.plane)
    for step in recordings.steps(RECORDINGS / version / "scale"):
        await player.play(step.messages)
        said, counts = await mesh.node.page("map_writer"), step.state["counts"]
        assert {kind: said[kind] for kind in counts} == counts, step.name
        view = kernel_view.read(mesh.node.maps_dir)
        kinds = Counter(address.kind for address in view.addresses.values())
        assert kinds == {"service": counts["services"], "workload": counts["workloads"]}, step.name
    held = await anyio.to_thread.run_sync(diff.held, mesh.node.instance)
    assert held.differences == []


def test_older_forms_differ_from_the_recording() -> None:
    """Else they would show nothing."""
    for scenario, version in itertools.product(("basics", "waypoints"), ("1.23", "1.22")):
        folder = RECORDINGS / VERSIONS[0] / scenario
        recorded, made = recordings.steps(folder), older.steps(folder, version)
        assert any(
            a.messages != b.messages and a.state != b.state for a, b in zip(recorded, made, strict=True)
        )


async def test_a_mesh_that_the_command_line_started_says_the_same(tmp_path: Path) -> None:
    async with serving() as plane:
        place = ["--node-name", recordings.HERE["NODE"], "--set", f"locality={recordings.LOCALITY}"]
        node = Node(tmp_path, "--xds-address", f"127.0.0.1:{plane.port}", *place)
        try:
            await anyio.to_thread.run_sync(node.start)
            port = node.instance.ports.xds_client
            await until("map_writer there", lambda: run.fetch(port, "/status")["map_writer"] == "there")
            await _compare(
                plane, pins.maps_dir(node.pin_dir), recordings.steps(RECORDINGS / VERSIONS[1] / "basics")
            )
        finally:
            await anyio.to_thread.run_sync(node.end)


async def _compare(plane: ScriptedAds, maps_dir: Path, found: Iterable[Step]) -> None:
    player = Player(plane)
    for step in found:
        await player.play(step.messages)
        said, wanted = kernel_view.read(maps_dir), recordings.view(step.state)
        assert said.services == wanted.services, step.name
        assert said.addresses == wanted.addresses, step.name


class Player:
    """Sends recorded responses, each on the stream on which it was recorded."""

    def __init__(self, plane: ScriptedAds) -> None:
        self._plane = plane
        self._stream = 1

    async def play(self, messages: list[Message]) -> None:
        for message in messages:
            if message.stream != self._stream:
                await self._reopen()
                self._stream = message.stream
            assert message.type_url in TYPES
            answer = await self._plane.send(Response.FromString(message.data))
            assert answer.accepted, answer.error

    async def _reopen(self) -> None:
        """The recording has what istiod answers to the versions, so the server itself says nothing."""
        self._plane.answers_subscriptions = False
        number = len(self._plane.streams)
        await self._plane.stream.end()
        await self._plane.next_stream(number)


def test_the_recordings_hold_every_kind_of_entry() -> None:
    """Else the comparisons above would say little."""
    seen: Counter[str] = Counter()
    for version, scenario in itertools.product(VERSIONS, SCENARIOS):
        for step in recordings.steps(RECORDINGS / version / scenario):
            for entry in recordings.view(step.state).services.values():
                seen[entry.verdict if entry.endpoints or entry.verdict != "routed" else "empty"] += 1
    assert seen == {
        "routed": 808,
        "empty": 397,
        "waypoint_unsupported": 96,
        "waypoint_unavailable": 12,
        "passthrough": 48,
    }
