"""`make bench`: every benchmark, one JSON line a result."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = (["bench.datapath"], ["bench.drain"], ["bench.sync"], ["bench.steady"], ["bench.waypoint"])


def main() -> None:
    for words in BENCHMARKS:
        print(f"# {' '.join(words)}", flush=True)
        subprocess.run([sys.executable, "-m", *words, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
