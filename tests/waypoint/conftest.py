from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

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
