"""The edge to the maps: reads what they hold, applies the steps of a plan in order."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pykmesh.kernel import pins
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import ENDPOINT_KEY
from services.map_writer.planner import Held, Limits, Step

NAMES: Final = ("services", "endpoints", "addresses")


class Maps:
    """The configuration maps of an instance. PinError when they are not there, or of another layout."""

    def __init__(self, pin_dir: Path) -> None:
        self._maps = {name: PinnedMap(pins.maps_dir(pin_dir), name) for name in NAMES}

    @property
    def limits(self) -> Limits:
        return Limits(*(self._maps[name].max_entries for name in Limits._fields))

    @property
    def key_bytes(self) -> dict[str, int]:
        return {name: pinned.layout.key_size for name, pinned in self._maps.items()}

    def read(self) -> Held:
        """Blocks for as long as the maps are large: for a thread."""
        held = Held()
        held.services.update(self._maps["services"].items())
        held.addresses.update(self._maps["addresses"].items())
        for key, value in self._maps["endpoints"].items():
            list_id, slot = ENDPOINT_KEY.unpack(key)
            held.add_endpoint(list_id, slot, value)
        return held

    def apply(self, steps: list[Step]) -> None:
        """Blocks. MapFullError or KernelError leaves later steps undone: read the maps again."""
        for step in steps:
            target = self._maps[step.map]
            if step.values:
                target.write(step.keys, step.values)
            else:
                target.erase(step.keys)

    def memory_bytes(self) -> dict[str, int]:
        return {name: pinned.memory_bytes() for name, pinned in self._maps.items()}

    def close(self) -> None:
        for pinned in self._maps.values():
            pinned.close()
