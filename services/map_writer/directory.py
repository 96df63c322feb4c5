"""Services by hostname, for questions about names. Made at the first question, then kept right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pykmesh.contracts.address import Service
from services.map_writer.mesh import Mesh


class Directory:
    """Of one mesh at a time. Nearly every hostname is that of one service."""

    def __init__(self) -> None:
        self._mesh: Mesh | None = None
        self._names: dict[str, str | tuple[str, ...]] = {}

    def follow(self, mesh: Mesh, changed: Iterable[str]) -> None:
        """Takes what has changed since, if it was ever asked of this mesh."""
        if mesh is self._mesh:
            for name in changed:
                self._enter(mesh, name)

    def services(self, mesh: Mesh, hostname: str) -> Iterator[Service]:
        """Those of a hostname in lower case, from each namespace at most one."""
        if mesh is not self._mesh:
            self._mesh, self._names = mesh, {}
            for name in mesh.services:
                self._enter(mesh, name)
        names = self._names.get(hostname, ())
        for name in (names,) if isinstance(names, str) else names:
            if (service := mesh.services.get(name)) is not None:
                yield service

    def _enter(self, mesh: Mesh, name: str) -> None:
        hostname = name.partition("/")[2].lower()
        before = self._names.get(hostname)
        if name in mesh.services:
            if before is None:
                self._names[hostname] = name
            elif before != name:
                known = (before,) if isinstance(before, str) else before
                self._names[hostname] = tuple(dict.fromkeys((*known, name)))
        elif before == name:
            del self._names[hostname]
        elif isinstance(before, tuple):
            left = tuple(known for known in before if known != name)
            self._names[hostname] = left[0] if len(left) == 1 else left
