"""Waiting for what another thread, process or the kernel does: with a deadline, and saying for what."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import anyio

T = TypeVar("T")
DEADLINE_S = 20.0
POLL_S = 0.01


async def until(what: str, look: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """What `look` returns once it is true."""
    end = time.monotonic() + deadline_s
    while not (found := look()):
        assert time.monotonic() < end, f"no {what} after {deadline_s} s"
        await anyio.sleep(POLL_S)
    return found
