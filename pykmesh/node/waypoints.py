"""What waypoints leave on a node when the mesh ends: their Envoys run on, as programs and maps stay."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Final

from pykmesh.node.instance import Instance

DEADLINE_S: Final = 5.0
POLL_S: Final = 0.01


def cgroup(instance: Instance, root: Path) -> Path:
    """Below it each of the instance's Envoys has a cgroup of its own."""
    return root / f"pykmesh-{instance.name}-waypoints"


def remove(instance: Instance, root: Path) -> int:
    """Ends every Envoy and removes what they kept; returns how many processes were ended. OSError."""
    top = cgroup(instance, root)
    ended: set[int] = set()
    deadline = time.monotonic() + DEADLINE_S
    for each in [*top.glob("*/"), top] if top.exists() else []:
        while True:
            pids = [int(pid) for pid in (each / "cgroup.procs").read_text().split()]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ended.update(pids)
            with contextlib.suppress(OSError):
                each.rmdir()
                break
            if time.monotonic() > deadline:
                raise OSError(f"{each} does not empty")
            time.sleep(POLL_S)
    for directory in (instance.waypoints_dir, instance.envoys_dir):
        shutil.rmtree(directory, ignore_errors=True)
    return len(ended)
