"""One target under atheris: `python -m tests.fuzz.instrumented TARGET` and libFuzzer's words."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["pykmesh", "services"]):
    from tests.fuzz.targets import TARGETS, quiet

if __name__ == "__main__":
    with quiet():
        atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
        atheris.Fuzz()
