"""Fixtures of the control plane's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """Keeps one loop for all tests: gRPC has one queue a process, which may wake a loop that is closed."""
    yield  # noqa: PT022 (a generator's loop lives as long as the fixture)
