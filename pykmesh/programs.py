"""Programs that come as packages on a development node, and from elsewhere in a deployment."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def find(name: str) -> Path | None:
    """The one beside this Python, else the one on the PATH."""
    beside = Path(sys.prefix) / "bin" / name
    found = beside if beside.exists() else shutil.which(name)
    return Path(found) if found else None
