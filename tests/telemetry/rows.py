"""Records as the programs write them, made by hand."""

from __future__ import annotations

import ipaddress
from typing import Any

import numpy as np
import numpy.typing as npt

from pykmesh.contracts.messages import ServiceName, WorkloadName
from pykmesh.kernel.layout import Direction, FlowKind, dtype
from pykmesh.kernel.records import Ip, ip_from_text

CLIENT, SERVER, VIP = "10.0.0.5", "10.0.0.9", "10.96.0.10"


def record(**fields: Any) -> npt.NDArray[np.void]:
    """A closed TCP connection that a client opened; addresses are given as text."""
    row = np.zeros(1, dtype("flow_record"))
    values: dict[str, Any] = {
        "kind": FlowKind.CLOSED,
        "direction": Direction.OUTBOUND,
        "protocol": 6,
        "established": 1,
        "local": CLIENT,
        "remote": SERVER,
        "local_port": 41234,
        "remote_port": 8080,
        "opened_ns": 1_000_000_000,
        "closed_ns": 1_012_300_000,
        "sent_bytes": 83,
        "received_bytes": 1175,
    }
    for name, value in (values | fields).items():
        row[name] = np.frombuffer(ip(value), "V16") if isinstance(value, str) else value
    return row


def records(*rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    return np.concatenate(rows)


def ip(text: str) -> Ip:
    return ip_from_text(text) if text else Ip(bytes(16))


def numbered_ip(number: int) -> str:
    return str(ipaddress.IPv4Address(0x0A000000 + number))


def workload(name: str, **fields: str) -> WorkloadName:
    values = {
        "uid": f"Kubernetes//Pod/shop/{name}-1",
        "name": f"{name}-1",
        "namespace": "shop",
        "workload": name,
        "service_account": "default",
        "trust_domain": "cluster.local",
        "canonical_name": f"{name}-app",
        "canonical_revision": "v2",
        "cluster": "Kubernetes",
        "region": "eu",
        "zone": "",
    }
    return WorkloadName(**(values | fields))


def service_address() -> WorkloadName:
    """What is said of the address of WEB."""
    return WorkloadName(*[""] * 11, service="shop/web.shop.svc.cluster.local")


WEB = ServiceName("web", "shop", "web.shop.svc.cluster.local", 80)


class Clock:
    """Time that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
