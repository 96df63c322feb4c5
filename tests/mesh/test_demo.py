"""The demo says what it saw, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykmesh.kernel.cgroups import find_root
from tests.mesh.node import until


class Place:
    """Where a demo of the tests' own lives."""

    def __init__(self, directory: Path) -> None:
        self.name = f"d-{secrets.token_hex(3)}"
        self.run_dir, self.pin_dir = directory / "run", directory / "bpf" / "mesh"

    def command(self, *words: str) -> list[str]:
        place = ["--instance", self.name, "--run-dir", str(self.run_dir), "--pin-dir", str(self.pin_dir)]
        return [sys.executable, "-m", "pykmesh", *place, "demo", *words]

    def left(self) -> list[str]:
        """What is still there of it."""
        paths = [self.run_dir, self.pin_dir, find_root() / f"pykmesh-{self.name}"]
        names = [p.name for p in Path("/run/netns").glob(f"pykmesh-{self.name}-*")]
        commands = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                commands.append(path.read_bytes().replace(b"\0", b" ").decode())
        running = [command for command in commands if self.name in command]
        return [*(str(path) for path in paths if path.exists()), *names, *running]


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("d"))  # short: sockets of the waypoint are in it
    yield place
    subprocess.run(place.command("--remove"), check=False, capture_output=True)
    subprocess.run(["umount", str(place.pin_dir)], check=False, capture_output=True)


def test_its_summary_holds_and_nothing_is_left(place: Place) -> None:
    result = subprocess.run(place.command("--json"), capture_output=True, text=True, timeout=90, check=False)
    summary = json.loads(result.stdout)
    assert [step for step in summary["steps"] if not step["ok"]] == []
    assert result.returncode == 0, summary
    assert summary["failed"] == 0
    assert summary["connections"] > 100
    assert set(summary["per_endpoint"]) == {"web-v1-a", "web-v1-b", "web-v2-a"}
    assert summary["longest_pause_ms"] > 0
    assert place.left() == []


@pytest.mark.parametrize("stage", ["pods", "processes", "traffic"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_leaves_nothing(place: Place, stage: str, number: signal.Signals) -> None:
    process = subprocess.Popen(place.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    awaited = {
        "pods": lambda: list(Path("/run/netns").glob(f"pykmesh-{place.name}-*")),
        "processes": (place.run_dir / "logs" / "supervisor.log").exists,
        "traffic": (place.pin_dir / "links").exists,
    }[stage]
    until(awaited, stage)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted; cleaning up" in said
    assert place.left() == []


def test_a_mesh_that_is_no_demos_is_left_alone(place: Place, tmp_path: Path) -> None:
    """Whether its processes run or its kernel side alone is there."""
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    mesh = place.command()[:-1]
    subprocess.run(
        [*mesh, "up", "-d", "--free-ports", "--config-dir", str(tmp_path)], check=True, capture_output=True
    )
    try:
        for state in ("running", "down"):
            before = sorted(place.pin_dir.rglob("*"))
            for words in ([], ["--remove"]):
                refused = subprocess.run(place.command(*words), capture_output=True, text=True, check=False)
                assert refused.returncode == 1, state
                assert f"instance {place.name} is no demo's" in refused.stderr
            assert sorted(place.pin_dir.rglob("*")) == before
            subprocess.run([*mesh, "down"], check=state == "running", capture_output=True)
    finally:
        subprocess.run([*mesh, "down"], check=False, capture_output=True)
        subprocess.run([*mesh, "uninstall"], check=True, capture_output=True)


def test_a_demo_beside_another_is_refused_and_leaves_it(place: Place) -> None:
    first = subprocess.Popen(place.command("--keep"), stdout=subprocess.PIPE, text=True)
    until((place.run_dir / "logs" / "supervisor.log").exists, "the first to begin")
    beside = subprocess.run(place.command(), capture_output=True, text=True, check=False)
    assert beside.returncode == 1
    assert "is at work" in beside.stderr
    first.communicate(timeout=90)
    assert first.returncode == 0
    again = subprocess.run(place.command(), capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "a demo runs already" in again.stderr
    status = [*place.command()[:-1], "status"]
    assert subprocess.run(status, capture_output=True, check=False).returncode == 0


def test_kept_it_runs_on_until_it_is_removed(place: Place) -> None:
    result = subprocess.run(place.command("--keep"), capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Left running" in result.stdout
    status = [*place.command()[:-1], "status"]
    assert subprocess.run(status, capture_output=True, check=False).returncode == 0
    subprocess.run(place.command("--remove"), check=True, capture_output=True)
    assert place.left() == []
