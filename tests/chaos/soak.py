"""Change for a long time: does memory grow, does an entry stay? `make soak`.

    python -m tests.chaos.soak [--minutes 60] [--seed 1] [--rate 0.2] [--report FILE]

Endpoints, services and pods come and go under traffic, through a waypoint too, and names are asked for. In
the first third processes are killed too, and the mesh is upgraded to a release with other maps and back; in
the second half each one's memory and descriptors are sampled, and how many entries each map has between two
rounds. Memory is what it has made itself (RssAnon; what forks still share counts in each): its part of
files depends on who else has them open. Exit status 1 where a process has grown (the last third of its
samples against the first: the median of its memory by more than a tenth and 4 MiB, the least of its
descriptors, since a pod on its way out has some, by more than four; or its memory grows on and on: from the
second third to the last by more than 1 MiB and a fiftieth, and by more than half of what it was from the
first to the second), a map has grown (by more than a tenth and 64 entries), a process was started again that
nobody had killed, a connection failed, an answer was wrong, or the maps of configuration hold in the end
what they did not in the beginning.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from pykmesh.kernel import pins
from pykmesh.kernel.maps import PinnedMap
from pykmesh.node.ask import supervised
from tests.chaos.faults import Bystander, Kill, Resolves, Scale, Services, Upgrade
from tests.chaos.play import judged
from tests.chaos.scenario import read
from tests.chaos.stage import Mesh, Stage, stage

MAPS: Final = (
    "services", "endpoints", "addresses", "ranges", "pods", "identities", "identity_secrets", "affinities",
    "loads",
)  # fmt: skip
OTHER_MAPS: Final = ("opens", "shunned", "handoffs", "dns_listeners", "dns_servers")
"""Between two rounds something is always in them. Not `datagrams`, which is left to become full."""
PROCESSES: Final = ["bpf_loader", "map_writer", "xds_client", "telemetry", "nats", "control_plane"]
GOES: Final = ("cgroup", "namespace", "both", "unenrolled")
SAMPLE_S: Final = 2.0
KILL_S: Final = 15.0
UPGRADE_S: Final = 45.0
GROWN, GROWN_MIB = 1.1, 4.0
GROWS_ON, GROWS_ON_MIB = 1.02, 1.0
GROWN_DESCRIPTORS = 4
GROWN_ENTRIES = 64
SETTLES_S: Final = 30.0


def entries(found: Stage, names: tuple[str, ...] = MAPS) -> dict[str, int]:
    counts = {}
    for name in names:
        with PinnedMap(pins.maps_dir(found.node.pin_dir), name) as pinned:
            counts[name] = len(pinned)
    return counts


def change(found: Stage) -> None:
    """One round of it, drawn."""
    chance = found.chance
    Scale(to=(1, 4)).act(found)
    Services(count=chance.randint(1, 60), pods=chance.randint(1, 4)).act(found)
    if chance.random() < 0.3:
        Bystander(goes=chance.choice(GOES)).act(found)
    if chance.random() < 0.2:
        Resolves(name="web.shop.svc.cluster.local", address="10.96.0.10").act(found)
    Scale(to=(1, 4), now=False).act(found)
    Services(count=0).act(found)


def there_and_back(found: Stage) -> None:
    """To a release whose maps differ, and from it, while endpoints change."""
    for release in ("other", "this"):
        Scale(to=(1, 4), now=False).act(found)
        Upgrade(to=release).act(found)
    found.settled()


def anonymous_mib(pid: int) -> float:
    """Raises OSError when there is no such process any more."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if not found:
        raise ProcessLookupError(pid)
    return int(found[1]) / 1024


class Samples:
    """By process: of its memory in MiB, and of how many descriptors it has. By map: of its entries."""

    def __init__(self) -> None:
        self.memory: dict[str, list[float]] = {}
        self.descriptors: dict[str, list[float]] = {}
        self.entries: dict[str, list[float]] = {}

    def take(self, found: Stage) -> None:
        pids = {found.node.instance.pid: "supervisor", found.node.fork_server(): "fork_server"}
        pids |= {each["pid"]: "envoy" for each in found.instances()[:1]}
        for pid, name in {**pids, **found.node.children()}.items():
            with contextlib.suppress(OSError):  # it was killed just now
                self.descriptors.setdefault(name, []).append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
                self.memory.setdefault(name, []).append(anonymous_mib(pid))
        for name, count in entries(found, MAPS + OTHER_MAPS).items():
            self.entries.setdefault(name, []).append(count)


def restarts(found: Stage) -> dict[str, int]:
    """By process."""
    return {name: each["restarts"] or 0 for name, each in supervised(found.node.instance).items()}


def thirds(
    taken: dict[str, list[float]], one_of: Callable[[list[float]], float] = statistics.median
) -> dict[str, list[float]]:
    """Of each process, or map: one for each third of its samples."""
    found = {}
    for name, samples in taken.items():
        third = max(1, len(samples) // 3)
        parts = samples[:third], samples[third : 2 * third] or samples, samples[-third:]
        found[name] = [round(one_of(part), 1) for part in parts]
    return found


def grown(sizes: dict[str, list[float]]) -> Iterator[str]:
    for name, (first, second, last) in sizes.items():
        on = last - second
        grows_on = on > GROWS_ON_MIB and last > second * GROWS_ON and on > (second - first) / 2
        if (last > first * GROWN and last > first + GROWN_MIB) or grows_on:
            yield f"{name} has grown from {first} to {second} and {last} MiB"


def as_before(found: Stage, before: dict[str, int]) -> dict[str, list[int]]:
    """Maps that hold another number of entries than in the beginning, once all is as it was then."""
    found.scale([each.name for each in found.web])
    found.settled()
    end = time.monotonic() + SETTLES_S
    while True:
        now = entries(found)
        differ = {name: [before[name], now[name]] for name in MAPS if now[name] != before[name]}
        if not differ or time.monotonic() > end:
            return differ
        time.sleep(1)


def soak(minutes: float, seed: int, rate: float) -> dict[str, Any]:
    chance = random.Random(seed)
    with stage(Mesh(waypoint=True, options=["--dns"]), chance, rate) as found:
        for each in read().traffic:
            found.begin(each)
        before, began = entries(found), time.monotonic()
        third, half, end = (began + minutes * 60 * share for share in (1 / 3, 1 / 2, 1))
        samples, problems, started = Samples(), list[str](), dict[str, int]()
        rounds = kills = upgrades = 0
        killed = upgraded = sampled = began
        try:
            while (now := time.monotonic()) < end:
                change(found)
                rounds += 1
                if now < third and now - killed > KILL_S:
                    Kill(process=PROCESSES).act(found)
                    found.settled()  # who enrols while bpf_loader is away is told so
                    killed, kills = now, kills + 1
                if now < third and now - upgraded > UPGRADE_S:
                    there_and_back(found)
                    upgraded, upgrades = now, upgrades + 2
                if now >= half and not started:
                    started = restarts(found)
                if now >= half and now - sampled > SAMPLE_S:
                    samples.take(found)
                    sampled = now
            left = as_before(found, before)
            problems += [
                f"{name} was started again {is_ - started[name]} times"
                for name, is_ in restarts(found).items()
                if is_ != started.get(name)
            ]
            problems += [
                f"map {name}: {was} entries before, {is_} after" for name, (was, is_) in left.items()
            ]
        except Exception as error:  # noqa: BLE001  (what was seen until then is told all the same)
            problems.append(f"round {rounds}: {type(error).__name__}: {error}")
        counts, _, more = judged(found)
        problems += more
        if not samples.memory:
            problems.append("nothing was sampled: that needs more minutes")
        sizes, descriptors = thirds(samples.memory), thirds(samples.descriptors, min)
        filled = thirds(samples.entries)
        problems += grown(sizes)
        problems += [
            f"{name} had {first:g} descriptors at least, then {last:g}"
            for name, (first, _, last) in descriptors.items()
            if last > first + GROWN_DESCRIPTORS
        ]
        problems += [
            f"map {name} had {first:g} entries, then {last:g}"
            for name, (first, _, last) in filled.items()
            if last > first * GROWN + GROWN_ENTRIES
        ]
        return {
            "minutes": minutes, "seed": seed, "rounds": rounds, "kills": kills, "upgrades": upgrades,
            "connections": counts.connections, "failed": counts.failed, "wrong": found.wrong,
            "anon_mib": sizes, "descriptors": descriptors, "entries": filled, "problems": problems,
        }  # fmt: skip


def table(found: dict[str, Any], words: list[str]) -> str:
    """The report, as Markdown."""
    rows = []
    for name, sizes in found["anon_mib"].items():
        taken = (", ".join(f"{size:g}" for size in each) for each in (sizes, found["descriptors"][name]))
        rows.append(f"| {name} | {' | '.join(taken)} |")
    lines = [
        "# Change for a long time",
        "",
        f"`python -m tests.chaos.soak {shlex.join(words)}`: {found['rounds']:,} rounds of change,",
        f"{found['kills']} processes killed and {found['upgrades']} upgrades (both in the first third),",
        f"{found['connections']:,} connections, {found['failed']} failed, {found['wrong']} wrong answers.",
        "In the three thirds of the second half:",
        "",
        "| process | memory of its own, MiB | descriptors |",
        "|---|---|---|",
        *rows,
        "",
        "| map | entries between two rounds |",
        "|---|---|",
        *(f"| {name} | {', '.join(f'{n:g}' for n in each)} |" for name, each in found["entries"].items()),
        "",
        *([f"- {problem}" for problem in found["problems"]] or ["Everything held."]),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--report", type=Path, help="where what came of it goes as Markdown")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleaning up all the same
    found = soak(options.minutes, options.seed, options.rate)
    print(json.dumps(found))
    if options.report:
        options.report.write_text(table(found, sys.argv[1:]))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
