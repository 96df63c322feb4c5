"""Durations as Istio's resources write them."""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

GoDuration = Annotated[str, msgspec.Meta(pattern=r"^([0-9]+(\.[0-9]+)?(h|m|s|ms|us|ns))+\Z", max_length=64)]
"""As Go reads it, of no sign: 1h30m, 1.5s, 100ms."""

_UNIT_S: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def seconds_of(text: str) -> float:
    """Of a GoDuration."""
    found = re.findall(r"([0-9.]+)(ms|us|ns|h|m|s)", text)
    return sum(float(count) * _UNIT_S[unit] for count, unit in found)


def proto_duration(text: str) -> str:
    """A GoDuration as protobuf's JSON has it: 90.5s."""
    return f"{seconds_of(text):.9f}".rstrip("0").rstrip(".") + "s"
