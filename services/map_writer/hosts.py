"""Looks up the host names of workloads that have no address, again and again, and beside all else.

The node's own resolver answers, as its resolv.conf and hosts file say. A name that fails keeps what it
stood for, also for who was there before this process, and is tried again sooner; one that never was found has
no endpoints. It is told once, and again when it fails after it was found. Names that failed or were slow
leave room for the others.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import anyio
import structlog
from prometheus_client.core import Metric

from pykmesh import metrics
from pykmesh.kernel.records import Ip, ip_from_text
from services.map_writer.follower import Follower

log = structlog.get_logger(__name__)

LOOK_S: Final = 0.25
RETRY_S: Final = 1.0
AT_ONCE: Final = 16
"""Names looked up at a time; a resolver that does not answer takes its time for each."""
DOUBTFUL_AT_ONCE: Final = AT_ONCE // 2
"""Of these, such as failed or were slow the last time."""
SLOW_S: Final = 1.0
Tell = Callable[[str, tuple[Ip, ...] | None], Awaitable[None]]


class HostNames:
    """When each name is due, and how it went."""

    def __init__(self, follower: Follower, refresh_s: float) -> None:
        self._follower = follower
        self._refresh_s = refresh_s
        self._due: dict[str, float] = {}
        self._failed: dict[str, str] = {}
        """Why each name that is not found is not."""
        self._slow: set[str] = set()
        self._limit = anyio.CapacityLimiter(AT_ONCE)
        self._doubtful_limit = anyio.CapacityLimiter(DOUBTFUL_AT_ONCE)

    async def run(self, tell: Tell) -> None:
        """`tell` takes what a name stands for, each time, or None: not found. Runs until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                now, names = time.monotonic(), self._follower.mesh.by_hostname
                for gone in self._due.keys() - names.keys() if self._follower.synced else ():
                    del self._due[gone]
                    self._failed.pop(gone, None)
                    self._slow.discard(gone)
                    await tell(gone, ())
                for name in [name for name in names if self._due.get(name, 0.0) <= now]:
                    self._due[name] = float("inf")
                    tasks.start_soon(self._look_up, name, tell)
                await anyio.sleep(LOOK_S)

    async def _look_up(self, name: str, tell: Tell) -> None:
        try:
            found = await self._addresses_of(name)
        except (OSError, ValueError) as error:  # ValueError: what can be no name
            if self._failed.get(name) != str(error):
                log.warning("hostname_not_found", hostname=name, error=str(error))
            self._failed[name] = str(error)
            self._due[name] = time.monotonic() + min(RETRY_S, self._refresh_s)
            await tell(name, None)
            return
        self._failed.pop(name, None)
        self._due[name] = time.monotonic() + self._refresh_s
        await tell(name, found)

    async def _addresses_of(self, name: str) -> tuple[Ip, ...]:
        """As `addresses_of`, in a thread when there is one for it."""
        is_doubtful = name in self._failed or name in self._slow
        async with self._doubtful_limit if is_doubtful else contextlib.nullcontext():
            found, took_s = await anyio.to_thread.run_sync(
                _timed, name, limiter=self._limit, abandon_on_cancel=True
            )
        if took_s < SLOW_S:
            self._slow.discard(name)
        else:
            self._slow.add(name)
        return found

    def health(self) -> Iterator[Metric]:
        yield metrics.gauge(
            "mesh_hostnames_not_found", "Host names of workloads that stand for nothing.", len(self._failed)
        )


def _timed(name: str) -> tuple[tuple[Ip, ...], float]:
    started = time.monotonic()
    return addresses_of(name), time.monotonic() - started


def addresses_of(name: str) -> tuple[Ip, ...]:
    """Blocks. OSError when the name stands for nothing, or nobody answers; ValueError for what is no name."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return tuple(sorted({ip_from_text(str(place[0]).partition("%")[0]) for *_, place in found}))
