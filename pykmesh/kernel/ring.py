"""Reads a pinned BPF ring buffer of fixed-size records, by mmap and numpy, without a copy.

Owns the ring's consumer position: it moves only after the records were used, so a reader that dies
leaves to the next one what it had not finished. There is one reader of a ring at a time, held by a
lock on the directory of the pins: a second one would take records that the first then misses.

Layout (kernel/bpf/ringbuf.c): a page with the consumer's position, a page with the producer's, then
the data, mapped twice in a row so that nothing wraps. A record is a header of 8 bytes and the payload.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import threading
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from pykmesh.kernel.layout import dtype
from pykmesh.kernel.maps import PinnedMap

HEADER_BYTES: Final = 8
BUSY: Final = 1 << 31
DISCARDED: Final = 1 << 30
_PAGE: Final = mmap.PAGESIZE


class RingHeldError(Exception):
    """Another process reads this ring."""


def _slot(structure: str) -> np.dtype[np.void]:
    """A record with its header; records start at multiples of 8 bytes."""
    record = dtype(structure)
    stride = (HEADER_BYTES + record.itemsize + 7) // 8 * 8
    return np.dtype(
        {
            "names": ["length", "record"],
            "formats": ["<u4", record],
            "offsets": [0, HEADER_BYTES],
            "itemsize": stride,
        }
    )


class RingReader:
    """`take` some records, use them, then `advance` past them.

    What the programs did not submit, or submitted in another size, is passed over and counted in
    `skipped`. `take` never waits: the programs do not wake their reader, which comes by a timer.
    """

    def __init__(self, directory: Path, name: str = "flows", structure: str = "flow_record") -> None:
        """PinError when there is no such pin, RingHeldError when the ring has a reader."""
        self._slot = _slot(structure)
        self._payload = dtype(structure).itemsize
        self._pinned = PinnedMap(directory, name)
        try:
            self._held = _hold(directory)
        except BaseException:
            self._pinned.close()
            raise
        self.size_bytes = self._pinned.max_entries
        self.skipped = 0
        self._taken = 0
        consumer = mmap.mmap(self._pinned.fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        length = _PAGE + 2 * self.size_bytes
        self._data = mmap.mmap(self._pinned.fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE)
        self._consumer = np.frombuffer(consumer, "<u8", 1)
        self._producer = np.frombuffer(self._data, "<u8", 1)

    @property
    def position(self) -> int:
        """Bytes consumed since the ring was made, by any reader; 0: there never was one."""
        return int(self._consumer[0])

    @property
    def lag_bytes(self) -> int:
        return int(self._producer[0]) - self.position

    def is_current(self) -> bool:
        """Whether the pin still names the ring that is open here."""
        return self._pinned.is_current()

    def take(self, max_n: int) -> npt.NDArray[np.void]:
        """At most `max_n` records: a view of the ring, good until `advance`; empty when there is none."""
        while True:
            slots = self._submitted(max_n)
            if len(slots) or not self._pass_odd():
                self._taken = len(slots)
                return slots["record"]

    def _submitted(self, max_n: int) -> npt.NDArray[np.void]:
        position = self.position
        count = min((int(self._producer[0]) - position) // self._slot.itemsize, max_n)
        _fence()
        slots = np.frombuffer(self._data, self._slot, max(count, 0), _PAGE + position % self.size_bytes)
        odd = slots["length"] != self._payload
        _fence()
        return slots[: int(odd.argmax())] if odd.any() else slots

    def _pass_odd(self) -> bool:
        """At a first record that is not as expected. True when it is worth looking again.

        The header is read once: one that was busy may be submitted by a second look, and must then
        not be taken for one that was discarded.
        """
        position = self.position
        if int(self._producer[0]) - position < HEADER_BYTES:
            return False
        header = int(np.frombuffer(self._data, "<u4", 1, _PAGE + position % self.size_bytes)[0])
        if header & BUSY:
            return False
        if header != self._payload:
            self.skipped += 1
            length = header & ~DISCARDED
            self._move((HEADER_BYTES + length + 7) // 8 * 8)
        return True

    def advance(self, count: int) -> None:
        """Gives the room of the first `count` records taken back to the programs."""
        if count > self._taken:
            raise ValueError(f"{count} records used of {self._taken} taken")
        self._taken -= count
        self._move(count * self._slot.itemsize)

    def _move(self, step: int) -> None:
        _fence()
        self._consumer[0] = self.position + step

    def close(self) -> None:
        """What was not advanced past stays for the next reader. Views that are still held stay readable."""
        os.close(self._held)
        self._pinned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hold(directory: Path) -> int:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise RingHeldError(
            f"the ring below {directory} is read by another process: one telemetry an instance"
        ) from error
    return fd


_IS_ORDERED: Final = platform.machine() in {"x86_64", "AMD64"}
_lock = threading.Lock()


def _fence() -> None:
    """Keeps loads before it apart from loads and stores after it.

    x86-64 does so by itself. Elsewhere a release followed by an acquire does (Arm ARM, B2.3.7).
    """
    if not _IS_ORDERED:
        for _ in range(2):
            _lock.acquire()
            _lock.release()
