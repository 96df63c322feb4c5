"""What the mesh costs a connection and a request, as ratios to the same pods without it.

    python -m bench.datapath [--pairs 9] [--seconds 1.0]

Two clients and two servers, alike but that one of each is enrolled; direct and mesh runs alternate.
Ratios are medians of the pairs, with their spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from pykmesh.demo.pods import Pod
from tests.mesh.manifests import host, pod, service, text
from tests.mesh.node import Node

VIP = "10.96.0.10"
PORT = 8080
SOURCE = Path(__file__).with_name("load.c")


class Side(NamedTuple):
    """Who asks, and what: the endpoint itself, or the service."""

    client: Pod
    address: str
    port: int


def build(directory: Path) -> str:
    target = directory / "load"
    subprocess.run(["clang", "-O2", "-o", str(target), str(SOURCE)], check=True)
    return str(target)


def serve(load: str, where: Pod) -> None:
    process = where.spawn("taskset", "-c", "1", load, "serve", str(PORT), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def run(load: str, side: Side, mode: str, connections: int, seconds: float) -> dict[str, Any]:
    words = [load, mode, side.address, str(side.port), str(connections), str(seconds)]
    result = side.client.run("taskset", "-c", "0", *words, timeout_s=seconds + 20)
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["failed"] == 0, found
    return {**found, "rate": found["requests"] / found["seconds"]}


def compare(
    load: str, sides: dict[str, Side], mode: str, connections: int, pairs: int, seconds: float
) -> dict[str, Any]:
    """One row: rates and latencies of both sides, ratio mesh to direct."""
    taken: dict[str, list[dict[str, Any]]] = {"direct": [], "mesh": []}
    for number in range(pairs + 1):
        order = ["direct", "mesh"] if number % 2 else ["mesh", "direct"]
        for side in order:
            found = run(load, sides[side], mode, connections, seconds)
            if number:  # the first pair warms up
                taken[side].append(found)
    ratios = [m["rate"] / d["rate"] for d, m in zip(taken["direct"], taken["mesh"], strict=True)]
    latency = [m["p50_us"] / d["p50_us"] for d, m in zip(taken["direct"], taken["mesh"], strict=True)]
    middle = {
        side: {key: round(statistics.median(r[key] for r in runs), 1) for key in ("rate", "p50_us", "p99_us")}
        for side, runs in taken.items()
    }
    return {
        "mode": mode, "connections": connections, "pairs": pairs,
        "rate_ratio": round(statistics.median(ratios), 3),
        "rate_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "p50_ratio": round(statistics.median(latency), 3), **middle,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        load, node = build(directory), Node(directory)
        try:
            with node.network as network:
                direct, meshed = network.add("direct", 10, v6=False), network.add("meshed", 11, v6=False)
                plain, served = network.add("plain", 20, v6=False), network.add("served", 21, v6=False)
                web = service("web", VIP, app="web", ports={80: PORT})
                node.write("bench", text(web, pod("served", str(served.address4), app="web")))
                node.start()
                for endpoint in (plain, served):
                    serve(load, endpoint)
                for enrolled in (meshed, served):
                    node.enroll(enrolled)
                node.until_endpoints(host("web"), {f"{served.address4}:{PORT}"})
                sides = {"direct": Side(direct, str(plain.address4), PORT), "mesh": Side(meshed, VIP, 80)}
                for mode, connections in (("keep", 1), ("keep", 16), ("new", 1), ("new", 16)):
                    row = compare(load, sides, mode, connections, arguments.pairs, arguments.seconds)
                    print(json.dumps(row), flush=True)
        finally:
            node.end()


if __name__ == "__main__":
    main()
