"""How long a mesh takes from the control plane's hand to the kernel, and what it costs in memory.

    python -m bench.sync [--services 10000] [--pods 10] [--kind plain|policy|near|dual] [--rounds 3]

sync: the response handed to gRPC until the control plane reads the answer, which waits for the last
map write; the processes are warm and hold nothing before. floor: parsing the same response and each
address in it, in one process of the same run. push: one change, from sent to seen in the kernel's map
(looked at each 50 us), and to answered; paced: the same at a rate. Memory: Pss of all processes, the
maps' own, and what was resident at the most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import meshes
from pykmesh.kernel import pins
from pykmesh.kernel.maps import PinnedMap
from tests.mesh.node import Node

POLL_S = 50e-6
DEFAULT_ROOM = 250_000
"""Pods for which the maps' default sizes do."""


class ControlPlane:
    def __init__(self, services: int, pods: int, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.control_plane", str(services), str(pods), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.last_sent = 0.0
        started = self.read()
        self.port, self.bytes, self.floor_ms = started["port"], started["bytes"], started["floor_ms"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def until_acked(self, nonce: str) -> float:
        """Milliseconds from sent to answered."""
        while True:
            found = self.read()
            if found.get("nonce") == nonce:
                assert not found["error"], found["error"]
                self.last_sent = float(found["sent"])
                return float(found["acked"] - found["sent"]) * 1e3

    def tell(self, **command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def pss_mib(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def peak_mib(pids: list[int]) -> float:
    """The most that each process ever had resident, summed: an upper bound of the whole."""
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/status").read_text()
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM:"))
    return total / 1024


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def spread(values: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(statistics.median(values), 3),
        "p99_ms": round(percentile(values, 0.99), 3),
        "max_ms": round(max(values), 3),
        "count": len(values),
    }


def cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


@contextlib.contextmanager
def warm_node(services: int, pods: int, kind: str = "plain") -> Iterator[tuple[ControlPlane, Node]]:
    """A mesh that is up and holds nothing yet, and the control plane that will give it this much."""
    with tempfile.TemporaryDirectory() as directory:
        plane = ControlPlane(services, pods, kind)
        node = Node(Path(directory), "--xds-address", f"127.0.0.1:{plane.port}", *room(services, pods))
        try:
            node.start()
            plane.until_acked("first")
            yield plane, node
        finally:
            node.end()
            plane.end()


def measure(services: int, pods: int, kind: str, pushes: int, rate: float) -> dict[str, Any]:
    with warm_node(services, pods, kind) as (plane, node):
        children = node.children()
        idle = {name: cpu_s([pid]) for pid, name in children.items()}
        plane.tell(mesh=True)
        sync_ms = plane.until_acked("mesh")
        busy = {name: cpu_s([pid]) - idle[name] for pid, name in children.items()}
        writer = node.status()["processes"]["map_writer"]
        found: dict[str, Any] = {
            "services": services, "workloads": services * pods, "kind": kind,
            "response_mb": round(plane.bytes / 1e6, 1),
            "sync_ms": round(sync_ms, 1),
            "floor_ms": round(plane.floor_ms, 1),
            "sync_to_floor": round(sync_ms / plane.floor_ms, 2), "write": writer["last_write"],
            "sync_cpu_s": {name: round(seconds, 2) for name, seconds in busy.items()},
            "pss_mib": {name: round(pss_mib([pid]), 1) for pid, name in children.items()},
            "peak_rss_mib": round(peak_mib(list(children)), 1),
            "maps_mib": round(sum(writer["map_memory_bytes"].values()) / 2**20, 1),
        }  # fmt: skip
        found["total_mib"] = round(sum(found["pss_mib"].values()) + found["maps_mib"], 1)
        with PinnedMap(pins.maps_dir(node.pin_dir), "services") as held:
            found["push"] = _pushes(plane, held, range(pushes))
            found["paced"] = _pushes(plane, held, range(pushes, 2 * pushes), rate)
        before, started = cpu_s(list(children)), time.monotonic()
        found["replace"] = _replacements(plane, pushes, rate, 2 * pushes)
        found["replace"]["cpu_percent"] = round(
            (cpu_s(list(children)) - before) / (time.monotonic() - started) * 100, 1
        )
        return found


def room(services: int, pods: int) -> list[str]:
    """Maps twice as large as the mesh needs, where the defaults are not; an answer that waits for them."""
    if services * pods <= DEFAULT_ROOM:
        return []
    needed = {"services_max": services, "endpoints_max": services * pods, "addresses_max": services * pods}
    words = [f"{name}={2 * number}" for name, number in needed.items()] + ["report_deadline_s=120"]
    return [word for setting in words for word in ("--set", setting)]


def _pushes(plane: ControlPlane, held: PinnedMap, numbers: range, rate: float = 0) -> dict[str, Any]:
    """One change at a time, half of them removals from a list, half additions. `rate` 0: at once."""
    started = time.monotonic()
    seen: dict[bool, list[float]] = {True: [], False: []}
    answered: dict[bool, list[float]] = {True: [], False: []}
    for number in numbers:
        if rate:
            time.sleep(max(0.0, started + (number - numbers.start) / rate - time.monotonic()))
        healthy, key = bool(number % 2), meshes.service_key(number // 2)
        before = held.get(key)
        plane.tell(health=number // 2, healthy=healthy)
        while held.get(key) == before:
            time.sleep(POLL_S)
        now = time.monotonic()
        took_ms = plane.until_acked(f"push-{number + 1}")
        answered[healthy].append(took_ms)
        seen[healthy].append((now - plane.last_sent) * 1e3)
    return {
        "addition": spread(seen[True]), "removal": spread(seen[False]),
        "answered": spread(answered[True] + answered[False]),
    }  # fmt: skip


def _replacements(plane: ControlPlane, count: int, rate: float, before: int) -> dict[str, Any]:
    """Pods replaced at a rate; each push is timed from its sending."""
    taken, start = [], time.monotonic()
    for number in range(count):
        delay = start + number / rate - time.monotonic()
        if delay > 0:
            time.sleep(delay)
        plane.tell(replace=number)
        taken.append(plane.until_acked(f"push-{before + number + 1}"))
    return {"rate": round(count / (time.monotonic() - start), 1), **spread(taken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--pods", type=int, default=10)
    parser.add_argument("--kind", choices=meshes.KINDS, default="plain")
    parser.add_argument("--pushes", type=int, default=400)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    for _ in range(arguments.rounds):
        found = measure(arguments.services, arguments.pods, arguments.kind, arguments.pushes, arguments.rate)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
