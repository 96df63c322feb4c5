"""Recordings of real istiods: what they sent, and what the kernel must then say, read from `expect.json`.

The reading here knows the recording's own terms only.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.control.kernel_view import Address, Entry, View

RECORDINGS = Path(__file__).parents[1] / "data" / "recordings"
Plain = dict[str, Any]


class Message(NamedTuple):
    """A response as it was recorded, on the `stream`th stream."""

    stream: int
    type_url: str
    data: bytes


HERE = {"REGION": "eu", "ZONE": "eu-1", "NODE": "node-a", "CLUSTER": "Kubernetes"}
"""Where the node is that the recordings are played to: in their cluster it has this name and place."""
LOCALITY = f"{HERE['REGION']}/{HERE['ZONE']}"


class Step(NamedTuple):
    name: str
    messages: list[Message]
    state: Plain


def steps(folder: Path) -> Iterator[Step]:
    with gzip.open(folder / "stream.jsonl.gz", "rt") as lines:
        events = [event for event in map(json.loads, lines) if event["dir"] == "recv"]
    by_step = {
        number: [Message(e["conn"], e["type_url"], base64.b64decode(e["b64"])) for e in group]
        for number, group in itertools.groupby(events, lambda event: event["step"])
    }
    for state in expected(folder):
        yield Step(f"{state['step']} {state['name']}", by_step.get(state["step"], []), state)


def expected(folder: Path) -> list[Plain]:
    plain = folder / "expect.json"
    text = plain.read_text() if plain.exists() else gzip.decompress((folder / "expect.json.gz").read_bytes())
    found: list[Plain] = json.loads(text)["steps"]
    return found


def view(state: Plain) -> View:
    """What the maps must say of a state, for a node of the network ""."""
    owners: dict[str, list[Plain]] = {}
    for service in state["services"].values():
        for vip in service["vips"]:
            network, address, *length = vip.split("/")
            if not network:
                whole = not length or length[0] == ("128" if ":" in address else "32")
                owners.setdefault(address if whole else f"{address}/{length[0]}", []).append(service)
    services, addresses = {}, _workloads(state)
    for address, (service,) in owners.items():  # in no recording has a VIP two owners
        passes = _mode(service) == "PASSTHROUGH" and not _has_waypoint(service)
        addresses[address] = Address("service", "passthrough" if passes else "routed")
        for port in {port["service_port"] for port in service["ports"]}:
            services[f"{address} {port}"] = _entry(state, service, address, port)
    services |= _ways_to_workloads(state)
    return View(services, addresses)


def _near(state: Plain, service: Plain) -> list[Plain]:
    """The endpoints that are near enough for a client on this node (xds.md 3.3)."""
    usable = [endpoint for endpoint in service["endpoints"] if _is_usable(state, endpoint)]
    scopes = (service.get("load_balancing") or {}).get("routing_preference", [])
    if _mode(service) not in ("STRICT", "FAILOVER") or not scopes:
        return usable
    ranks = [_rank(scopes, state["workloads"][endpoint["uid"]]) for endpoint in usable]
    best = len(scopes) if _mode(service) == "STRICT" else max(ranks, default=0)
    return [endpoint for endpoint, rank in zip(usable, ranks, strict=True) if rank == best]


def _is_usable(state: Plain, endpoint: Plain) -> bool:
    workload = state["workloads"][endpoint["uid"]]
    return bool(endpoint["usable"] and not workload["network"] and workload.get("capacity", 1))


def _rank(scopes: list[str], workload: Plain) -> int:
    there = {scope.upper(): text for scope, text in (workload["locality"] or {}).items()}
    there |= {"NODE": workload["node"], "CLUSTER": workload["cluster_id"], "NETWORK": workload["network"]}
    matches = itertools.takewhile(lambda scope: (there.get(scope) or "") == HERE.get(scope, ""), scopes)
    return len(list(matches))


def _mode(service: Plain) -> str:
    return str((service.get("load_balancing") or {}).get("mode", ""))


def _has_waypoint(service: Plain) -> bool:
    return bool(service["waypoint"] or service["weighted_waypoints"])


def _by_istios_waypoint(state: Plain, user: Plain) -> str:
    """A waypoint of Istio's own takes HBONE; one that nothing is known of cannot be judged."""
    said = str(user["waypoint"] or "").rpartition(":")[0]
    known = {*state["services"], *(vip for found in state["services"].values() for vip in found["vips"])}
    is_known = user.get("weighted_waypoints") or said in known
    return "waypoint_unsupported" if is_known else "waypoint_unavailable"


def _entry(state: Plain, service: Plain, address: str, port: int) -> Entry:
    if _has_waypoint(service):
        return Entry(_by_istios_waypoint(state, service))
    if _mode(service) == "PASSTHROUGH":
        return Entry("passthrough")
    found: dict[bool, set[str]] = {False: set(), True: set()}
    for endpoint in _near(state, service):
        if target := endpoint["ports"].get(str(port)):
            for own in endpoint["addresses"]:
                found[":" in own].add(f"{own} {target}")
    only = {"IPV4_ONLY": False, "IPV6_ONLY": True}.get(service["ip_families"])
    if only is not None:
        found[not only].clear()
    wants6 = ":" in address
    return Entry("routed", frozenset(found[wants6] or (found[False] if wants6 else ())))


def _ways_to_workloads(state: Plain) -> dict[str, Entry]:
    """Of those with a waypoint, whatever port is asked for: it is said of port 0."""
    return {
        f"{address} 0": Entry(_by_istios_waypoint(state, workload))
        for address, workload in _by_address(state).items()
        if workload["waypoint"]
    }


def _workloads(state: Plain) -> dict[str, Address]:
    return {
        address: Address("workload", "waypoint_unavailable" if workload["waypoint"] else "routed")
        for address, workload in _by_address(state).items()
    }


def _by_address(state: Plain) -> dict[str, Plain]:
    """Pods before other workloads of the same address."""
    found: dict[str, Plain] = {}
    for _, workload in sorted(state["workloads"].items(), key=lambda item: "//Pod/" not in item[0]):
        if workload["network"] or workload["network_mode"] == "HOST_NETWORK":
            continue
        for address in workload["addresses"]:
            found.setdefault(address, workload)
    return found
