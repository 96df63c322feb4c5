"""Inputs that are kept: `corpus/<target>.txt` has one a line, in base64, the shortest first."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Final

DIRECTORY: Final = Path(__file__).with_name("corpus")


def read(target: str) -> list[bytes]:
    return [base64.b64decode(line) for line in _path(target).read_text().splitlines()]


def write(target: str, inputs: Iterable[bytes]) -> None:
    kept = sorted(set(inputs), key=lambda data: (len(data), data))
    _path(target).write_text("".join(f"{base64.b64encode(data).decode()}\n" for data in kept))


def _path(target: str) -> Path:
    return DIRECTORY / f"{target}.txt"
