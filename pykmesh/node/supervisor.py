"""Runs an instance's processes: starts them, starts again what ends, tells them to end.

It owns processes and their logs, nothing else: ending it, or killing it, leaves the kernel's side
and so all traffic as it is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import anyio
import anyio.abc
import structlog

from pykmesh.contracts.settings import EXIT_SETTINGS
from pykmesh.logs import LogFile
from pykmesh.node.instance import InstanceError

log = structlog.get_logger(__name__)

BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
STEADY_AFTER_S: Final = 10.0
END_DEADLINE_S: Final = 5.0
LINE_BYTES_MAX: Final = 64 * 1024


class Spec(NamedTuple):
    """A process to keep running."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    log: Path


class Supervisor:
    """Keeps `specs` running until cancelled. `echo` gets every line that they write.

    A process that ends because its settings are wrong would do so again: InstanceError says its last words.
    """

    def __init__(self, specs: list[Spec], echo: Callable[[str, str], None] | None = None) -> None:
        self._specs = specs
        self._echo = echo
        self.pids: dict[str, int] = {}
        self.restarts: dict[str, int] = {spec.name: 0 for spec in specs}
        self.last_words: dict[str, str] = {}

    def state(self) -> dict[str, dict[str, int | None]]:
        """Of each process its id, None while it does not run, and how often it was started again."""
        return {name: {"pid": self.pids.get(name), "restarts": n} for name, n in self.restarts.items()}

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for spec in self._specs:
                tasks.start_soon(self._keep, spec)

    async def _keep(self, spec: Spec) -> None:
        backoff = BACKOFF_FIRST_S
        while True:
            started = time.monotonic()
            code = await self._once(spec)
            if code == EXIT_SETTINGS:
                raise InstanceError(self.last_words.get(spec.name, f"{spec.name}: wrong settings"))
            if time.monotonic() - started > STEADY_AFTER_S:
                backoff = BACKOFF_FIRST_S
            self.restarts[spec.name] += 1
            log.warning("process_restarting", process=spec.name, code=code, after_s=backoff)
            await anyio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_MAX_S)

    async def _once(self, spec: Spec) -> int | None:
        # Ends with its supervisor even when that is killed.
        command = ["setpriv", "--pdeathsig", "TERM", *spec.command]
        process = await anyio.open_process(
            command,
            env={**os.environ, **spec.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pids[spec.name] = process.pid
        try:
            await self._copy(spec, process)
            return await process.wait()
        finally:
            self.pids.pop(spec.name, None)
            await _end(process)

    async def _copy(self, spec: Spec, process: anyio.abc.Process) -> None:
        if process.stdout is None:
            return
        rest = b""
        with LogFile(spec.log) as file:
            async for data in process.stdout:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take_line(spec, file, line)
                if len(rest) > LINE_BYTES_MAX:
                    self._take_line(spec, file, rest)
                    rest = b""
            if rest:
                self._take_line(spec, file, rest)

    def _take_line(self, spec: Spec, file: LogFile, line: bytes) -> None:
        text = self.last_words[spec.name] = line.decode(errors="replace")
        file.write(line)
        if self._echo:
            self._echo(spec.name, text)


async def _end(process: anyio.abc.Process) -> None:
    """SIGTERM, then SIGKILL at the deadline."""
    if process.returncode is not None:
        return
    with anyio.CancelScope(shield=True):
        process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(END_DEADLINE_S):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


def python(module: str) -> list[str]:
    return [sys.executable, "-m", module]
