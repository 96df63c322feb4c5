"""When to come back to the control plane after a stream has ended. Pure, but for its clock and dice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

BACKOFF_FIRST_S: Final = 0.01
BACKOFF_MAX_S: Final = 15.0
BUDGET: Final = 10
BUDGET_PER_S: Final = 1.0


def _jitter() -> float:
    """Keeps a fleet from coming back at once; not for secrets."""
    return random.uniform(0.5, 1.0)  # noqa: S311


class Pace:
    """A back-off that doubles, and a small budget of quick returns that refills with time.

    A stream that brought a response which was understood may be followed by another soon, at once when its
    end was ordinary: that costs one of the budget. Without budget, and after a stream that brought nothing,
    the back-off counts. Only what was understood resets it, while there is half of the budget: a control
    plane that ends every stream is asked less and less often, like one that is not there.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = _jitter
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._backoff_s = BACKOFF_FIRST_S
        self._budget = float(BUDGET)
        self._refilled = clock()

    def pause_s(self, *, understood: bool, ordinary: bool) -> float:
        """How long to wait after a stream, by what it brought and how it ended."""
        self._refill()
        if understood and self._budget >= BUDGET / 2:
            self._backoff_s = BACKOFF_FIRST_S
        if understood and self._budget >= 1:
            self._budget -= 1
            return 0.0 if ordinary else BACKOFF_FIRST_S * self._jitter()
        pause_s = self._backoff_s * self._jitter()
        self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S)
        return pause_s

    def _refill(self) -> None:
        now = self._clock()
        self._budget = min(self._budget + (now - self._refilled) * BUDGET_PER_S, BUDGET)
        self._refilled = now
