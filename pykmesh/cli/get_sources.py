"""Where `pykmesh get` reads: xds_client's resources, map_writer's state, the kernel's maps themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pykmesh.kernel import pins
from pykmesh.kernel.layout import AddressKind, Reason
from pykmesh.kernel.maps import PinError, PinnedMap
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ADDRESS_VALUE,
    ENDPOINT_KEY,
    ENDPOINT_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    ip_to_text,
    port_number,
)
from pykmesh.node.instance import Instance
from pykmesh.node.run import fetch, find

Entry = dict[str, Any]
TIMEOUT_S = 30.0


class SourceError(Exception):
    """What was asked for is not to be had from there; the text says why."""


def read(instance: Instance, what: str, source: str) -> list[Entry]:
    """Raises SourceError, or OSError when the process does not answer."""
    if source == "bpf":
        try:
            return _FROM_BPF[what](instance)
        except PinError as error:
            raise SourceError(str(error)) from error
    if what == "endpoints" and source == "xds":
        raise SourceError(
            "the control plane names no endpoints: they follow from its workloads (--from state or bpf)"
        )
    found = find(instance)
    if found is None:
        raise SourceError(f"instance {instance.name} is not running; --from bpf reads the kernel without it")
    port = found.ports.xds_client if source == "xds" else found.ports.map_writer
    entries: list[Entry] = fetch(port, f"/{what}", TIMEOUT_S)
    return entries


def names(instance: Instance) -> dict[int, tuple[str, int]]:
    """(service, port) of the ids in the maps, as far as map_writer is there to say."""
    found = find(instance)
    if found is None:
        return {}
    try:
        return {
            int(key): (value[0], value[1])
            for key, value in fetch(found.ports.map_writer, "/ids", TIMEOUT_S).items()
        }
    except OSError:
        return {}


def _services(instance: Instance) -> list[Entry]:
    known, entries = names(instance), []
    with PinnedMap(pins.maps_dir(instance.pin_dir), "services") as services:
        for key, value in services.items():
            ip, network, port = SERVICE_KEY.unpack(key)
            number, endpoints, verdict, _, _ = SERVICE_VALUE.unpack(value)
            refused = (
                "" if verdict == Reason.ROUTED and endpoints else Reason(verdict or Reason.NO_ENDPOINT).label
            )
            entries.append(
                {
                    "name": known.get(number, ("", 0))[0],
                    "id": f"{number:016x}",
                    "network_id": network,
                    "vips": [ip_to_text(ip)],
                    "ports": {str(port_number(port)): None},
                    "endpoints": endpoints,
                    "refused": refused,
                }
            )
    return sorted(entries, key=lambda e: (e["name"], e["vips"], int(next(iter(e["ports"])))))


def _workloads(instance: Instance) -> list[Entry]:
    entries = []
    with PinnedMap(pins.maps_dir(instance.pin_dir), "addresses") as addresses:
        for key, value in addresses.items():
            ip, network = ADDRESS_KEY.unpack(key)
            kind, verdict, _, _ = ADDRESS_VALUE.unpack(value)
            if kind == AddressKind.WORKLOAD:
                refused = "" if verdict == Reason.ROUTED else Reason(verdict).label
                entries.append({"network_id": network, "addresses": [ip_to_text(ip)], "refused": refused})
    return sorted(entries, key=lambda e: str(e["addresses"]))


def _endpoints(instance: Instance) -> list[Entry]:
    known, entries = names(instance), []
    with PinnedMap(pins.maps_dir(instance.pin_dir), "endpoints") as endpoints:
        for key, value in endpoints.items():
            number, slot = ENDPOINT_KEY.unpack(key)
            _, ip, port = ENDPOINT_VALUE.unpack(value)
            service, service_port = known.get(number, ("", 0))
            entries.append(
                {
                    "service": service,
                    "port": service_port,
                    "id": f"{number:016x}",
                    "slot": slot,
                    "endpoint": ip_to_text(ip),
                    "endpoint_port": port_number(port),
                }
            )
    return sorted(entries, key=lambda e: (e["service"], e["id"], e["slot"]))


_FROM_BPF = {"services": _services, "workloads": _workloads, "endpoints": _endpoints}


def namespace_of(entry: Entry) -> str:
    if "namespace" in entry:
        return str(entry["namespace"])
    return str(entry.get("name") or entry.get("service") or "").partition("/")[0]


def rows(what: str, entries: list[Entry]) -> tuple[Sequence[str], list[Sequence[Any]]]:
    """Columns and cells, with istioctl's names where it has them."""
    columns: Sequence[str]
    if what == "services":
        columns = ("NAMESPACE", "SERVICE", "VIP", "PORTS", "ENDPOINTS", "REFUSED")
        return columns, [_service_row(entry) for entry in entries]
    if what == "workloads":
        columns = ("NAMESPACE", "WORKLOAD", "ADDRESS", "NODE", "HEALTHY", "SERVICES")
        return columns, [_workload_row(entry) for entry in entries]
    columns = ("NAMESPACE", "SERVICE", "PORT", "SLOT", "ENDPOINT")
    return columns, [_endpoint_row(entry) for entry in entries]


def _service_row(entry: Entry) -> Sequence[Any]:
    namespace, _, host = str(entry.get("resource") or entry.get("name") or "").partition("/")
    vips = entry.get("vips") or entry.get("addresses") or []
    ports = entry.get("ports", {})
    if isinstance(ports, list):
        ports = {port.get("service_port"): port.get("target_port") for port in ports}
    shown = ",".join(f"{port}->{target}" if target else str(port) for port, target in ports.items())
    return (
        namespace, host or entry.get("id"), ",".join(str(vip).lstrip("/") for vip in vips), shown,
        entry.get("endpoints", "-"), entry.get("refused", ""),
    )  # fmt: skip


def _workload_row(entry: Entry) -> Sequence[Any]:
    healthy = entry.get("healthy", entry.get("status", "HEALTHY") == "HEALTHY") if "name" in entry else "-"
    services = entry.get("services", {})
    return (
        entry.get("namespace"), entry.get("name"), ",".join(entry.get("addresses", [])),
        entry.get("node"), healthy, ",".join(sorted(name.partition("/")[2] for name in services)),
    )  # fmt: skip


def _endpoint_row(entry: Entry) -> Sequence[Any]:
    namespace, _, host = str(entry["service"]).partition("/")
    address = entry["endpoint"]
    shown = f"[{address}]" if ":" in address else address
    return (namespace, host or entry["id"], entry["port"], entry["slot"], f"{shown}:{entry['endpoint_port']}")
