"""Pinned maps: opened by name and layout, read and written in batches.

Needs no capability where the pin's owner lets it (kernel 5.19; CAP_BPF before). Batches run without
the interpreter's lock, so a large one belongs in a thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from pykmesh.kernel import libbpf
from pykmesh.kernel.layout import MapLayout, map_layout

READ_CHUNK = 65536
_PERCPU_TYPES = {5, 6, 10}
_ENOTSUPP = 524
"""Of the kernel's own, which user space has no name for: no batches (ranges: before 5.13)."""
_NO_ROOM = (-errno.E2BIG, -errno.ENOMEM, -errno.ENOSPC)


class PinError(Exception):
    """The pin is not there, or is one of another layout; the text says which and what to do."""


class MapFullError(Exception):
    """A write found no room; `written` entries of the batch went in before it."""

    def __init__(self, name: str, written: int) -> None:
        super().__init__(f"map {name} is full")
        self.written = written


def possible_cpus() -> int:
    """How many values a per-CPU entry has (Documentation/admin-guide/cputopology.rst)."""
    return _count_in_list(Path("/sys/devices/system/cpu/possible").read_text())


def values_in(layout: MapLayout) -> int:
    """How many values an entry has."""
    return possible_cpus() if layout.type in _PERCPU_TYPES else 1


def stride(layout: MapLayout) -> int:
    """Bytes from one value of an entry to the next: each processor's begins at a multiple of eight."""
    return (layout.value_size + 7) // 8 * 8 if layout.type in _PERCPU_TYPES else layout.value_size


def _count_in_list(cpus: str) -> int:
    """Of a list such as 0-3,8-11, which may have holes."""
    ranges = [[int(end) for end in part.split("-")] for part in cpus.strip().split(",")]
    return sum(ends[-1] - ends[0] + 1 for ends in ranges)


def _address(data: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


class PinnedMap:
    """One map of an instance, opened from `<pin directory>/<name>@<layout hash>`."""

    def __init__(self, directory: Path, name: str) -> None:
        layout = map_layout(name)
        self._begin(directory / layout.pin, layout)

    @classmethod
    def opened(cls, path: Path, layout: MapLayout) -> Self:
        """One that may be of another release."""
        found = cls.__new__(cls)
        found._begin(path, layout)  # noqa: SLF001  (its own)
        return found

    def _begin(self, path: Path, layout: MapLayout) -> None:
        self.layout = layout
        self.name = layout.name
        self.path = path
        self.fd = self._open(path.parent)
        try:
            kind, key, value, self.max_entries = libbpf.map_info(self.fd)
            if (kind, key, value) != (self.layout.type, self.layout.key_size, self.layout.value_size):
                raise PinError(
                    f"{self.path} is not what its name says: type {kind}, key {key}, value {value}"
                )
        except BaseException:
            os.close(self.fd)
            raise
        self._value_bytes = stride(layout) * values_in(layout)

    def _open(self, directory: Path) -> int:
        try:
            return libbpf.obj_get(str(self.path))
        except libbpf.KernelError as error:
            if error.errno == errno.EACCES:
                raise PinError(
                    f"{self.path}: permission denied; the pin's owner must let this user in"
                ) from error
            if error.errno != errno.ENOENT:
                raise
            others = sorted(p.name for p in directory.glob(f"{self.name}@*")) if directory.is_dir() else []
            hint = f"; there is {', '.join(others)} of another layout" if others else "; is bpf_loader up?"
            raise PinError(f"no pin {self.path}{hint}") from error

    def is_current(self) -> bool:
        """Whether the pin still names the map that is open here."""
        try:
            with libbpf.closing(libbpf.obj_get(str(self.path))) as fd:
                return libbpf.map_id(fd) == libbpf.map_id(self.fd)
        except libbpf.KernelError:
            return False

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: bytes) -> bytes | None:
        return libbpf.lookup(self.fd, key, self._value_bytes)

    def put(self, key: bytes, value: bytes) -> None:
        libbpf.update(self.fd, key, value)

    def remove(self, key: bytes) -> bool:
        return libbpf.delete(self.fd, key)

    def take(self, key: bytes) -> int | None:
        """Removes a per-CPU counter and returns its last sum: nothing is counted between the two.

        Before kernel 5.14 what a program adds between reading and removing is lost.
        """
        try:
            row = libbpf.lookup_and_delete(self.fd, key, self._value_bytes)
        except libbpf.KernelError as error:
            if error.errno not in (errno.EINVAL, _ENOTSUPP):
                raise
            row = self.get(key)
            self.remove(key)
        return None if row is None else int(np.frombuffer(row, np.uint64).sum())

    def write(self, keys: bytes, values: bytes) -> None:
        """Writes entries given back to back, in order. Raises MapFullError or KernelError."""
        total = len(keys) // self.layout.key_size
        if len(values) != total * self.layout.value_size:
            raise ValueError(f"{total} keys of map {self.name}, {len(values)} bytes of values")
        if total == 1:
            result, done = self._write_one(keys, values), 0
        else:
            result, done = libbpf.update_batch(self.fd, _address(keys), _address(values), total)
        if result == -_ENOTSUPP:
            result, done = self._write_each(keys, values, total)
        self._check_written(result, done, total)

    def write_rows(self, keys: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8]) -> None:
        """Entries as `chunks` has them, of a per-CPU map too. MapFullError, KernelError."""
        keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
        result, done = libbpf.update_batch(self.fd, keys.ctypes.data, values.ctypes.data, len(keys))
        if result == -_ENOTSUPP:
            result, done = self._write_each(keys.tobytes(), values.tobytes(), len(keys))
        self._check_written(result, done, len(keys))

    def _write_each(self, keys: bytes, values: bytes, total: int) -> tuple[int, int]:
        """Where the kernel has no batches for this type of map; returns what a batch does."""
        key, value = (len(data) // max(total, 1) for data in (keys, values))
        for at in range(total):
            result = self._write_one(keys[at * key : (at + 1) * key], values[at * value : (at + 1) * value])
            if result:
                return result, at
        return 0, total

    def _check_written(self, result: int, done: int, total: int) -> None:
        if result in _NO_ROOM:
            raise MapFullError(self.name, done)
        if result < 0:
            what = f"write {total} entries to map {self.name}, stopped after {done}"
            raise libbpf.KernelError(-result, what)

    def _write_one(self, key: bytes, value: bytes) -> int:
        try:
            libbpf.update(self.fd, key, value)
        except libbpf.KernelError as error:
            return -(error.errno or errno.EIO)
        return 0

    def erase(self, keys: bytes) -> None:
        """Removes entries; those that are not there are passed over."""
        size = self.layout.key_size
        if len(keys) == size:
            self.remove(keys)
            return
        start, total = _address(keys), len(keys) // size
        at = 0
        while at < total:
            result, done = libbpf.delete_batch(self.fd, start + at * size, total - at)
            if result == -_ENOTSUPP:
                libbpf.delete(self.fd, keys[at * size : (at + 1) * size])
                at += 1
                continue
            at += done
            if result == -errno.ENOENT:
                at += 1
            elif result < 0:
                raise libbpf.KernelError(
                    -result, f"remove {total} entries of map {self.name}, stopped after {at}"
                )

    def chunks(self) -> Iterator[tuple[npt.NDArray[np.void], npt.NDArray[np.uint8]]]:
        """All entries, a chunk at a time: keys as raw bytes, values as rows of bytes."""
        size, room = self.layout.key_size, min(READ_CHUNK, max(self.max_entries, 64))
        cursor = np.zeros(64, np.uint8)
        first: int | None = None
        while True:
            keys = np.zeros(room, f"V{size}")
            values = np.zeros((room, self._value_bytes), np.uint8)
            result, read = libbpf.lookup_batch(
                self.fd, first, cursor.ctypes.data, keys.ctypes.data, values.ctypes.data, room
            )
            if result == -errno.ENOSPC:
                room *= 2
                continue
            if result == -_ENOTSUPP:
                yield from self._one_chunk()
                return
            if result not in (0, -errno.ENOENT):
                raise libbpf.KernelError(-result, f"read map {self.name}")
            if read:
                yield keys[:read], values[:read]
            if result:
                return
            first = cursor.ctypes.data

    def _one_chunk(self) -> Iterator[tuple[npt.NDArray[np.void], npt.NDArray[np.uint8]]]:
        """As `chunks`, where the kernel has no batches for this type of map."""
        entries: dict[bytes, bytes] = {}
        key = libbpf.next_key(self.fd, None, self.layout.key_size)
        while key is not None:  # from one that went meanwhile the way begins anew
            if key not in entries and (value := self.get(key)) is not None:
                entries[key] = value
            key = libbpf.next_key(self.fd, key, self.layout.key_size)
        if entries:
            keys = np.frombuffer(b"".join(entries), f"V{self.layout.key_size}")
            yield keys, np.frombuffer(b"".join(entries.values()), np.uint8).reshape(len(keys), -1)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries; one that comes or goes meanwhile may or may not be among them."""
        for keys, values in self.chunks():
            yield from zip(keys.tolist(), (row.tobytes() for row in values), strict=True)

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self.chunks())

    def sums(self) -> dict[bytes, int]:
        """A per-CPU map of counters: each key's sum over all processors."""
        found: dict[bytes, int] = {}
        for keys, values in self.chunks():
            totals = np.ascontiguousarray(values).view(np.uint64).sum(axis=1)
            found.update(zip(keys.tolist(), totals.tolist(), strict=True))
        return found

    def counter_sums(self) -> list[int]:
        """A per-CPU array of counters: each index's sum."""
        rows = (self.get(index.to_bytes(4, "little")) or b"" for index in range(self.max_entries))
        return [int(np.frombuffer(row, np.uint64).sum()) for row in rows]

    def memory_bytes(self) -> int:
        """Kernel memory that the map holds (memlock in fdinfo)."""
        for line in Path(f"/proc/self/fdinfo/{self.fd}").read_text().splitlines():
            if line.startswith("memlock:"):
                return int(line.split()[1])
        return 0
