"""Every test runs on the real kernel, broker and gRPC, in namespaces and directories of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import AsyncIterator

import hypothesis
import pytest

from pykmesh.kernel.netns import CLONE_NEWNET

STEADY = "steady"
"""The same examples each time; `make explore` has others."""
hypothesis.settings.register_profile(STEADY, deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """Keeps one loop for all tests: gRPC has one queue a process, which may wake a loop that is closed."""
    yield  # noqa: PT022 (a generator's loop lives as long as the fixture)


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile(config.getoption("--hypothesis-profile") or STEADY)
    # What a shell starts in the background ignores it, and so does all that is started from there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "kernel: needs root, for maps and programs in the kernel")
    if hasattr(config, "workerinput") and os.geteuid() == 0:
        _own_network()


def _own_network() -> None:
    """Workers beside each other have the same addresses and free ports: each in a network of its own."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare of the network")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root: programs are loaded and namespaces made")
    for item in items:
        if "mesh" in getattr(item, "fixturenames", ()) or item.get_closest_marker("kernel"):
            item.add_marker(skip)
