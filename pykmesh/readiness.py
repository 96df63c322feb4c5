"""Readiness as named tasks: a process is ready when nothing that it named is still awaited."""

from __future__ import annotations

import anyio


class Readiness:
    """Tasks that must be done before the process is ready; each can be awaited anew later."""

    def __init__(self) -> None:
        self._pending: dict[str, None] = {}
        self._changed = anyio.Event()

    def wait_for(self, task: str) -> None:
        self._pending[task] = None

    def done(self, task: str) -> None:
        if task in self._pending:
            del self._pending[task]
            self._changed.set()
            self._changed = anyio.Event()

    @property
    def pending(self) -> list[str]:
        return list(self._pending)

    @property
    def ready(self) -> bool:
        return not self._pending

    async def until_ready(self) -> None:
        while self._pending:
            await self._changed.wait()
