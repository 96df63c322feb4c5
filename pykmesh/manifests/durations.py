"""Durations as Istio's resources write them."""

from __future__ import annotations

import re
from typing import Final

_UNIT_S: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_PART: Final = r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(h|m(?!s)|s|ms|us|ns)"
_TEXT: Final = re.compile(f"(?:{_PART}){{1,6}}")
MAX_S: Final = 1e6 * 3600
"""A hundred years and more, which is below what Envoy takes."""
LEAST_S: Final = 1e-3


class GoDuration(str):
    """As Go reads it, of no sign: 1h30m, 1.5s, 100ms."""

    __slots__ = ()

    @property
    def seconds(self) -> float:
        return sum(float(count) * _UNIT_S[unit] for count, unit in re.findall(_PART, self))

    @property
    def as_proto(self) -> str:
        """As protobuf's JSON has it: 90.5s."""
        return f"{self.seconds:.9f}".rstrip("0").rstrip(".") + "s"


class PositiveDuration(GoDuration):
    """One of at least a millisecond."""

    __slots__ = ()


def check_duration(text: str) -> None:
    """ValueError for what is none, or too long."""
    if not _TEXT.fullmatch(text) or GoDuration(text).seconds > MAX_S:
        raise ValueError(text)


def check_positive_duration(text: str) -> None:
    check_duration(text)
    if GoDuration(text).seconds < LEAST_S:
        raise ValueError(text)
