"""Routes and VirtualServices as they were when they were last right: what counts while they are wrong.

Kept in a file, so that they count for who comes after this process, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from pykmesh.files import write_whole
from pykmesh.manifests.addresses import parse_text
from pykmesh.manifests.objects import ObjectRef
from services.waypoint_mgr.source import Route, Virtual

log = structlog.get_logger(__name__)

FILE: Final = "last_good.json"


class _Kept(msgspec.Struct, frozen=True):
    """A waypoint's."""

    routes: list[Route]
    virtuals: list[Virtual]

    @classmethod
    def of(cls, found: Iterable[Route | Virtual]) -> _Kept:
        said = list(found)
        return cls([r for r in said if isinstance(r, Route)], [v for v in said if isinstance(v, Virtual)])

    @property
    def by_ref(self) -> dict[ObjectRef, Route | Virtual]:
        return {**{each.ref: each for each in self.routes}, **{each.ref: each for each in self.virtuals}}


class LastGood:
    """By waypoint. A file that cannot be read is as none: what was right is not known then.

    `note` and `keep` take turns; `of` may be asked in other threads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_written = True
        self._found: dict[str, dict[ObjectRef, Route | Virtual]] = {}
        try:
            kept = msgspec.json.decode(path.read_bytes(), type=dict[str, _Kept], dec_hook=parse_text)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, RecursionError) as error:
            log.warning("last_good_not_read", path=str(path), error=str(error))
            return
        self._found = {name: one.by_ref for name, one in kept.items()}

    def of(self, waypoint: str) -> Mapping[ObjectRef, Route | Virtual]:
        return self._found.get(waypoint, {})

    def note(self, waypoint: str, good: Mapping[ObjectRef, Route | Virtual]) -> None:
        self._is_written = self._is_written and self._found.get(waypoint) == good
        self._found[waypoint] = dict(good)

    def is_due(self, waypoints: Collection[str]) -> bool:
        """Something is to be kept that is not."""
        return not self._is_written or not self._found.keys() <= {*waypoints}

    def keep(self, waypoints: Collection[str]) -> None:
        """Forgets all others, and writes what is new. OSError."""
        for name in self._found.keys() - waypoints:
            del self._found[name]
            self._is_written = False
        if not self._is_written:
            kept = {name: _Kept.of(one.values()) for name, one in self._found.items()}
            write_whole(self._path, msgspec.json.encode(kept, enc_hook=str))
            self._is_written = True
