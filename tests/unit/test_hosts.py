"""Host names of workloads: looked up beside one another, and none keeps the others waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import anyio
import pytest

from pykmesh.kernel.records import Ip, ip_from_text
from services.map_writer import hosts
from services.map_writer.follower import Follower
from services.map_writer.hosts import AT_ONCE, HostNames

FOUND = (ip_from_text("10.0.0.1"),)
BAD = [f"bad-{number}.test" for number in range(AT_ONCE)]


class Resolver:
    """Bad names fail, or take long, the first time; then they get no answer until `end` is called."""

    def __init__(self, *, fails: bool) -> None:
        self._fails = fails
        self._asked: set[str] = set()
        self._ended = threading.Event()
        self.waiting = threading.Semaphore(0)

    def __call__(self, name: str) -> tuple[Ip, ...]:
        if name not in BAD:
            return FOUND
        if name in self._asked:
            self.waiting.release()
            self._ended.wait(10)
        self._asked.add(name)
        if self._fails:
            raise OSError("nobody knows it")
        time.sleep(hosts.SLOW_S)
        return FOUND

    def end(self) -> None:
        self._ended.set()


@pytest.fixture(params=[True, False], ids=["failed", "slow"])
def resolver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    found = Resolver(fails=request.param)
    monkeypatch.setattr(hosts, "addresses_of", found)
    monkeypatch.setattr(hosts, "SLOW_S", 0.02)
    monkeypatch.setattr(hosts, "LOOK_S", 0.01)
    yield found
    found.end()


@pytest.mark.anyio
async def test_names_that_failed_or_were_slow_leave_room_for_others(resolver: Resolver) -> None:
    follower = Follower()
    names = HostNames(follower, 0.01)
    told = anyio.Event()

    async def tell(name: str, _found: tuple[Ip, ...]) -> None:
        if name == "good.test":
            told.set()

    for name in BAD:
        follower.mesh.by_hostname[name]["uid"] = None
    with anyio.fail_after(8):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(names.run, tell)
            for _ in range(AT_ONCE // 2):
                await anyio.to_thread.run_sync(resolver.waiting.acquire)
            follower.mesh.by_hostname["good.test"]["uid"] = None
            await told.wait()
            assert not resolver.waiting.acquire(blocking=False)
            resolver.end()
            tasks.cancel_scope.cancel()
