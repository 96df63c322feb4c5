from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.telemetry.kernel import Instance, compile_emitter, instance

SMALL_RING_BYTES = 64 * 1024
RING_BYTES = 16 * 1024 * 1024


@pytest.fixture(scope="session")
def emitter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid():
        pytest.skip("needs root: maps are pinned and a program is loaded")
    return compile_emitter(tmp_path_factory.mktemp("emitter"))


@pytest.fixture
def small(tmp_path: Path, emitter: Path) -> Iterator[Instance]:
    """An instance whose ring holds 481 records."""
    with instance(tmp_path, emitter, SMALL_RING_BYTES) as found:
        yield found


@pytest.fixture
def node(tmp_path: Path, emitter: Path) -> Iterator[Instance]:
    """An instance with a ring of the usual size."""
    with instance(tmp_path, emitter, RING_BYTES) as found:
        yield found
