"""Pods replaced for minutes: does memory grow, is an entry left over, how long does a push take?

    python -m bench.churn [--services 10000] [--pods 10] [--rate 100] [--minutes 10]

Pushes as in `bench.sync`, each timed from its sending to its answer, which waits for the kernel. Memory: Pss
of each process, sampled; growth is the last quarter's median over the second's (the first warms up). In the
end `pykmesh diff` compares what was said, what is desired and what the kernel holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from bench.sync import cpu_s, pss_mib, spread, warm_node

SAMPLE_S = 5.0


def churn(services: int, pods: int, rate: float, minutes: float) -> dict[str, Any]:
    with warm_node(services, pods) as (plane, node):
        plane.tell(mesh=True)
        plane.until_acked("mesh")
        children = node.children()
        before, start = cpu_s(list(children)), time.monotonic()
        taken: list[float] = []
        memory: dict[str, list[float]] = {name: [] for name in children.values()}
        next_sample = start
        while (now := time.monotonic()) < start + minutes * 60:
            if now >= next_sample:
                next_sample += SAMPLE_S
                for pid, name in children.items():
                    memory[name].append(pss_mib([pid]))
            delay = start + len(taken) / rate - now
            if delay > 0:
                time.sleep(delay)
            plane.tell(replace=len(taken))
            taken.append(plane.until_acked(f"push-{len(taken) + 1}"))
        took_s = time.monotonic() - start
        difference = node.cli("diff", check=False)
        return {
            "services": services, "workloads": services * pods, "minutes": round(took_s / 60, 1),
            "push": spread(taken), "rate": round(len(taken) / took_s, 1),
            "cpu_percent": round((cpu_s(list(children)) - before) / took_s * 100, 1),
            "pss_mib": {name: _quarters(found) for name, found in memory.items()},
            "restarts": len(set(node.children()) - set(children)),
            "diff": difference.stdout.strip().splitlines()[-1],
        }  # fmt: skip


def _quarters(samples: list[float]) -> dict[str, float]:
    quarter = max(1, len(samples) // 4)
    second, last = (statistics.median(samples[n * quarter : (n + 1) * quarter]) for n in (1, 3))
    return {
        "second_quarter": round(second, 1),
        "last_quarter": round(last, 1),
        "growth": round(last / second, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--pods", type=int, default=10)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    print(json.dumps(churn(arguments.services, arguments.pods, arguments.rate, arguments.minutes)))


if __name__ == "__main__":
    main()
