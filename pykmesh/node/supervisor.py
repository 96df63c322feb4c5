"""Runs an instance's processes: starts them, starts again what ends, tells them to end.

It owns processes and their logs, nothing else: ending it, or killing it, leaves the kernel's side
and so all traffic as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio
import anyio.to_thread
import structlog

from pykmesh.contracts.settings import EXIT_SETTINGS
from pykmesh.logs import LogFile
from pykmesh.node.ask import fetch
from pykmesh.node.fork_server import ForkServer, Process
from pykmesh.node.instance import InstanceError

log = structlog.get_logger(__name__)

BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
STEADY_AFTER_S: Final = 10.0
END_DEADLINE_S: Final = 5.0
LAST_WORDS_S: Final = 2.0
"""What was said longer before the end is not why."""
LIVE_EVERY_S: Final = 5.0
LIVE_MISSES: Final = 6
"""So many times in a row, each after five seconds and five more, a process says nothing: then it hangs."""
LINE_BYTES_MAX: Final = 64 * 1024


class Spec(NamedTuple):
    """A process to keep running."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    log: Path
    admin_port: int = 0
    """Where it says that it is alive; 0: nowhere."""


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
        """The last line that each process wrote which is an error, or none of its log."""
        self._said_at: dict[str, float] = {}
        self.ended: dict[str, str] = {}
        """How each process ended that was started again last."""
        self._fork_server = ForkServer()

    def state(self) -> dict[str, dict[str, Any]]:
        """Of each process its id, None while it does not run, how often it was started again, and why."""
        return {
            name: {"pid": self.pids.get(name), "restarts": n, "ended": self.ended.get(name, "")}
            for name, n in self.restarts.items()
        }

    async def run(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                for spec in self._specs:
                    tasks.start_soon(self._keep, spec)
        finally:
            self._fork_server.end()

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
            is_why = time.monotonic() - self._said_at.get(spec.name, 0) < LAST_WORDS_S
            self.ended[spec.name] = _how(code, self.last_words.get(spec.name, "") if is_why else "")
            log.warning("process_restarting", process=spec.name, code=code, after_s=backoff)
            await anyio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_MAX_S)

    async def _once(self, spec: Spec) -> int | None:
        try:
            process = await self._fork_server.start(spec.command, {**os.environ, **spec.environment})
        except OSError as error:
            log.error("process_not_started", process=spec.name, error=str(error))
            return None
        self.pids[spec.name] = process.pid
        self.last_words.pop(spec.name, None)
        code = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(process.end_with_server, END_DEADLINE_S)
                tasks.start_soon(self._watch, spec, process)
                await self._copy(spec, process)
                code = await process.wait()
                tasks.cancel_scope.cancel()
            return code
        finally:
            self.pids.pop(spec.name, None)
            await process.end(END_DEADLINE_S)

    async def _watch(self, spec: Spec, process: Process) -> None:
        """Kills one that was alive and does not say so any more: it is started again."""
        was_alive, silent = False, 0
        while spec.admin_port and silent < LIVE_MISSES:
            await anyio.sleep(LIVE_EVERY_S)
            try:
                await anyio.to_thread.run_sync(
                    fetch, spec.admin_port, "/livez", LIVE_EVERY_S, abandon_on_cancel=True
                )
                was_alive, silent = True, 0
            except OSError:
                silent += was_alive
        if silent:
            log.error("process_hangs", process=spec.name, pid=process.pid, effect="it is killed")
            process.kill()

    async def _copy(self, spec: Spec, process: Process) -> None:
        rest = b""
        with LogFile(spec.log) as file:
            while data := await process.receive():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take_line(spec, file, line)
                if len(rest) > LINE_BYTES_MAX:
                    self._take_line(spec, file, rest)
                    rest = b""
            if rest:
                self._take_line(spec, file, rest)

    def _take_line(self, spec: Spec, file: LogFile, line: bytes) -> None:
        text = line.decode(errors="replace")
        if not text.startswith("{") or '"level": "error"' in text:
            self.last_words[spec.name], self._said_at[spec.name] = text, time.monotonic()
        file.write(line)
        if self._echo:
            self._echo(spec.name, text)


def _how(code: int | None, last_words: str) -> str:
    """By which status or signal, and with which error."""
    how = "no status" if code is None else f"signal {-code}" if code < 0 else f"exit status {code}"
    with contextlib.suppress(json.JSONDecodeError, AttributeError):
        said = json.loads(last_words)
        last_words = str(said.get("error", ""))
    return f"{how}: {last_words}" if last_words else how
