"""`pykmesh config-dump`: what xds_client holds in ztunnel's words, and who of it is enrolled here."""

from __future__ import annotations

from typing import Any

from pykmesh.node.ask import fetch
from pykmesh.node.instance import Instance

TIMEOUT_S = 120.0
Plain = dict[str, Any]


def read(instance: Instance) -> Plain:
    """OSError names the process that does not answer."""
    dump: Plain = fetch(instance.ports.xds_client, "/config_dump", TIMEOUT_S)
    enrolled = fetch(instance.ports.bpf_loader, "/status", TIMEOUT_S)["enrolled"]
    by_address = {address: each for each in dump["workloads"] for address in each["workloadIps"]}
    found = (by_address.get(each["address4"] or each["address6"]) for each in enrolled)
    dump["workloadState"] = {workload["uid"]: _state(workload) for workload in found if workload}
    return dump


def _state(workload: Plain) -> Plain:
    """An enrolled pod. Its connections are the kernel's own, and counted by telemetry alone."""
    info = {name: workload[name] for name in ("name", "namespace", "trustDomain", "serviceAccount")}
    return {"state": "Up", "connections": {"inbound": [], "outbound": []}, "info": info}
