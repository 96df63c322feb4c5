"""Plays a scenario and judges it."""

from __future__ import annotations

import random
import time

import msgspec

from tests.chaos.scenario import PAUSE_MAX_MS, Scenario
from tests.chaos.stage import Stage, Traffic, stage
from tests.chaos.traffic import Counts

CONNECTIONS_MIN = 100
AFTERWARDS_S = 1.0
"""All is as wanted: whoever answers now is judged by it."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of a scenario. `wrong`: answers; `entries_wrong`: of the kernel's maps, at the end."""

    name: str
    seed: int
    seconds: float
    connections: int = 0
    per_second: float = 0.0
    requests: int = 0
    failed: int = 0
    wrong: int = 0
    longest_pause_ms: float = 0.0
    slowest_ms: float = 0.0
    entries_wrong: int = 0
    problems: list[str] = []

    @property
    def ok(self) -> bool:
        return not self.problems


def play(scenario: Scenario, usual: list[Traffic], seed: int, rate: float) -> Outcome:
    """`rate`: of the traffic that scales, connections a second and family are that times a thousand."""
    begun = time.monotonic()
    chance = random.Random(f"{seed} {scenario.name}")
    outcome = Outcome(scenario.name, seed, 0.0)
    try:
        with stage(scenario.mesh, chance, rate) as found:
            outcome = _played(scenario, usual, seed, found)
    except Exception as error:  # noqa: BLE001  (a stage that cannot be built or left is a scenario that failed)
        outcome = msgspec.structs.replace(outcome, problems=[*outcome.problems, _text(error)])
    return msgspec.structs.replace(outcome, seconds=round(time.monotonic() - begun, 1))


def _played(scenario: Scenario, usual: list[Traffic], seed: int, found: Stage) -> Outcome:
    problems, begun = [], time.monotonic()
    for each in [*usual, *scenario.traffic]:
        found.begin(each)
    try:
        for step in scenario.steps:
            step.act(found)
        found.settled()
        found.nothing_left()
        time.sleep(AFTERWARDS_S)
    except Exception as error:  # noqa: BLE001  (a step that breaks is told, and what was counted is too)
        problems.append(_text(error))
    counts, entries_wrong, more = judged(found, scenario.pause_max_ms)
    problems += more
    per_second = counts.connections / (time.monotonic() - begun)
    if per_second < scenario.per_second:
        problems.append(f"only {per_second:.0f} connections a second, not {scenario.per_second:g}")
    return Outcome(
        scenario.name, seed, 0.0, counts.connections, per_second, counts.requests, counts.failed,
        found.wrong, counts.longest_pause_ms, counts.slowest_ms, entries_wrong, problems,
    )  # fmt: skip


def judged(found: Stage, pause_max_ms: float = PAUSE_MAX_MS) -> tuple[Counts, int, list[str]]:
    """Ends the traffic: what it saw, how many entries are wrong, and all that does not hold."""
    problems = list[str]()
    entries_wrong = 0
    try:
        differences = found.differences()
        entries_wrong = len(differences)
        problems += [f"wrong entry: {each}" for each in differences[:3]]
    except Exception as error:  # noqa: BLE001  (told, with all else)
        problems.append(_text(error))
    try:
        counts = found.finish()
    except Exception as error:  # noqa: BLE001  (told, with all else)
        return Counts(), entries_wrong, [*problems, _text(error)]
    problems += found.failures()
    if counts.slowest_ms > pause_max_ms:
        problems.append(f"an answer took {counts.slowest_ms:g} ms")
    if counts.longest_pause_ms > pause_max_ms:
        problems.append(f"a client had no answer for {counts.longest_pause_ms:g} ms")
    if counts.connections < CONNECTIONS_MIN:
        problems.append(f"only {counts.connections} connections were made")
    if found.wrong:
        problems += [f"{found.wrong} wrong answers", *found.notes[:3]]
    return counts, entries_wrong, problems


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
