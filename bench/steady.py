"""What a mesh costs that is in place: does its size matter, is a process ever deaf, how soon is it there?

    python -m bench.steady [--services 1000 10000] [--pods 10] [--rate 100] [--seconds 20]

For each size, on warm processes: CPU of all of them and the broker while one pod's health flips at the rate,
and while pods are replaced at it, each push timed from its sending to its answer. `flat` is the last size's
median over the first's. deaf: how long each process took to answer on its admin port, asked every 20 ms,
while the whole mesh comes (`sync`) and while pods are replaced (`steady`): its loop was elsewhere, or it
waited for a processor. bpf_loader, which does nothing meanwhile, is the baseline. start: from a process's own
start until it is ready, with a control plane that sends the mesh at once, and with one that sends none.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

from bench.sync import ControlPlane, cpu_s, percentile, room, spread, warm_node
from pykmesh.node.instance import running
from tests.mesh.node import Node, until

ASK_EVERY_S: Final = 0.02
SYNCED: Final = ("xds_client", "map_writer", "bpf_loader", "telemetry")
LOOK_S: Final = 0.005


class Ear:
    """Asks processes again and again, each in a thread of its own, for as long as the block runs."""

    def __init__(self, ports: Mapping[str, int]) -> None:
        self._took: dict[str, list[float]] = {name: [] for name in ports}
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=each) for each in ports.items()]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, name: str, port: int) -> None:
        while not self._ends.wait(ASK_EVERY_S):
            began = time.perf_counter()
            _says_yes(port, "/livez")  # one that does not answer at all has been deaf for ten seconds
            self._took[name].append((time.perf_counter() - began) * 1e3)

    def heard(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "p50_ms": round(statistics.median(took), 2),
                "p99_ms": round(percentile(took, 0.99), 2),
                "max_ms": round(max(took), 1),
            }
            for name, took in self._took.items()
        }


def _says_yes(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def ports_of(node: Node) -> dict[str, int]:
    return {name: getattr(node.instance.ports, name) for name in SYNCED}


class Pushes:
    """One after another, at a rate."""

    def __init__(self, plane: ControlPlane, pids: list[int], rate: float) -> None:
        self._plane, self._pids, self._rate = plane, pids, rate
        self._sent = 0

    def run(self, seconds: float, command: str) -> dict[str, float]:
        taken: list[float] = []
        before, start = cpu_s(self._pids), time.monotonic()
        while len(taken) < seconds * self._rate:
            time.sleep(max(0.0, start + len(taken) / self._rate - time.monotonic()))
            number = len(taken)
            if command == "health":
                self._plane.tell(health=0, healthy=bool(number % 2))
            else:
                self._plane.tell(replace=self._sent)
            self._sent += 1
            taken.append(self._plane.until_acked(f"push-{self._sent}"))
        took_s = time.monotonic() - start
        cpu_percent = round((cpu_s(self._pids) - before) / took_s * 100, 1)
        return {"rate": round(len(taken) / took_s, 1), **spread(taken), "cpu_percent": cpu_percent}


def measure(services: int, pods: int, rate: float, seconds: float) -> dict[str, Any]:
    with warm_node(services, pods) as (plane, node):
        with Ear(ports_of(node)) as during_sync:
            plane.tell(mesh=True)
            sync_ms = plane.until_acked("mesh")
        time.sleep(2.0)
        pushes = Pushes(plane, list(node.children()), rate)
        found = {
            "services": services, "workloads": services * pods, "sync_ms": round(sync_ms),
            "flips": pushes.run(seconds, "health"), "replace": pushes.run(seconds, "replace"),
        }  # fmt: skip
        with Ear(ports_of(node)) as steadily:
            pushes.run(seconds, "replace")
        return {**found, "deaf": {"sync": during_sync.heard(), "steady": steadily.heard()}}


@contextlib.contextmanager
def a_plane(services: int, pods: int) -> Iterator[ControlPlane]:
    plane = ControlPlane(services, pods, "at-once")
    try:
        yield plane
    finally:
        plane.end()


def start(services: int, pods: int) -> dict[str, float]:
    """Seconds from each process's start until it is ready: those that hold the mesh are synced then."""
    with tempfile.TemporaryDirectory() as directory, a_plane(services, pods) as plane:
        node = Node(Path(directory), "--xds-address", f"127.0.0.1:{plane.port}", *room(services, pods))
        ready_at: dict[str, float] = {}
        up = threading.Thread(target=node.start)
        up.start()
        try:
            until(lambda: running(node.run_dir), "an instance")
            ports = ports_of(node)
            while waiting := set(SYNCED) - ready_at.keys():
                for name in waiting:
                    if _says_yes(ports[name], "/readyz"):
                        ready_at[name] = time.time()
                time.sleep(LOOK_S)
            children = {name: pid for pid, name in node.children().items()}
            return {name: round(at - _began(children[name]), 2) for name, at in sorted(ready_at.items())}
        finally:
            up.join()
            node.end()


def _began(pid: int) -> float:
    """When a process started, in seconds since the epoch."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime_s + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--pods", type=int, default=10)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    found = []
    for services in arguments.services:
        found.append(measure(services, arguments.pods, arguments.rate, arguments.seconds))
        print(json.dumps(found[-1]), flush=True)
    flat = {
        what: round(found[-1][what]["p50_ms"] / found[0][what]["p50_ms"], 2) for what in ("flips", "replace")
    }
    print(json.dumps({"flat": flat}))
    print(json.dumps({"start": {f"{size * 10} workloads": start(size, 10) for size in (0, 1_000)}}))


if __name__ == "__main__":
    main()
