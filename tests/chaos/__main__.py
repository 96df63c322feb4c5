"""Breaks the mesh on purpose, in many ways, under traffic: `make chaos`.

    python -m tests.chaos [--quick | --long] [--only TEXT ...] [--seed N] [--rate R]
                          [--connections N] [--report FILE]

One row of a table for each scenario. With --connections the scenarios are played again with the next seeds
until so many connections were made. Exit status 1 where something did not hold; the seed plays it again.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import sys
from pathlib import Path

from tests.chaos.play import Outcome, play
from tests.chaos.scenario import read

COLUMNS = (
    "scenario", "seed", "connections", "a second", "requests", "failed", "wrong answers",
    "longest pause ms", "slowest ms", "entries wrong", "s", "holds",
)  # fmt: skip


def row(outcome: Outcome) -> list[str]:
    return [
        outcome.name, str(outcome.seed), str(outcome.connections), f"{outcome.per_second:.0f}",
        str(outcome.requests), str(outcome.failed), str(outcome.wrong), f"{outcome.longest_pause_ms:.0f}",
        f"{outcome.slowest_ms:.0f}", str(outcome.entries_wrong), f"{outcome.seconds:.0f}",
        "yes" if outcome.ok else "NO",
    ]  # fmt: skip


def table(outcomes: list[Outcome], words: list[str]) -> str:
    """The report, as Markdown."""
    made, failed = sum(each.connections for each in outcomes), sum(each.failed for each in outcomes)
    wrong = sum(each.wrong + each.entries_wrong for each in outcomes)
    bad, release = sum(not each.ok for each in outcomes), platform.release().partition("-")[0]
    lines = [
        "# Faults under traffic",
        "",
        f"`python -m tests.chaos {shlex.join(words)}`, Linux {release}, {os.cpu_count()} processors:",
        f"{len(outcomes)} scenarios, {made:,} connections, {failed} failed, {wrong} wrong answers or",
        f"entries, {bad} scenarios that did not hold.",
        "",
        "What each is: `tests/chaos/scenarios.yaml`. A connection has ended, or stays open; the",
        "longest pause is that without an answer for one client, the slowest from the begin of a connection",
        "(of one that stays: a request) to its answer. An answer is wrong that is of an endpoint which did",
        "not serve, nor was to by a change under way; connections that stay or go by way of a waypoint are",
        "not judged so. Entries are those of the maps that the configuration is in.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(row(each))} |" for each in outcomes),
    ]
    for each in outcomes:
        if not each.ok:
            lines += ["", f"**{each.name}** (seed {each.seed}):", *(f"- {what}" for what in each.problems)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="only those of make test")
    parser.add_argument("--long", action="store_true", help="also those that take very long")
    parser.add_argument("--only", nargs="*", default=[""], help="only those whose names have one of these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--rate", type=float, default=1.0, help="times a thousand connections a second and family"
    )
    parser.add_argument("--connections", type=int, default=0, help="again, until so many were made")
    parser.add_argument("--report", type=Path, help="where the table goes as Markdown")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleaning up all the same
    found = read()
    chosen = [
        each
        for each in found.scenarios
        if any(one in each.name for one in options.only)
        and (each.quick or not options.quick)
        and (options.long or not each.long)
    ]
    outcomes: list[Outcome] = []
    seed = options.seed
    print("  ".join(COLUMNS), flush=True)
    while chosen and (not outcomes or sum(each.connections for each in outcomes) < options.connections):
        for scenario in chosen:
            outcomes.append(play(scenario, found.traffic, seed, options.rate))
            print("  ".join(row(outcomes[-1])), flush=True)
            for problem in outcomes[-1].problems:
                print(f"    {problem}", flush=True)
        seed += 1
    if options.report:
        options.report.write_text(table(outcomes, sys.argv[1:]))
    return 0 if outcomes and all(each.ok for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
