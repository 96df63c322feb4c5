"""The edge to the maps: reads what they hold, applies the steps of a plan in order."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

from pykmesh.kernel import libbpf, pins
from pykmesh.kernel.layout import Switch
from pykmesh.kernel.maps import MapFullError, PinError, PinnedMap
from pykmesh.kernel.records import ADDRESS_KEY, ENDPOINT_KEY, RANGE_VALUE, SWITCH_KEY
from pykmesh.kernel.upgrade import Gate
from services.map_writer.planner import Held, Limits, Step

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
        self._failed = None
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

    def get(self, name: str, key: bytes) -> bytes | None:
        """One entry, as the programs find it."""
        return self._maps[name].get(key)

    def ranges(self) -> dict[bytes, bytes]:
        """Each entry of the trie as it is; `Held` has them by the places that stand for them."""
        return dict(self._maps["ranges"].items())

    def apply(self, *steps: Step) -> None:
        """In order; blocks. After a MapFullError or KernelError every call ends with it, until maps are read.

        MovedOnError when another release has its maps in the place of these: whoever writes must begin anew.
        """
        if self._failed is not None:
            raise self._failed
        with self._gate.writing():
            try:
                for step in steps:
                    if step.values:
                        self._maps[step.map].write(step.keys, step.values)
                    else:
                        self._maps[step.map].erase(step.keys)
            except (MapFullError, libbpf.KernelError) as error:
                self._failed = error
                raise

    def are_current(self) -> bool:
        """False when bpf_loader has made a map anew: the programs then read another than is written here."""
        return all(pinned.is_current() for pinned in self._maps.values())

    def memory_bytes(self) -> dict[str, int]:
        return {name: pinned.memory_bytes() for name, pinned in self._maps.items()}


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
