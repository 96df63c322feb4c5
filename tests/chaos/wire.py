"""The way to a control plane that stands apart: it can be cut, held up, and say what nobody said."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Literal, Self

import anyio
from anyio.abc import SocketStream, TaskStatus
from anyio.from_thread import BlockingPortal, start_blocking_portal

from pykmesh.contracts.settings import ControlPlaneSettings, to_environment
from pykmesh.node.instance import ports_of_no_client

State = Literal["through", "cut", "held", "garbled"]


class Wire:
    """Carries bytes between xds_client, which asks at `port`, and the control plane."""

    def __init__(self, to: int, chance: random.Random) -> None:
        self.port, self._to = ports_of_no_client(1)[0], to
        self._chance = chance
        self._state: State = "through"
        self._open: set[anyio.CancelScope] = set()
        self._stack = contextlib.ExitStack()
        self._portal: BlockingPortal
        self._passing: anyio.Event

    def __enter__(self) -> Self:
        self._portal = self._stack.enter_context(start_blocking_portal())
        serving, _ = self._portal.start_task(self._serve)
        self._stack.callback(serving.cancel)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def state(self, state: State) -> None:
        """What is open is ended by `cut`, and by leaving `garbled`: there nobody knows what was said."""
        self._portal.call(self._become, state)

    async def _become(self, state: State) -> None:
        if state == "cut" or self._state == "garbled":
            for scope in self._open:
                scope.cancel()
        self._state = state
        if state == "held":
            self._passing = anyio.Event()
        else:
            self._passing.set()

    async def _serve(self, *, task_status: TaskStatus[None]) -> None:
        self._passing = anyio.Event()
        self._passing.set()
        async with await anyio.create_tcp_listener(
            local_host="127.0.0.1", local_port=self.port, reuse_port=True
        ) as door:
            task_status.started()
            await door.serve(self._carry)

    async def _carry(self, asker: SocketStream) -> None:
        with contextlib.suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError):
            async with asker:
                if self._state == "cut":
                    return
                async with await anyio.connect_tcp("127.0.0.1", self._to) as asked:
                    with anyio.CancelScope() as scope:
                        self._open.add(scope)
                        try:
                            await self._copy_both(asker, asked)
                        finally:
                            self._open.discard(scope)

    async def _copy_both(self, asker: SocketStream, asked: SocketStream) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._copy, asker, asked, tasks.cancel_scope)
            tasks.start_soon(self._copy, asked, asker, tasks.cancel_scope)

    async def _copy(self, source: SocketStream, sink: SocketStream, both: anyio.CancelScope) -> None:
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                data = await source.receive()
                await self._passing.wait()
                await sink.send(self._chance.randbytes(len(data)) if self._state == "garbled" else data)
        both.cancel()


class ControlPlane:
    """The embedded control plane as a process of its own."""

    def __init__(self, config: Path, log: Path) -> None:
        self.port, self._admin = ports_of_no_client(2)
        self._config, self._log = config, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, dialect: str) -> None:
        settings = ControlPlaneSettings(
            config_dir=self._config, listen_port=self.port, admin_port=self._admin, dialect=dialect
        )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pykmesh.controlplane"],
                env={**os.environ, **to_environment(settings)}, stdout=log, stderr=log,
            )  # fmt: skip

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
