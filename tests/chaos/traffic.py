"""Traffic in pods, by the program `traffic.c`, which counts what becomes of each connection."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from pykmesh.demo.counted import Counted
from pykmesh.demo.pods import Pod

SOURCE = Path(__file__).with_name("traffic.c")
PORT, UDP_PORT = 8080, 9090
OPEN_DEADLINE_S = 60.0
END_DEADLINE_S = 15.0
"""Of a client: it waits for what is under way."""


def build(directory: Path) -> str:
    """The program, compiled."""
    target = directory / "traffic"
    subprocess.run(["clang", "-O2", "-o", str(target), str(SOURCE)], check=True)
    return str(target)


class Counts(msgspec.Struct, frozen=True):
    """What a client saw, or several together. Times in milliseconds."""

    connections: int = 0
    requests: int = 0
    failed: int = 0
    open: int = 0
    longest_pause_ms: float = 0.0
    slowest_ms: float = 0.0
    errors: Counter[str] = msgspec.field(default_factory=Counter)
    answers: Counter[str] = msgspec.field(default_factory=Counter)

    @classmethod
    def read(cls, found: dict[str, Any]) -> Counts:
        tallies = {key: Counter(found[key]) for key in ("errors", "answers")}
        return cls(**{**found, **tallies})

    def __and__(self, other: Counts) -> Counts:
        return Counts(
            self.connections + other.connections,
            self.requests + other.requests,
            self.failed + other.failed,
            self.open + other.open,
            max(self.longest_pause_ms, other.longest_pause_ms),
            max(self.slowest_ms, other.slowest_ms),
            self.errors + other.errors,
            self.answers + other.answers,
        )


class Client:
    """One kind of traffic from a pod; begun when this returns."""

    def __init__(self, program: str, pod: Pod, *words: str) -> None:
        self._counted = Counted(pod, program, *words, start_deadline_s=OPEN_DEADLINE_S)

    def counts(self) -> Counts:
        return Counts.read(self._counted.counts())

    def end(self) -> Counts:
        return Counts.read(self._counted.end(END_DEADLINE_S))


def serve(program: str, pod: Pod) -> Counted:
    """An endpoint that answers its pod's name."""
    return Counted(pod, program, "serve", pod.name, str(PORT), str(UDP_PORT))
