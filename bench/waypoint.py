"""What L7 costs by way of a waypoint, beside no proxy at all and two Envoys in sidecar position, in one run.

    python -m bench.waypoint [--rounds 5] [--seconds 2.0]

Three clients and three servers, alike. "sidecars": an Envoy in the client's pod and one in the server's, each
with an HTTP connection manager and a router, reached by address: without the redirection, mutual TLS and
statistics that Istio's would have. Clients are on processor 0, servers and all Envoys on processor 1. At a
given rate each request has its time (open loop), "most" is how many there can be on 16 connections. Figures
are medians of the rounds; CPU is that of the Envoys alone, by the scheduler's account.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.datapath import PORT, build, serve
from pykmesh import programs
from pykmesh.demo.pods import Pod
from tests.mesh.manifests import pod, service, text
from tests.mesh.node import Node, until
from tests.mesh.waypoints import gateway

VIP = "10.96.0.10"
OUTBOUND, INBOUND = 15001, 15006
LOADS = ((1, 1000), (16, 4000), (64, 8000))
MODES = ("direct", "waypoint", "sidecars")


class Side(NamedTuple):
    """Who asks whom, and the processes between."""

    client: Pod
    address: str
    port: int
    proxies: Callable[[], list[int]]


def sidecar(where: Pod, directory: Path, listen: int, to: str, port: int) -> subprocess.Popen[str]:
    """An Envoy that hands requests on to one address."""
    http = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
    router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
    route = {"match": {"prefix": "/"}, "route": {"cluster": "next"}}
    manager = {
        "@type": f"{http}.HttpConnectionManager",
        "statPrefix": "sidecar",
        "routeConfig": {"virtualHosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "httpFilters": [{"name": "envoy.filters.http.router", "typedConfig": {"@type": router}}],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typedConfig": manager}]}
    endpoint = {"endpoint": {"address": _address(to, port)}}
    config = {
        "staticResources": {
            "listeners": [{"name": "in", "address": _address("0.0.0.0", listen), "filterChains": [chain]}],
            "clusters": [
                {
                    "name": "next",
                    "type": "STATIC",
                    "loadAssignment": {"clusterName": "next", "endpoints": [{"lbEndpoints": [endpoint]}]},
                }
            ],
        }
    }
    path = directory / f"sidecar-{where.name}.json"
    path.write_text(json.dumps(config))
    envoy = str(programs.find("envoy"))
    words = ("taskset", "-c", "1", envoy, "-c", str(path), "--concurrency", "1", "--use-dynamic-base-id")
    process = where.spawn(*words, "--log-level", "error", stdout=subprocess.DEVNULL, text=True)
    until(lambda: _listens(where, listen), f"a sidecar of {where.name}")
    return process


def _address(address: str, port: int) -> dict[str, Any]:
    return {"socketAddress": {"address": address, "portValue": port}}


def _listens(where: Pod, port: int) -> bool:
    return f":{port} " in where.run("ss", "-ltn", timeout_s=5).stdout


def used_ns(pids: list[int]) -> int:
    """Processor time of all threads (Documentation/scheduler/sched-stats.rst)."""
    threads = (path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(int(path.read_text().split()[0]) for path in threads)


def run(load: str, side: Side, *words: str, seconds: float) -> dict[str, Any]:
    before = used_ns(side.proxies())
    command = ("taskset", "-c", "0", load, words[0], side.address, str(side.port), *words[1:])
    found: dict[str, Any] = json.loads(side.client.run(*command, timeout_s=seconds + 20).stdout)
    assert found["failed"] == 0, found
    used = used_ns(side.proxies()) - before
    return {
        "rate": found["requests"] / found["seconds"],
        "p50_us": found["p50_us"],
        "p99_us": found["p99_us"],
        "proxy_cpu_us": used / 1e3 / max(found["requests"], 1),
    }


def compare(
    load: str, sides: dict[str, Side], words: Callable[[float], tuple[str, ...]], rounds: int, seconds: float
) -> dict[str, Any]:
    """Medians of each mode, and of the ratios waypoint to sidecars of each round."""
    taken: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):
        for mode in MODES if number % 2 else reversed(MODES):
            found = run(load, sides[mode], *words(seconds), seconds=seconds)
            if number:  # the first round warms up
                taken[mode].append(found)
    ratios = {
        key: [w[key] / s[key] for w, s in zip(taken["waypoint"], taken["sidecars"], strict=True)]
        for key in ("rate", "p50_us", "p99_us", "proxy_cpu_us")
    }
    middle = {
        mode: {key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]}
        for mode, runs in taken.items()
    }
    return {
        "to_sidecars": {key: round(statistics.median(found), 3) for key, found in ratios.items()},
        "spread": {key: [round(min(found), 3), round(max(found), 3)] for key, found in ratios.items()},
        **middle,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="b") as name:
        directory = Path(name)
        load, node = build(directory), Node(directory)
        try:
            with node.network as network:
                for row in measure(load, node, network, directory, arguments.rounds, arguments.seconds):
                    print(json.dumps(row), flush=True)
        finally:
            node.end()


def measure(
    load: str, node: Node, network: Any, directory: Path, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    clients = {mode: network.add(f"c-{mode[:6]}", 10 + n, v6=False) for n, mode in enumerate(MODES)}
    servers = {mode: network.add(f"s-{mode[:6]}", 20 + n, v6=False) for n, mode in enumerate(MODES)}
    waypoint = network.add("wp", 30, v6=False)
    for server in servers.values():
        serve(load, server)
    web = service("web", VIP, app="web", ports={80: PORT})
    web["metadata"]["labels"] = {"istio.io/use-waypoint": "wp"}
    web["spec"]["ports"][0]["name"] = "http"
    known = pod("web", str(servers["waypoint"].address4), app="web")
    node.write("bench", text(web, known, gateway(max_instances="1")))
    node.start("--waypoint-address", str(waypoint.address4), "--waypoint-netns", str(waypoint.netns))
    node.enroll(clients["waypoint"])

    def instance() -> Any:
        found = node.status()["processes"]["waypoint_mgr"]["waypoints"]
        return found and found[0]["services"] and next((i for i in found[0]["instances"] if i["ready"]), None)

    pid = until(instance, "the waypoint")["pid"]
    subprocess.run(["taskset", "-a", "-c", "-p", "1", str(pid)], check=True, capture_output=True)
    inner = sidecar(servers["sidecars"], directory, INBOUND, "127.0.0.1", PORT)
    outer = sidecar(clients["sidecars"], directory, OUTBOUND, str(servers["sidecars"].address4), INBOUND)
    sides = {
        "direct": Side(clients["direct"], str(servers["direct"].address4), PORT, list),
        "waypoint": Side(clients["waypoint"], VIP, 80, lambda: [pid]),
        "sidecars": Side(clients["sidecars"], "127.0.0.1", OUTBOUND, lambda: [inner.pid, outer.pid]),
    }
    rows: list[dict[str, Any]] = []
    for connections, rate in LOADS:

        def paced(seconds: float, connections: int = connections, rate: int = rate) -> tuple[str, ...]:
            return "rate", str(connections), str(seconds), str(rate)

        found = compare(load, sides, paced, rounds, seconds)
        rows.append({"connections": connections, "requests_a_second": rate, **found})
    found = compare(load, sides, lambda seconds: ("keep", "16", str(seconds)), rounds, seconds)
    rows.append({"connections": 16, "requests_a_second": "most", **found})
    return rows


if __name__ == "__main__":
    main()
