"""Maps that change places, in a real kernel: who writes meanwhile, and what is left of one who was ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykmesh.kernel import hooks, pins, upgrade
from pykmesh.kernel.layout import map_layout
from pykmesh.kernel.maps import PinError, PinnedMap
from pykmesh.kernel.records import POD_KEY, POD_VALUE, ip_from_text
from pykmesh.kernel.upgrade import Fate, Gate, MovedOnError, Staging, UpgradeError, plan

pytestmark = pytest.mark.kernel

KEY = POD_KEY.pack(7)
VALUE = POD_VALUE.pack(ip_from_text("10.1.0.1"), ip_from_text("fd00::1"), 3, 9)


@pytest.fixture
def pin_dir(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("needs root: maps are made and pinned")
    found = tmp_path / "bpf" / "test"
    pins.prepare(found)
    try:
        load(found, None)
        with PinnedMap(pins.maps_dir(found), "pods") as pods:
            pods.put(KEY, VALUE)
        yield found
    finally:
        subprocess.run(["umount", "--lazy", found], check=True, timeout=10)


def load(pin_dir: Path, staging: Staging | None) -> None:
    fixed = hooks.ProgramSettings("test", 0, hooks.can_set_retval(), has_telemetry=True)
    paths, room = (staging.paths, staging.room) if staging else ({}, {})
    hooks.Programs(pins.maps_dir(pin_dir), {"flows": 65536, "pods": 16}, fixed, paths, room).close()


def as_if_of_another_release(pin_dir: Path, name: str) -> Path:
    pin = pins.maps_dir(pin_dir) / map_layout(name).pin
    return pin.rename(pin.with_name(f"{name}@00000000"))


def take_over(pin_dir: Path) -> None:
    staging = Staging(pin_dir)
    load(pin_dir, staging)
    with staging.taken_over():
        pass


def test_what_another_release_holds_is_copied_and_who_wrote_it_begins_anew(pin_dir: Path) -> None:
    gate = Gate(pin_dir)
    gate.opened()
    with gate.writing():
        pass
    before = as_if_of_another_release(pin_dir, "pods")
    assert [(move.fate, move.before) for move in plan(pin_dir).moves if move.before] == [
        (Fate.COPIED, "pods@00000000")
    ]
    take_over(pin_dir)
    with PinnedMap(pins.maps_dir(pin_dir), "pods") as pods:
        assert dict(pods.items()) == {KEY: VALUE}
    assert not before.exists()
    with pytest.raises(MovedOnError), gate.writing():
        pytest.fail("it wrote")
    gate.close()
    assert plan(pin_dir).is_none


def test_of_two_pins_that_no_program_reads_the_one_that_came_last_counts(pin_dir: Path) -> None:
    before = as_if_of_another_release(pin_dir, "pods")
    load(pin_dir, None)
    move = next(move for move in plan(pin_dir).moves if move.name == "pods")
    assert (move.fate, move.stale) == (Fate.KEPT, (before.name,))
    take_over(pin_dir)
    assert not before.exists()
    with PinnedMap(pins.maps_dir(pin_dir), "pods") as pods:
        assert dict(pods.items()) == {}


def test_a_map_that_this_release_does_not_have_goes(pin_dir: Path) -> None:
    pin = pins.maps_dir(pin_dir) / map_layout("pods").pin
    other = pin.rename(pin.with_name("moods@12345678"))
    move = plan(pin_dir).moves[0]
    assert (move.name, move.fate, move.stale) == ("moods", Fate.GONE, (other.name,))
    take_over(pin_dir)
    assert not other.exists()


def test_sockets_cannot_be_copied_and_what_is_open_is_counted_anew(pin_dir: Path) -> None:
    as_if_of_another_release(pin_dir, "listeners")
    assert plan(pin_dir).problems == ["map listeners holds sockets, which cannot be copied"]
    (pins.maps_dir(pin_dir) / "listeners@00000000").unlink()
    as_if_of_another_release(pin_dir, "sockets")
    with PinnedMap(pins.maps_dir(pin_dir), "loads") as loads:
        loads.put(bytes(loads.layout.key_size), (5).to_bytes(8, "little"))
        take_over(pin_dir)
        assert len(loads) == 0


def test_a_lock_that_somebody_keeps_is_told(pin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "WRITE_DEADLINE_S", 0.1)
    as_if_of_another_release(pin_dir, "pods")
    staging = Staging(pin_dir)
    load(pin_dir, staging)
    held = os.open(pins.waypoints_dir(pin_dir), os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    with pytest.raises(UpgradeError, match=r"/waypoints is locked by somebody"), staging.taken_over():
        pytest.fail("it was taken over")
    os.close(held)
    with staging.taken_over():
        pass
    assert plan(pin_dir).is_none


def test_a_directory_among_the_maps_is_told_and_left(pin_dir: Path) -> None:
    stray = pins.maps_dir(pin_dir) / "mine@0"
    stray.mkdir()
    with pytest.raises(UpgradeError, match=r"/mine@0 is a directory"):
        Staging(pin_dir)
    assert stray.exists()


def test_who_copies_waits_for_who_writes_and_the_other_way_round(
    pin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, copier = Gate(pin_dir), Gate(pin_dir)
    writer.opened()
    copier.opened()
    turns = list[str]()

    def write() -> None:
        with contextlib.suppress(MovedOnError), writer.writing():
            turns.append("wrote")
        turns.append("tried")

    monkeypatch.setattr("pykmesh.kernel.upgrade.WRITE_DEADLINE_S", 0.05)
    with writer.writing(), pytest.raises(UpgradeError, match="is locked by somebody"), copier.closed():
        turns.append("copied")
    with copier.closed():
        waiting = threading.Thread(target=write)
        waiting.start()
        time.sleep(0.05)
        turns.append("copied")
    waiting.join()
    assert turns == ["copied", "tried"], "and what was written then is not what is read"
    writer.close()
    copier.close()


def test_without_maps_there_is_no_gate(tmp_path: Path) -> None:
    with pytest.raises(PinError, match="is bpf_loader up"):
        Gate(tmp_path)
