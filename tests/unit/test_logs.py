"""A log file: what a disk does to it must not reach the process."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog

from pykmesh import logs
from pykmesh.logs import LogFile


def test_a_file_that_is_too_large_is_put_aside_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOG_BYTES_MAX", 20)
    path = tmp_path / "x.log"
    with LogFile(path) as file:
        for number in range(9):
            file.write_text(f"line {number:04}")
    assert path.with_suffix(".old").read_text() == "line 0003\nline 0004\nline 0005\n"
    assert path.read_text() == "line 0006\nline 0007\nline 0008\n"


def test_lines_that_cannot_be_written_are_lost_also_when_the_log_is_its_own(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as told, LogFile(tmp_path / "none" / "x.log") as file:
        file.write_text("one")
        file.write_text("two")
    assert [entry["event"] for entry in told] == ["log_lines_lost"]
    before = structlog.get_config()
    try:
        with LogFile(Path("/dev/full")) as file:
            logs.configure("test", "info", "json", file.write_text)
            for _ in range(3):
                structlog.get_logger().info("lost")
    finally:
        structlog.configure(**before)
        structlog.contextvars.clear_contextvars()
