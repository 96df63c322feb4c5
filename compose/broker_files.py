"""Makes the broker's configuration and the passwords that it asks for, each readable by its reader alone.

    <directory>/nats/nats.conf        listens on loopback; a user with permissions for each process
    <directory>/<process>/password

A password that is there stays; the configuration is written anew from them. Files belong to root and
to the reader's group: `broker_files.py DIRECTORY [PORT]`, as root (or for oneself, as anybody).
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path

from pykmesh.node.broker import PERMISSIONS, configuration
from pykmesh.node.instance import Ports

NOBODY, ROOT = 65534, 0
READERS = {**dict.fromkeys(PERMISSIONS, ROOT), "nats": NOBODY, "xds_client": NOBODY}
"""The group that each runs in (compose.yaml)."""


def make(directory: Path, port: int) -> None:
    """Raises OSError."""
    passwords = {name: _password(directory / name / "password", READERS[name]) for name in PERMISSIONS}
    text = json.dumps(configuration("127.0.0.1", port, passwords), indent=1)
    _write(directory / "nats" / "nats.conf", text, READERS["nats"])


def _password(path: Path, group: int) -> str:
    if not path.exists():
        _write(path, secrets.token_urlsafe(24), group)
    return path.read_text()


def _write(path: Path, text: str, group: int) -> None:
    """There at once and whole; never readable by others, not for a moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        if os.geteuid() == ROOT and group != ROOT:
            os.fchown(fd, ROOT, group)
            os.fchmod(fd, 0o440)
    temporary.rename(path)


if __name__ == "__main__":
    try:
        make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else Ports().nats)
    except (IndexError, ValueError):
        sys.exit("usage: broker_files.py DIRECTORY [PORT]")
    except OSError as error:
        sys.exit(f"broker files: {error}")
