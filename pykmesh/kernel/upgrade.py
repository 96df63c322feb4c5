"""From the maps that another release made to this one's: a plan, and the copying.

A map's pin carries the hash of its layout (`<name>@<hash>`), so those of two releases stand beside one
another. What a map looks like is asked of the kernel, which keeps the types (BTF) that it was made with: the
release that made it may be gone, and which of the two is the newer one does not matter.

A new map is made in a directory of its own, filled, and moved to the others, where the old one then goes.
Each map changes in one move: whoever is ended in between leaves maps that are this release's and maps that
are not yet, and the next one goes on. Programs of before go on with the maps that they have.

Writers that do not know of each other keep apart by a lock (`Gate`). Who copies holds it alone; who writes
holds it with others for as long as a write takes, and looks whether the maps are still his.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pykmesh.kernel import libbpf, pins
from pykmesh.kernel.btf import Btf, BtfError, structure_of
from pykmesh.kernel.layout import MapLayout, fields_of, map_layout, map_names
from pykmesh.kernel.maps import MapFullError, PinError, PinnedMap, stride, values_in

_GENERATION: Final = "generations"
_FIRST: Final = bytes(4)
_UNPINNED: Final = "unpinned"
WRITE_DEADLINE_S: Final = 20.0
LOOK_S: Final = 0.001
_KERNEL_NAME: Final = 15
"""Characters of a map's name that the kernel keeps."""
_RING_BUFFER, _SK_STORAGE, _SOCK_HASH = 27, 24, 18
_ARRAY_TYPES: Final = (2, 6)
_SOCKETS, _LOADS = "sockets", "loads"
_CANNOT_BE_COPIED: Final = {
    _RING_BUFFER: "records that were not read",
    _SK_STORAGE: "what is known of sockets that are open: their close is not recorded, their peer is the "
    "endpoint, and what begins in that moment by way of a waypoint is closed",
}


class UpgradeError(Exception):
    """Why this release cannot go on with the maps that are there, and with which."""


class MovedOnError(Exception):
    """Other maps are in the place of those that were written: their writer must begin anew."""


class Fate(Enum):
    """What becomes of a map."""

    KEPT = "kept"
    COPIED = "copied"
    EMPTY = "begins empty"
    NEW = "new"
    GONE = "goes"


class Move(NamedTuple):
    """One map's. `why` says what is lost, or why it cannot be."""

    name: str
    fate: Fate
    before: str = ""
    """The pin that is there now, if that is another one."""
    why: str = ""
    stale: tuple[str, ...] = ()
    """Pins that somebody left who was ended."""


class Plan(NamedTuple):
    moves: list[Move]
    problems: list[str]
    """Why it cannot be done; empty: it can."""

    @property
    def is_none(self) -> bool:
        """Nothing is there that is not this release's."""
        return not any(move.before or move.stale for move in self.moves)


class Copied(msgspec.Struct):
    """What was done: entries by map, and, at the end, for how long nobody could write."""

    entries: dict[str, int] = {}
    stood_still_ms: float = 0.0


class _Field(NamedTuple):
    offset: int
    size: int
    type: str


class _Shape(NamedTuple):
    """Of a key or value: its size, and its fields if it is a structure."""

    size: int
    fields: Mapping[str, _Field] | None


class _Part(NamedTuple):
    """Bytes that go from one place to another."""

    there: slice
    here: slice
    dropped: slice
    """Upper bytes of a number that is narrower here: zero, or it does not fit."""
    name: str


def plan(pin_dir: Path) -> Plan:
    """What would be done to the maps of an instance. Changes nothing. KernelError."""
    directory = pins.maps_dir(pin_dir)
    moves = list[Move]()
    problems = [f"{path} is a directory: it is nobody's" for path in directory.iterdir() if path.is_dir()]
    known = map_names()
    for name in sorted({pin.name.partition("@")[0] for pin in directory.glob("*")} - {*known}):
        gone = tuple(pin.name for pin in directory.glob(f"{name}@*"))
        moves.append(Move(name, Fate.GONE, why="this release has none", stale=gone))
    for name in known:
        layout, there = map_layout(name), sorted(directory.glob(f"{name}@*"))
        if not there:
            moves.append(Move(name, Fate.NEW))
            continue
        before = there[0] if len(there) == 1 else _current(pin_dir, directory / layout.pin, there)
        stale = tuple(pin.name for pin in there if pin not in (before, directory / layout.pin))
        if before.name == layout.pin:
            if not _has_sizes_of(before, layout):
                problems.append(f"{before} is no map that a release made under this name: remove it")
            moves.append(Move(name, Fate.KEPT, stale=stale))
        elif (why := _CANNOT_BE_COPIED.get(layout.type)) is not None:
            moves.append(Move(name, Fate.EMPTY, before.name, f"lost: {why}", stale))
        else:
            lost = ""
            try:
                conversion = _Conversion(before, layout)
                conversion.check()
                lost = conversion.lost
            except UpgradeError as error:
                problems.append(str(error))
            moves.append(Move(name, Fate.COPIED, before.name, lost, stale))
    return Plan(moves, problems)


def _current(pin_dir: Path, own: Path, there: list[Path]) -> Path:
    """Of several pins, which there are when somebody was ended between two steps: what programs read.

    This release's own before another one; where nothing is read by a program, the one that came last.
    """
    in_use = _maps_in_use(pin_dir)
    read = [pin for pin in there if _map_id(pin) in in_use]
    if read:
        return own if own in read else read[0]
    return max(there, key=lambda pin: pin.stat().st_mtime_ns)


def _map_id(pin: Path) -> int:
    with libbpf.closing(libbpf.obj_get(str(pin))) as fd:
        return libbpf.map_id(fd)


def _maps_in_use(pin_dir: Path) -> set[int]:
    """The ids of maps of all programs that are attached."""
    found: set[int] = set()
    for directory in (pins.links_dir(pin_dir), pins.waypoints_dir(pin_dir)):
        for pin in directory.glob("*/*"):
            with contextlib.suppress(libbpf.KernelError), libbpf.closing(libbpf.obj_get(str(pin))) as fd:
                found.update(libbpf.program_name_and_maps(libbpf.link_info(fd)[0])[1])
    return found


def pin_again(pin_dir: Path) -> list[str]:
    """Pins maps that attached programs read and that have no pin, as somebody removed it. Their names.

    Those of another release's layout too, under a name that a `Staging` finds. A ring is left to go: whether
    its records are ours is written nowhere. Of several maps of a name the one that was made last.
    """
    directory = pins.maps_dir(pin_dir)
    there = {pin.name.partition("@")[0] for pin in directory.iterdir()}
    missing = {name[:_KERNEL_NAME]: name for name in map_names() if name not in there}
    missing = {seen: name for seen, name in missing.items() if map_layout(name).type != _RING_BUFFER}
    found = []
    for number in sorted(_maps_in_use(pin_dir), reverse=True) if missing else ():
        try:
            opened = libbpf.map_fd_by_id(number)
        except libbpf.KernelError as error:
            if error.errno != errno.ENOENT:  # it went just now
                raise
            continue
        with libbpf.closing(opened) as fd:
            if name := missing.pop(libbpf.map_name(fd), None):
                layout = map_layout(name)
                pin = layout.pin if _is_of(fd, layout) else f"{name}@{_UNPINNED}"
                libbpf.obj_pin(fd, str(directory / pin))
                found.append(name)
    return found


def _is_of(fd: int, layout: MapLayout) -> bool:
    try:
        there = _layout_of(fd, layout.pin)
        shapes = _shapes_of(fd, there)
    except (BtfError, KeyError):
        return False
    sizes = (there.type, there.key_size, there.value_size) == (
        layout.type, layout.key_size, layout.value_size,
    )  # fmt: skip
    return sizes and [shape.fields for shape in shapes] == [_fields(layout.key), _fields(layout.value)]


def _has_sizes_of(pin: Path, layout: MapLayout) -> bool:
    with libbpf.closing(libbpf.obj_get(str(pin))) as fd:
        return libbpf.map_info(fd)[:3] == (layout.type, layout.key_size, layout.value_size)


class Staging:
    """The maps of this release that are not there yet, while they are being made and filled."""

    def __init__(self, pin_dir: Path) -> None:
        """UpgradeError when it cannot be done; then nothing has changed."""
        self._pin_dir = pin_dir
        self._maps = pins.maps_dir(pin_dir)
        self._directory = pins.staging_dir(pin_dir)
        self._moves = plan(pin_dir)
        if self._moves.problems:
            raise UpgradeError("; ".join(self._moves.problems))
        _clear(self._directory)
        self.paths: dict[str, Path] = {}
        """Where to pin those that are to be copied or to begin empty."""
        self.room: dict[str, int] = {}
        """How many entries they must have room for: as many as those of before."""
        if not self._moves.is_none:
            self._directory.mkdir()
            self.paths = {
                move.name: self._directory / map_layout(move.name).pin
                for move in self._moves.moves
                if move.before
            }
            for move in self._moves.moves:
                if move.fate is Fate.COPIED and map_layout(move.name).type not in _ARRAY_TYPES:
                    with libbpf.closing(libbpf.obj_get(str(self._maps / move.before))) as fd:
                        self.room[move.name] = libbpf.map_info(fd)[3]

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[Copied | None]:
        """Copies, and puts the maps of this release in place; writers stand still until the end of it.

        The caller gives the links their new programs meanwhile. None: there was nothing to do.
        """
        if self._moves.is_none:
            yield None
            return
        gate = Gate(self._pin_dir)
        gate.opened()
        try:
            with gate.closed():
                began, done = time.perf_counter(), Copied()
                for move in self._moves.moves:
                    if move.fate is Fate.COPIED:
                        conversion = _Conversion(self._maps / move.before, map_layout(move.name))
                        done.entries[move.name] = conversion.copy_to(self.paths[move.name])
                for move in self._moves.moves:
                    if move.before:
                        self.paths[move.name].rename(self._maps / map_layout(move.name).pin)
                    for pin in filter(None, (move.before, *move.stale)):
                        (self._maps / pin).unlink()
                _clear(self._directory)
                self._begin_counting_anew()
                yield done
                done.stood_still_ms = round((time.perf_counter() - began) * 1e3, 3)
        finally:
            gate.close()

    def _begin_counting_anew(self) -> None:
        """Of open connections, where what is known of them is lost: nobody would count them down."""
        if any(move.name == _SOCKETS and move.fate is Fate.EMPTY for move in self._moves.moves):
            with PinnedMap(self._maps, _LOADS) as loads:
                loads.erase(b"".join(key for key, _ in list(loads.items())))


def _clear(directory: Path) -> None:
    """Also of one that was ended in between."""
    if directory.exists():
        shutil.rmtree(directory)


class Gate:
    """Keeps those apart who write maps and who put others in their place. For one thread at a time.

    By a lock on a directory that nobody else locks: not the maps', which telemetry holds. Nobody replaces
    maps until `opened`: for whoever has yet to open those that he writes.
    """

    def __init__(self, pin_dir: Path) -> None:
        """PinError when the maps are not there."""
        directory = pins.waypoints_dir(pin_dir)
        try:
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise PinError(f"{directory}: {error.strerror}; is bpf_loader up?") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH)
            self._generations = PinnedMap(pins.maps_dir(pin_dir), _GENERATION)
        except BaseException:
            os.close(self._fd)
            raise
        self._generation = self._generations.get(_FIRST)

    def opened(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """For a moment. MovedOnError: what this one has open is no more what programs read."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        try:
            if self._generations.get(_FIRST) != self._generation:
                raise MovedOnError("the maps were put in other ones' place by another release")
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Nobody writes. Whoever wrote before has to begin anew, from now on, also if this one is ended.

        UpgradeError when somebody keeps the lock: a write takes a moment.
        """
        self._lock_alone()
        try:
            number = int.from_bytes(self._generations.get(_FIRST) or b"", "little") + 1
            self._generations.put(_FIRST, number.to_bytes(8, "little"))
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _lock_alone(self) -> None:
        until = time.monotonic() + WRITE_DEADLINE_S
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > until:
                held = Path(f"/proc/self/fd/{self._fd}").readlink()
                raise UpgradeError(f"{held} is locked by somebody: lsof tells who")
            time.sleep(LOOK_S)

    def close(self) -> None:
        self._generations.close()
        os.close(self._fd)


class _Conversion:
    """Of one map's entries. UpgradeError where the new layout has no place for what there is."""

    def __init__(self, before: Path, layout: MapLayout) -> None:
        self._layout = layout
        self._before = before
        with libbpf.closing(libbpf.obj_get(str(before))) as fd:
            self._old = _layout_of(fd, before.name)
            try:
                shapes = _shapes_of(fd, self._old)
            except (BtfError, KeyError) as error:
                raise UpgradeError(f"map {layout.name}: its types are not understood: {error}") from error
        if self._old.type != layout.type:
            raise UpgradeError(f"map {layout.name} is of type {self._old.type}, not {layout.type}")
        if layout.type == _SOCK_HASH:
            raise UpgradeError(f"map {layout.name} holds sockets, which cannot be copied")
        self._indexes = None
        if layout.type in _ARRAY_TYPES:
            self._indexes = min(self._old.max_entries, layout.max_entries)
        here = _Shape(layout.key_size, _fields(layout.key)), _Shape(layout.value_size, _fields(layout.value))
        self._keys = _parts(f"key of map {layout.name}", shapes[0], here[0])
        self._values = _parts(f"value of map {layout.name}", shapes[1], here[1])
        gone = sorted((shapes[1].fields or {}).keys() - (here[1].fields or {}).keys() - _PADDING)
        if self._indexes is not None and self._indexes < self._old.max_entries:
            gone.append(f"all after the first {self._indexes}")
        self.lost = f"lost: {', '.join(gone)}" if gone else ""
        if ((shapes[0].fields or {}).keys() ^ (here[0].fields or {}).keys()) - _PADDING:
            raise UpgradeError(f"the key of map {layout.name} has other fields")

    def check(self) -> None:
        """Reads what is there, where it may not fit. UpgradeError where it does not."""
        if any(part.dropped != _NO_BYTES for part in (*self._keys, *self._values)):
            for _ in self._entries():
                pass

    def copy_to(self, path: Path) -> int:
        """Returns how many entries there were. UpgradeError where one does not fit."""
        count = 0
        with PinnedMap.opened(path, self._layout) as new:
            for keys, values in self._entries():
                try:
                    new.write_rows(keys, values)
                except MapFullError as error:
                    raise UpgradeError(f"{error}: it has room for {new.max_entries} entries") from error
                count += len(keys)
        return count

    def _entries(self) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """Keys and values in the new layout, a chunk at a time."""
        each, size = values_in(self._layout), stride(self._layout)
        with PinnedMap.opened(self._before, self._old) as old:
            for keys, rows in old.chunks():
                flat = keys.view(np.uint8).reshape(len(keys), self._old.key_size)
                kept = np.full(len(keys), fill_value=True)
                if self._indexes is not None:
                    kept = flat.view(np.uint32)[:, 0] < self._indexes
                found = int(kept.sum())
                made = self._made(self._values, rows[kept].reshape(found * each, -1), size)
                yield self._made(self._keys, flat[kept], self._layout.key_size), made.reshape(found, -1)

    def _made(self, parts: list[_Part], there: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
        here = np.zeros((len(there), size), np.uint8)
        for part in parts:
            if there[:, part.dropped].any():
                raise UpgradeError(f"{part.name} of map {self._layout.name} holds numbers too large for it")
            here[:, part.here] = there[:, part.there]
        return here


_PADDING: Final = {"pad", "pad2", "reserved"}
_NO_BYTES: Final = slice(0, 0)


def _layout_of(fd: int, pin: str) -> MapLayout:
    kind, key, value, entries = libbpf.map_info(fd)
    name, _, found = pin.partition("@")
    return MapLayout(name, found, kind, None, None, key, value, entries)


def _shapes_of(fd: int, layout: MapLayout) -> tuple[_Shape, _Shape]:
    types = libbpf.map_types(fd)
    if types is None:
        return _Shape(layout.key_size, None), _Shape(layout.value_size, None)
    data, key, value = types
    btf = Btf(data)
    found = (structure_of(btf, number) for number in (key, value))
    keys, values = (_by_name(each["fields"]) if each else None for each in found)
    return _Shape(layout.key_size, keys), _Shape(layout.value_size, values)


def _fields(name: str | None) -> Mapping[str, _Field] | None:
    return None if name is None else _by_name(fields_of(name)[1])


def _by_name(fields: list[dict[str, Any]]) -> dict[str, _Field]:
    return {field["name"]: _Field(field["offset"], field["size"], field["type"]) for field in fields}


def _parts(what: str, there: _Shape, here: _Shape) -> list[_Part]:
    if there.fields is None or here.fields is None:
        if (there.fields is None, there.size) != (here.fields is None, here.size):
            raise UpgradeError(f"the {what} has {there.size} bytes, not {here.size}")
        return [_Part(slice(0, here.size), slice(0, here.size), _NO_BYTES, what)]
    return [
        _part(f"{name} in the {what}", there.fields[name], field)
        for name, field in here.fields.items()
        if name in there.fields and name not in _PADDING
    ]


def _part(what: str, there: _Field, here: _Field) -> _Part:
    is_number = all(field.type in ("u8", "u16", "u32", "u64") for field in (there, here))
    if not is_number and (there.size, there.type) != (here.size, here.type):
        raise UpgradeError(
            f"{what} is {there.type} of {there.size} bytes, not {here.type} of {here.size} bytes"
        )
    size = min(there.size, here.size)
    return _Part(
        slice(there.offset, there.offset + size),
        slice(here.offset, here.offset + size),
        slice(there.offset + size, there.offset + there.size),
        what,
    )
