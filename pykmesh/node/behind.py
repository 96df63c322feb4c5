"""An instance behind the command line: `pykmesh up` in a session of its own."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pykmesh.node.instance import Instance, InstanceError, command, running

READY_DEADLINE: Final = "PYKMESH_READY_DEADLINE_S"
"""Of the environment: in how many seconds it has to be ready; 30 by itself."""
END_DEADLINE_S: Final = 15.0
POLL_S: Final = 0.05
LATE_POLL_S: Final = 1.0
"""Of what is not ready at the deadline, which may last: a control plane that is away."""
READY: Final = "is ready"
"""What `pykmesh up` says last when all its processes are."""
NOT_READY: Final = "pykmesh: not ready"
"""How the line begins that it says instead at the deadline."""
SAYING_S: Final = 10.0
"""So long after the deadline it has said either, also on a busy machine."""
CHECK: Final = "--check"
"""Tells `pykmesh up` to say what it would be refused for, and to do nothing."""
FLAG: Final = "--behind"
"""Tells `pykmesh up` that it runs behind: its log is a file, and what it says is for who started it."""


def ready_deadline_s(environment: Mapping[str, str] = os.environ) -> float:
    """InstanceError where the environment has no number that it could be."""
    text = environment.get(READY_DEADLINE, "30")
    with contextlib.suppress(ValueError):
        if 0 < (found := float(text)) < math.inf:
            return found
    raise InstanceError(f"{READY_DEADLINE}={text!r} in the environment: not a number of seconds")


def of_this_release(environment: Mapping[str, str]) -> dict[str, str]:
    """With it Python takes this release's code, whatever lies in the directory that it is started in."""
    return {**environment, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONSAFEPATH": "1"}


def end_supervisor(pid: int) -> None:
    """Tells it to end, and waits for that; it may have ended. One that does not is killed.

    Its processes then end with it, as they do whenever it is killed. InstanceError where it is there still.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            if select.select([pidfd], [], [], END_DEADLINE_S)[0]:
                return
        raise InstanceError(f"supervisor {pid} has not ended after {2 * END_DEADLINE_S:g} s, although killed")
    finally:
        os.close(pidfd)


class NotReadyError(InstanceError):
    """What is waited for; it may come yet."""


class Behind:
    """Started when this returns. Who waits for it and gives up must `end` it."""

    def __init__(
        self,
        instance: Instance,
        arguments: list[str],
        directory: str | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """`arguments` are those of `pykmesh`, `up` last."""
        if (other := running(instance.run_dir)) is not None:
            down = command(instance, "down")
            raise InstanceError(f"instance {instance.name!r} runs already (pid {other.pid}): {down}")
        self._instance = instance
        self._deadline_s = ready_deadline_s(environment)
        # In memory: no disk can be too full for it, and it breaks for nobody when this process ends.
        self._said = os.memfd_create("pykmesh-up")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pykmesh", *arguments, FLAG],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            start_new_session=True,
            cwd=directory,
            env=of_this_release(environment),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def until_ready(self) -> None:
        """InstanceError with its last words when it ends; NotReadyError at the deadline, as it goes on."""
        end = time.monotonic() + self._deadline_s + SAYING_S
        why: list[str] = []
        while time.monotonic() < end:
            has_ended = self._process.poll() is not None
            text = self._text()
            if has_ended:
                raise InstanceError(_last_words(text))
            if f"instance {self._instance.name} {READY}" in text:
                return
            if why := [line for line in text.splitlines() if line.startswith(NOT_READY)]:
                break
            time.sleep(POLL_S)
        said = why[0].removeprefix("pykmesh: ") if why else f"not ready after {self._deadline_s:g} s"
        raise NotReadyError(said)

    def _text(self) -> str:
        return os.pread(self._said, os.fstat(self._said).st_size, 0).decode(errors="replace")

    def end(self) -> None:
        """Tells it to end, and waits; the kernel's side stays."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("Error: ")]
    return (
        lines[-1].removeprefix("Error: ")
        if lines
        else "\n".join(text.splitlines()[-5:]) or "ended without a word"
    )
