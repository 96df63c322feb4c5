"""The edge to the maps: reads what they hold, applies the steps of a plan in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import anyio

from pykmesh.kernel import pins
from pykmesh.kernel.layout import Switch
from pykmesh.kernel.maps import PinError, PinnedMap
from pykmesh.kernel.records import ADDRESS_KEY, ENDPOINT_KEY, RANGE_VALUE, SWITCH_KEY
from pykmesh.kernel.upgrade import Gate
from pykmesh.process import give_way
from services.map_writer.planner import PAUSE, Held, Limits, Step

_T = TypeVar("_T")
SMALL_BYTES: Final = 4096
"""Keys of a plan that is written without a thread: some microseconds, less than the way there."""
GIVE_WAY_S: Final = 0.004
"""So long planning goes on without a moment for others."""
STEPS_WAITING: Final = 3
"""To be written, beside the one that is: what follows is planned no further."""
NAMES: Final = ("services", "endpoints", "addresses", "ranges", "switches")


class Maps:
    """The configuration maps of an instance. PinError when they are not there, or of another layout."""

    def __init__(self, pin_dir: Path) -> None:
        """Two writers would undo each other's work: the second gets PinError."""
        self._failed: Exception | None = None
        self._lock = _lock(pins.links_dir(pin_dir))
        directory = pins.maps_dir(pin_dir)
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, self._lock)
            self._gate = Gate(pin_dir)  # first: whoever replaces maps after this is noticed
            opened.callback(self._gate.close)
            self._maps = {name: opened.enter_context(PinnedMap(directory, name)) for name in NAMES}
            self._gate.opened()
            self.key_bytes = {name: pinned.layout.key_size for name, pinned in self._maps.items()}
            self.close = opened.pop_all().close

    @property
    def limits(self) -> Limits:
        return Limits(*(self._maps[name].max_entries for name in Limits._fields))

    def read(self) -> Held:
        """Blocks for as long as the maps are large: for a thread."""
        held = Held()
        held.services.update(self._maps["services"].items())
        for key, value in self._maps["addresses"].items():
            held.add_address(key, value)
        for key, value in self._maps["ranges"].items():
            held.ranges[ADDRESS_KEY.pack(*RANGE_VALUE.unpack(value))] = key
        for key, value in self._maps["endpoints"].items():
            list_id, slot = ENDPOINT_KEY.unpack(key)
            if slot < self._maps["endpoints"].max_entries:
                held.add_endpoint(list_id, slot, value)
            else:
                held.unreachable[key] = value
        held.has_views = any(self._maps["switches"].get(SWITCH_KEY.pack(Switch.VIEWS)) or b"")
        return held

    def read_again(self) -> Held:
        """As `read`; steps may follow what is there now."""
        held = self.read()
        self._failed = None
        return held

    def get(self, name: str, key: bytes) -> bytes | None:
        """One entry, as the programs find it."""
        return self._maps[name].get(key)

    def ranges(self) -> dict[bytes, bytes]:
        """Each entry of the trie as it is; `Held` has them by the places that stand for them."""
        return dict(self._maps["ranges"].items())

    def apply(self, *steps: Step) -> None:
        """In order; blocks. After an error every call ends with it, until maps are read again.

        MapFullError, KernelError. MovedOnError when another release has its maps in the place of these:
        whoever writes must begin anew.
        """
        if self._failed is not None:
            raise self._failed
        try:
            with self._gate.writing():
                for step in steps:
                    if step.values:
                        self._maps[step.map].write(step.keys, step.values)
                    else:
                        self._maps[step.map].erase(step.keys)
        except Exception as error:
            self._failed = error
            raise

    def are_current(self) -> bool:
        """False when bpf_loader has made a map anew: the programs then read another than is written here."""
        return all(pinned.is_current() for pinned in self._maps.values())

    def memory_bytes(self) -> dict[str, int]:
        return {name: pinned.memory_bytes() for name, pinned in self._maps.items()}


class Writing:
    """Writes plans in a thread while they are made, in order, and reads behind what it writes."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self._thread = ThreadPoolExecutor(1, "maps")

    async def read_again(self) -> Held:
        return await _finished(self._thread.submit(self._maps.read_again))

    async def take(self, steps: Iterable[Step]) -> Counter[str]:
        """Returns how many entries of each map were written or removed. Raises what `Maps.apply` does.

        Large steps are written while what follows is planned, and small ones with the next. No more than a
        few wait for their turn. What takes long to plan is left for a moment every few milliseconds.
        """
        written: Counter[str] = Counter()
        writing: deque[Future[None]] = deque()
        due: list[Step] = []
        since = time.monotonic()
        for step in steps:
            if step is PAUSE:
                if time.monotonic() - since > GIVE_WAY_S:
                    await give_way()
                    since = time.monotonic()
                continue
            due.append(step)
            written[step.map] += len(step.keys) // self._maps.key_bytes[step.map]
            if len(step.keys) >= SMALL_BYTES:
                writing.append(self._thread.submit(self._maps.apply, *due))
                due = []
                await give_way()
                if len(writing) > STEPS_WAITING:
                    await _finished(writing.popleft())
        for each in writing:
            await _finished(each)
        if due:
            self._maps.apply(*due)
        return written


async def _finished(work: Future[_T]) -> _T:
    """Also while the process ends: a step that was taken back would be missing before the next ones."""
    with anyio.CancelScope(shield=True):
        await asyncio.wrap_future(work)
    return work.result()


def _lock(directory: Path) -> int:
    """Held for the process's life, on the directory of links, which nobody else locks."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise PinError(f"{directory}: {error.strerror}; is bpf_loader up?") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise PinError(f"{directory} is held by another map_writer: one instance, one writer") from error
    return fd
