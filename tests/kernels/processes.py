"""The whole mesh, all processes of it, by the scenarios of `scenarios.yaml`: for an emulated machine.

    python -m tests.kernels.processes [--brief]

Prints one JSON line for each, as `dataplane` does for each look.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.chaos.play import play
from tests.chaos.scenario import read
from tests.kernels.dataplane import Look

SEED, RATE = 1, 1.0


def main() -> int:
    found, held = read(Path(__file__).with_name("scenarios.yaml")), True
    brief = "--brief" in sys.argv
    for scenario in (each for each in found.scenarios if not (brief and each.long)):
        outcome = play(scenario, found.traffic, SEED, RATE)
        told = f"yes, of {outcome.connections:,}" if outcome.ok else "; ".join(outcome.problems)
        print(json.dumps(Look(scenario.name, told, outcome.ok)._asdict()), flush=True)  # noqa: T201
        held &= outcome.ok
    return not held


if __name__ == "__main__":
    sys.exit(main())
