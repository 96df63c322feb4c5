from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pykmesh.kernel.layout import HandoffPrefix

from .backends import Backend, serving

BACKENDS = ("own", "v1", "v2", "mirror")


@pytest.fixture(scope="session")
def backends() -> Iterator[dict[str, Backend]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(serving(name)) for name in BACKENDS}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A path short enough for sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="wp-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session", autouse=True)
def told_addresses() -> Iterator[None]:
    """All that a waypoint may be told are addresses of this network namespace."""
    if os.geteuid() != 0:
        pytest.skip("needs root: addresses are made")
    routes = [f"{prefix:x}::/16" for prefix in HandoffPrefix]
    for route in routes:
        subprocess.run(["ip", "-6", "route", "replace", "local", route, "dev", "lo"], check=True)
    yield
    for route in routes:
        subprocess.run(
            ["ip", "-6", "route", "del", "local", route, "dev", "lo"], check=False, capture_output=True
        )
