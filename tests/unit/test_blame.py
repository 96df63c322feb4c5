"""Objects that no Envoy takes are found among any number of others, with few questions."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykmesh.manifests.objects import ObjectRef
from services.waypoint_mgr import instances
from services.waypoint_mgr.blame import EACH_MAX, find_guilty

pytestmark = pytest.mark.anyio
ALL = [ObjectRef("HTTPRoute", "shop" if number % 2 else "bank", f"r{number}") for number in range(128)]


class Envoy:
    """Refuses whatever is made with one of these, and what is made with nothing if `always`."""

    def __init__(self, bad: Collection[ObjectRef], *, always: bool = False) -> None:
        self._bad, self._always = bad, always
        self.asked = 0

    async def refusal_without(self, refs: Collection[ObjectRef]) -> str:
        self.asked += 1
        left = [str(each) for each in ALL if each in self._bad and each not in refs]
        return "always" if self._always else " and ".join(left)


async def found_by(envoy: Envoy, suspects: list[ObjectRef]) -> dict[ObjectRef, str]:
    found: dict[ObjectRef, str] = {}
    await find_guilty(suspects, envoy.refusal_without, found)
    return found


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(ALL), max_size=5))
async def test_those_are_found_and_no_others(bad: set[ObjectRef]) -> None:
    envoy = Envoy(bad)
    assert await found_by(envoy, ALL) == {each: str(each) for each in bad}
    assert envoy.asked <= 2 + len(bad) * 2 * math.log2(len(ALL)) + 1


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("echo refused; exit 1", "refused"),
        ("exit 3", "exit status 3"),
        ("exit 0", ""),
        ('[ -e "$0.again" ] && exit 0; touch "$0.again"; kill -SEGV $$', ""),
        ("kill -SEGV $$", "it is ended by signal 11"),
    ],
)
async def test_what_an_envoy_says_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, said: str
) -> None:
    """One that crashed once has refused nothing."""
    monkeypatch.setattr(instances, "find_envoy", lambda: envoy_that(tmp_path, ends))
    assert await instances.refusal({}) == said


async def test_an_envoy_that_is_killed_or_says_nothing_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "ASK_DEADLINE_S", 0.2)
    for ends, why in (("kill -KILL $$", "was killed"), ("exec sleep 9", "says nothing in 0.2 s")):
        monkeypatch.setattr(instances, "find_envoy", lambda ends=ends: envoy_that(tmp_path, ends))
        with pytest.raises(instances.InstanceError, match=why):
            await instances.refusal({})


def envoy_that(directory: Path, ends: str) -> Path:
    path = directory / "envoy"
    path.write_text(f"#!/bin/sh\n{ends}\n")
    path.chmod(0o755)
    return path


async def test_where_it_is_for_none_of_them_none_is_blamed() -> None:
    assert await found_by(Envoy((), always=True), ALL) == {}
    assert await found_by(Envoy(()), []) == {}


async def test_of_a_namespace_with_many_all_that_are_left_are_to_blame_and_nobody_else() -> None:
    """However much one writes that is wrong, it takes no longer than so long."""
    envoy = Envoy(bad := [each for number, each in enumerate(ALL) if each.namespace == "shop" and number % 4])
    found = await found_by(envoy, ALL)
    assert found.keys() >= set(bad)
    assert {each.namespace for each in found} == {"shop"}
    assert envoy.asked <= 2 + (EACH_MAX + 2) * 2 * math.log2(len(ALL))


async def test_an_envoy_that_is_asked_ends_when_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = 'echo $$ > "$0.pid"; exec sleep 30'
    monkeypatch.setattr(instances, "find_envoy", lambda: envoy_that(tmp_path, ends))
    noted = tmp_path / "envoy.pid"
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(instances.refusal, {})
            while not (noted.exists() and noted.read_text()):  # noqa: ASYNC110
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
        while is_running(int(noted.read_text())):  # noqa: ASYNC110
            await anyio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
