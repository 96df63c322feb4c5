"""The resources that were accepted, as the bytes that came, and the log of their changes.

Pure. `epoch` is new with each start; `seq` counts the batches that were published in it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Final, NamedTuple

import msgspec

from pykmesh.contracts.messages import BATCH_BYTES, VERSION, ConfigBatch, Resource, ResourceType, SnapshotPage

SNAPSHOTS_KEPT = 8
NOTHING: Final[list[str]] = []


class Held(msgspec.Struct, frozen=True, gc=False):
    """`version` as the control plane gave it, "" when the resource was not accepted in full."""

    version: str
    value: bytes


class Store:
    """Everything by type and name."""

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(8)
        self.seq = 0
        self.answered: set[ResourceType] = set()
        self.in_response = False
        """Part of a response is stored and its last batch not numbered: a snapshot is not whole."""
        self.was_asked_in_response = False
        """Who took such a snapshot waits for a last batch, also of a response that says nothing new."""
        self.held: dict[ResourceType, dict[str, Held]] = {kind: {} for kind in ResourceType}
        self.rejected: dict[ResourceType, dict[str, str]] = {kind: {} for kind in ResourceType}
        """What the control plane said last of a name and was not accepted, and why."""
        self._snapshots: dict[str, _Snapshot] = {}

    @property
    def synced(self) -> bool:
        """The control plane has sent its state of every type since the epoch began."""
        return len(self.answered) == len(self.held)

    def versions(self, kind: ResourceType) -> dict[str, str]:
        """What a new stream tells the control plane that it still has."""
        return {name: held.version for name, held in self.held[kind].items()}

    def remove(self, kind: ResourceType, names: Iterable[str]) -> list[str]:
        """Returns those that were held, or rejected (map_writer may have them of an epoch before).

        The control plane also removes what it never sent.
        """
        held, rejected = self.held[kind], self.rejected[kind]
        return [name for name in names if held.pop(name, None) is not None or name in rejected]

    def put(self, kind: ResourceType, upserts: list[tuple[str, Held]]) -> list[Resource]:
        """Returns what is new or differs: resources often come again unchanged."""
        held, changed = self.held[kind], []
        for name, new in upserts:
            before = held.get(name)
            held[name] = new
            if before is None or before.value != new.value:
                changed.append(Resource(name, new.value))
        return changed

    def note_rejected(
        self, kind: ResourceType, named: Iterable[str], rejected: dict[str, str], *, is_all: bool
    ) -> None:
        """`named`: what a response spoke of, of which all that is not rejected is good, or gone.

        `is_all`: what it does not speak of is no more as it was when rejected.
        """
        before = self.rejected[kind]
        if is_all:
            before.clear()
        for name in before.keys() & named if before else ():
            del before[name]
        before.update(rejected)

    def forget_version(self, kind: ResourceType, name: str) -> None:
        """For a resource that the node could not hold: the control plane shall send it again."""
        if (held := self.held[kind].get(name)) is not None:
            self.held[kind][name] = Held("", held.value)

    def batch(
        self,
        kind: ResourceType,
        removed: list[str],
        changed: list[Resource],
        *,
        complete: bool,
        rejected: list[str] = NOTHING,
    ) -> ConfigBatch:
        """The log's next batch; `complete` marks the last one of a response."""
        self.seq += 1
        return ConfigBatch(
            VERSION, self.epoch, self.seq, kind, removed, changed, complete, self.synced, rejected
        )

    def heartbeat(self) -> ConfigBatch:
        return ConfigBatch(
            VERSION, self.epoch, self.seq, ResourceType.ADDRESS, [], [], complete=False, synced=self.synced
        )

    def snapshot(self, cursor: str) -> SnapshotPage | None:
        """A page of everything as it was when the first page was asked for, at its `seq`.

        None for a cursor that is not known any more: the reader starts again. A cursor is
        `<snapshot>.<page>`.
        """
        if not cursor:
            cursor = f"{self._open_snapshot()}.0"
        name, _, number = cursor.partition(".")
        found = self._snapshots.get(name)
        if found is None or not number.isdigit() or int(number) >= len(found.pages):
            return None
        index = int(number)
        page = found.pages[index]
        last = index + 1 == len(found.pages)
        if last:
            del self._snapshots[name]
        return SnapshotPage(
            version=VERSION,
            epoch=self.epoch,
            seq=found.seq,
            synced=found.synced,
            type=page.type,
            resources=[Resource(name, held.value) for name, held in page.resources],
            next_cursor="" if last else f"{name}.{index + 1}",
            rejected=page.rejected,
        )

    def _open_snapshot(self) -> str:
        """What is held never changes, it is replaced: the snapshot names what there is now."""
        self.was_asked_in_response |= self.in_response
        found = _Snapshot(self.seq, self.synced and not self.in_response, [])
        for kind, held in self.held.items():
            sized = ((name, len(name) + len(resource.value)) for name, resource in held.items())
            refused = pages((name, len(name)) for name in self.rejected[kind])
            for names, rejected in zip_longest(pages(sized), refused, fillvalue=NOTHING):
                found.pages.append(_Page(kind, [(name, held[name]) for name in names], rejected))
        name = secrets.token_hex(4)
        self._snapshots[name] = found
        while len(self._snapshots) > SNAPSHOTS_KEPT:
            del self._snapshots[next(iter(self._snapshots))]
        return name


class _Page(NamedTuple):
    type: ResourceType
    resources: list[tuple[str, Held]]
    rejected: list[str]


class _Snapshot(NamedTuple):
    seq: int
    synced: bool
    pages: list[_Page]


def pages(sized: Iterable[tuple[str, int]]) -> Iterator[list[str]]:
    """Names in lists of about `BATCH_BYTES` of what they stand for; the last one, at least, always comes."""
    names: list[str] = []
    size = 0
    for name, length in sized:
        if size >= BATCH_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += length
    yield names
