"""Files of certificates that DestinationRules name (`caCertificates`), and the system's: read as they change.

What was good and cannot be read any more stays good; what never was is an error of that file alone.
"""

from __future__ import annotations

import math
import os
import ssl
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import structlog

from services.waypoint_mgr.tls import Roots

log = structlog.get_logger(__name__)

LOOK_S: Final = 2.0
BYTES_MAX: Final = 1 << 20


class RootFiles:
    """`roots` is what they hold now."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.roots = Roots()
        self._changed = changed
        self._wanted: frozenset[str] = frozenset()
        self._asked = anyio.Event()

    def want(self, paths: Iterable[str]) -> None:
        """These, and no others."""
        self._wanted = frozenset(paths)
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with anyio.move_on_after(LOOK_S if self._wanted else math.inf):
                await self._asked.wait()
            self._asked = anyio.Event()
            before = self.roots
            found = await anyio.to_thread.run_sync(_read, self._wanted, before)
            if found == before:
                continue
            for path, why in found.errors.items():
                if before.errors.get(path) != why:
                    log.warning("roots_not_read", path=path, error=why)
            self.roots = found
            self._changed()


def _read(paths: frozenset[str], before: Roots) -> Roots:
    found, errors = dict[str, str](), dict[str, str]()
    for path in sorted(paths):
        try:
            found[path] = _certificates(Path(path), before.found.get(path))
        except (OSError, ValueError) as error:
            errors[path] = f"{path}: {getattr(error, 'strerror', '') or error}"
            if path in before.found:
                found[path] = before.found[path]
    return Roots(found, errors)


def _certificates(path: Path, known: str | None) -> str:
    """ValueError for what is no PEM with certificates, OSError for what cannot be read."""
    # A FIFO would be waited for: whoever may say a path would end all reading.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("no regular file")
        data = file.read(BYTES_MAX + 1)
    if len(data) > BYTES_MAX:
        raise ValueError(f"more than {BYTES_MAX} bytes")
    text = data.decode()
    if text == known:
        return known
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except ssl.SSLError as error:
        raise ValueError("no certificates in PEM") from error
    return text
