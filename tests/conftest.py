"""Every test runs on the real kernel, broker and gRPC, in namespaces and directories of its own."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root: programs are loaded and namespaces made")
    for item in items:
        if "mesh" in getattr(item, "fixturenames", ()) or item.get_closest_marker("kernel"):
            item.add_marker(skip)
