"""Scenarios as data: what runs, what breaks when, what must hold.

Where a number is given as a list of two, the scenario's seed draws one between them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import yaml

from tests.chaos.faults import Step
from tests.chaos.stage import Mesh, Traffic

PAUSE_MAX_MS: Final = 3000
"""Without an answer: what a client feels whose SYN was lost twice."""
FILE: Final = Path(__file__).with_name("scenarios.yaml")


class ScenarioError(Exception):
    """The file cannot be read; the text says what is wrong where."""


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    steps: list[Step]  # type: ignore[valid-type]  # a union of classes
    quick: bool = False
    """Part of `make test`."""
    long: bool = False
    """Only where it is asked for."""
    mesh: Mesh = Mesh()
    pause_max_ms: float = PAUSE_MAX_MS
    per_second: float = 0.0
    """Connections that have to be made."""
    traffic: list[Traffic] = []
    """Besides the usual."""


class Scenarios(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    traffic: list[Traffic]
    """The usual: of every scenario."""
    scenarios: list[Scenario]


def read(path: Path = FILE) -> Scenarios:
    try:
        found = msgspec.convert(yaml.safe_load(path.read_text()), Scenarios)
    except (OSError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ScenarioError(f"{path}: {error}") from error
    names = [scenario.name for scenario in found.scenarios]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ScenarioError(f"{path}: more than one scenario is called {', '.join(sorted(twice))}")
    return found
