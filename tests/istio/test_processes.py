"""The control plane's processes are gone with the tests, however those end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.istio.processes import Process
from tests.mesh.node import until

PARENT = """
import sys, time
from pathlib import Path
from tests.istio.processes import Process
print(Process("child", ["sleep", "600"], Path(sys.argv[1])).pid, flush=True)
time.sleep(600)
"""


def test_a_process_ends_with_its_parent_that_is_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        until(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n", "tied, by setpriv")
        os.kill(parent.pid, signal.SIGKILL)
    try:
        until(lambda: not _runs(child), "ended", 5)
    finally:
        if _runs(child):
            os.kill(child, signal.SIGKILL)


def test_a_process_that_ends_is_told_with_what_it_wrote(tmp_path: Path) -> None:
    process = Process("short", ["sh", "-c", "echo I cannot; exit 3"], tmp_path)
    try:
        process.until(lambda: False, "readiness")
    except AssertionError as error:
        assert str(error).startswith("short ended before readiness:\nI cannot\n")  # noqa: PT017 (its text)
    else:
        raise AssertionError("it was waited for in vain, and nobody said so")


def _runs(pid: int) -> bool:
    """A zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
