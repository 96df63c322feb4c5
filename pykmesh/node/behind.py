"""An instance behind the command line: `pykmesh up` in a session of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Final

from pykmesh.node.instance import Instance, InstanceError, running

READY_DEADLINE_S: Final = 30.0
END_DEADLINE_S: Final = 15.0
POLL_S: Final = 0.05
READY: Final = "is ready"
"""What `pykmesh up` says last when all its processes are."""


class Behind:
    """Started when this returns. Who waits for it and gives up must `end` it."""

    def __init__(self, instance: Instance, arguments: list[str]) -> None:
        """`arguments` are those of `pykmesh`. InstanceError when its log cannot be written."""
        if (other := running(instance.run_dir)) is not None:
            down = f"pykmesh --instance {instance.name} down"
            raise InstanceError(f"instance {instance.name!r} runs already (pid {other.pid}): {down}")
        self._instance = instance
        self._log = instance.log("supervisor")
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("wb") as file:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "pykmesh", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
        except OSError as error:
            raise InstanceError(f"run-time directory {instance.run_dir}: {error.strerror}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def until_ready(self) -> None:
        """InstanceError with its last words when it ends, or at the deadline; it goes on trying then."""
        end = time.monotonic() + READY_DEADLINE_S
        while time.monotonic() < end:
            text = self._log.read_text(errors="replace")
            if self._process.poll() is not None:
                raise InstanceError(_last_words(text))
            if f"instance {self._instance.name} {READY}" in text:
                return
            time.sleep(POLL_S)
        raise InstanceError(
            f"not ready after {READY_DEADLINE_S:g} s; it goes on trying: pykmesh status (log: {self._log})"
        )

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
