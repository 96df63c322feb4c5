"""Programs in pods that count: asked by a signal, they answer with one JSON line."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import Any, Final

from pykmesh.demo.pods import Pod

ANSWER_DEADLINE_S: Final = 5.0


class CountedError(Exception):
    """The program has ended, or does not answer."""


def module(name: str) -> tuple[str, ...]:
    """What runs a program of this package."""
    return sys.executable, "-m", f"pykmesh.demo.{name}"


class Counted:
    """A prober or an endpoint; started and listening when this returns."""

    def __init__(self, pod: Pod, *command: str, start_deadline_s: float = ANSWER_DEADLINE_S) -> None:
        self.pod = pod
        self._process = pod.spawn(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._rest = b""
        if self._line(start_deadline_s) != b"ready":
            raise CountedError(f"{' '.join(command)} in pod {pod.name} did not start")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def counts(self) -> dict[str, Any]:
        """What it has counted so far. Raises CountedError."""
        return self._ask(signal.SIGUSR1)

    def end(self, deadline_s: float = ANSWER_DEADLINE_S) -> dict[str, Any]:
        """Tells it to end; what it counted."""
        found = self._ask(signal.SIGTERM, deadline_s)
        self._process.wait(ANSWER_DEADLINE_S)
        return found

    def _ask(self, number: signal.Signals, deadline_s: float = ANSWER_DEADLINE_S) -> dict[str, Any]:
        if not self.alive:
            raise CountedError(f"the program in pod {self.pod.name} has ended")
        self._process.send_signal(number)
        found: dict[str, Any] = json.loads(self._line(deadline_s))
        return found

    def _line(self, deadline_s: float = ANSWER_DEADLINE_S) -> bytes:
        stream, end = self._process.stdout, time.monotonic() + deadline_s
        if stream is None:
            raise CountedError(f"the program in pod {self.pod.name} has no output")
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise CountedError(f"the program in pod {self.pod.name} does not answer")
                part = os.read(stream.fileno(), 65536)
                if not part:
                    raise CountedError(f"the program in pod {self.pod.name} has ended")
                self._rest += part
        line, self._rest = self._rest.split(b"\n", 1)
        return line
