"""The resources of one moment, serialized, and what a client lacks that holds those of an earlier one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from pykmesh.proto import workload_pb2 as wire

_VERSION_BYTES = 8


class Entry(msgspec.Struct, frozen=True):
    """One resource. The digest is a hash of the content, so it is equal across restarts."""

    body: bytes
    digest: str


class Delta(msgspec.Struct, frozen=True):
    """Names of the resources to send, and of those that are gone."""

    changed: tuple[str, ...]
    removed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All resources of a type by name. Never changed, so it can be kept as what a client has."""

    version: str = ""
    entries: Mapping[str, Entry] = {}
    says_versions: bool = True

    @classmethod
    def of(cls, resources: Mapping[str, wire.Address], *, version: str, says_versions: bool) -> Snapshot:
        bodies = {name: address.SerializeToString(deterministic=True) for name, address in resources.items()}
        entries = {name: Entry(body, _digest(body)) for name, body in bodies.items()}
        return cls(version=version, entries=entries, says_versions=says_versions)

    def version_of(self, name: str) -> str:
        """The version of a resource as it is said to clients."""
        return self.entries[name].digest if self.says_versions else ""

    def since(self, held: Snapshot) -> Delta:
        """For a client that holds exactly an earlier snapshot."""
        before = held.entries
        changed = (
            name
            for name, entry in self.entries.items()
            if name not in before or before[name].digest != entry.digest
        )
        return Delta(tuple(changed), tuple(before.keys() - self.entries.keys()))

    def since_versions(self, held: Mapping[str, str]) -> Delta:
        """For a client that names what it holds, each with the version it came with; "" matches nothing."""
        changed = (
            name for name in self.entries if not self.says_versions or held.get(name) != self.version_of(name)
        )
        return Delta(tuple(changed), tuple(held.keys() - self.entries.keys()))


def _digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=_VERSION_BYTES).hexdigest()
