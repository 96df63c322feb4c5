"""Programs that end with the tests, also when those are killed, and what they wrote."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

DEADLINE_S = 90.0
END_DEADLINE_S = 3.0
TAIL_BYTES = 4000


class Process:
    """A program in a directory of its own, with a log beside it to which each run adds."""

    def __init__(
        self,
        name: str,
        words: list[str | Path],
        directory: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """setpriv(1) becomes the program: the kernel kills it with its parent."""
        self.name = name
        self.log = directory / f"{name}.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=directory, env=environment, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """An OSError of `ready` means not yet."""
        end = time.monotonic() + DEADLINE_S
        while True:
            try:
                if ready():
                    return
            except OSError:
                pass
            assert self.is_running, f"{self.name} ended before {what}:\n{self.tail()}"
            assert time.monotonic() < end, f"no {what} after {DEADLINE_S} s:\n{self.tail()}"
            time.sleep(0.05)

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")

    def end(self) -> None:
        """Asks, and kills who does not hear."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
