"""Files that others read while they are written, and locks on files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """There at once and whole, or as it was before. OSError, and nothing is left beside it."""
    temporary = temporary_of(path)
    try:
        opened = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(opened, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def temporary_of(path: Path) -> Path:
    """What whoever is ended in the midst leaves: no folder of manifests reads it."""
    return path.with_name(f".{path.name}.new")


def lock_holder(lock: Path) -> int:
    """Who has locked a file; 0 where that cannot be told."""
    found = lock.stat()
    where = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        _, kind, *_, pid, place, _, _ = line.split()
        if (kind, place) == ("FLOCK", where):
            return int(pid)
    return 0
