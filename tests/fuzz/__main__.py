"""Looks for inputs that break what takes input from outside: `make fuzz`.

    python -m tests.fuzz [--seconds 60] [--only TARGET ...]

By atheris, which follows what code an input reaches, from the corpus that is kept. What breaks a target is
told, and lies in build/fuzz/; it and what reached other code join the corpus, which `make test` replays.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS

WORK: Final = Path(__file__).parents[2] / "build" / "fuzz"
KEPT: Final = 250
"""Inputs of a target, at most, but for those that broke it; the shortest ones."""
LIMITS: Final = ["-timeout=20", "-rss_limit_mb=2048", "-max_len=8192"]


def one(target: str, seconds: int) -> bool:
    """True where nothing broke it. The corpus grows by what reached code that nothing before it did."""
    directory = WORK / target
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    kept = corpus.read(target)
    for number, data in enumerate(kept):
        (directory / f"kept-{number}").write_bytes(data)
    words = [sys.executable, "-m", "tests.fuzz.instrumented", target, *LIMITS]
    words += [f"-max_total_time={seconds}", f"-artifact_prefix={WORK / target}-", str(directory)]
    done = subprocess.run(words, check=False)
    broken = [path.read_bytes() for path in WORK.glob(f"{target}-*")]
    new = sorted((path.read_bytes() for path in directory.iterdir()), key=len)
    corpus.write(target, [*kept, *broken, *new[: max(0, KEPT - len(kept))]])
    return not done.returncode


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--only", nargs="*", default=list(TARGETS))
    options = parser.parse_args()
    results = {target: one(target, options.seconds) for target in options.only}
    for target, holds in results.items():
        print(f"{target}: {'nothing found' if holds else 'BROKEN'}, {len(corpus.read(target))} inputs kept")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
