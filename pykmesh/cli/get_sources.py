"""Where `pykmesh get` reads: xds_client's resources, map_writer's state, the kernel's maps themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pykmesh.kernel import pins
from pykmesh.kernel.hooks import count_pinned
from pykmesh.kernel.layout import AddressKind, Reason
from pykmesh.kernel.maps import PinError, PinnedMap
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ADDRESS_VALUE,
    ENDPOINT_KEY,
    ENDPOINT_VALUE,
    NO_IP,
    POD_KEY,
    POD_VALUE,
    RANGE_KEY,
    RANGE_NETWORK_BITS,
    RANGE_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    ip_to_text,
    port_number,
    range_to_text,
)
from pykmesh.node.ask import fetch, find
from pykmesh.node.instance import Instance

Entry = dict[str, Any]
TIMEOUT_S = 120.0
_NOWHERE = {
    ("endpoints", "xds"): "the control plane names no endpoints: they follow from its workloads",
    ("pods", "xds"): "the control plane does not say who is enrolled here",
    ("policies", "bpf"): "the kernel holds no policies: they are not enforced yet",
}


class SourceError(Exception):
    """What was asked for is not to be had from there; the text says why."""


def read(instance: Instance, what: str, source: str) -> list[Entry]:
    """Raises SourceError, or OSError when the process does not answer."""
    if why := _NOWHERE.get((what, source)):
        others = [other for other in ("xds", "state", "bpf") if (what, other) not in _NOWHERE]
        raise SourceError(f"{why} (--from {' or '.join(others)})")
    if source == "bpf":
        try:
            return _FROM_BPF[what](instance)
        except PinError as error:
            raise SourceError(str(error)) from error
    found = find(instance)
    if found is None:
        raise SourceError(f"instance {instance.name} is not running; --from bpf reads the kernel without it")
    process = "bpf_loader" if what == "pods" else "xds_client" if source == "xds" else "map_writer"
    port: int = getattr(found.ports, process)
    if waits_for := fetch(port, "/readyz")["waits_for"]:
        elsewhere = "" if (what, "bpf") in _NOWHERE else "; --from bpf reads the kernel without it"
        raise SourceError(f"{process} waits for {', '.join(waits_for)}{elsewhere}")
    if what == "pods":
        enrolled: list[Entry] = fetch(port, "/status")["enrolled"]
        return enrolled
    entries: list[Entry] = fetch(port, f"/{what}", TIMEOUT_S)
    return entries if source == "state" else _with_errors(what, entries, fetch(port, "/rejected", TIMEOUT_S))


def _with_errors(what: str, entries: list[Entry], rejected: dict[str, dict[str, str]]) -> list[Entry]:
    """Each with what is wrong with it as it was said last; also what is held in no version."""
    errors = rejected["AUTHORIZATION" if what == "policies" else "ADDRESS"]
    for entry in entries:
        if why := errors.pop(entry["resource"], None):
            entry["error"] = why
    strays = [name for name in errors if what == "policies" or _is_service(name) == (what == "services")]
    entries += [{"resource": name, "error": errors[name], "is_held": False} for name in strays]
    return sorted(entries, key=lambda entry: str(entry["resource"]))


def _is_service(name: str) -> bool:
    """namespace/hostname; a workload's uid has more in it."""
    return name.count("/") == 1


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
    ranges = _ranges(instance)
    with PinnedMap(pins.maps_dir(instance.pin_dir), "services") as services:
        for key, value in services.items():
            ip, network, port = SERVICE_KEY.unpack(key)
            number, endpoints, verdict, _, _ = SERVICE_VALUE.unpack(value)
            is_open = endpoints or verdict != Reason.ROUTED
            refused = _refused(Reason(verdict) if is_open else Reason.NO_ENDPOINT)
            entries.append(
                {
                    "name": known.get(number, ("", 0))[0],
                    "id": f"{number:016x}",
                    "network_id": network,
                    "vips": [ranges.get((ip, network), ip_to_text(ip))],
                    "ports": {str(port_number(port)): None},
                    "endpoints": endpoints,
                    "refused": refused,
                }
            )
    return sorted(entries, key=lambda e: (e["name"], e["vips"], int(next(iter(e["ports"])))))


def _refused(verdict: Reason) -> str:
    """Why connections are; empty where they go somewhere, or are left alone."""
    return "" if verdict in (Reason.ROUTED, Reason.PASSTHROUGH) else verdict.label


def _ranges(instance: Instance) -> dict[tuple[bytes, int], str]:
    """By what stands for each in `services` and `addresses`."""
    with PinnedMap(pins.maps_dir(instance.pin_dir), "ranges") as ranges:
        return {
            RANGE_VALUE.unpack(value): range_to_text(ip, bits - RANGE_NETWORK_BITS)
            for bits, _, ip, value in ((*RANGE_KEY.unpack(key), value) for key, value in ranges.items())
        }


def _workloads(instance: Instance) -> list[Entry]:
    entries = []
    with PinnedMap(pins.maps_dir(instance.pin_dir), "addresses") as addresses:
        for key, value in addresses.items():
            ip, network = ADDRESS_KEY.unpack(key)
            kind, verdict, _ = ADDRESS_VALUE.unpack(value)
            if kind == AddressKind.WORKLOAD:
                refused = _refused(Reason(verdict))
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


def _pods(instance: Instance) -> list[Entry]:
    with PinnedMap(pins.maps_dir(instance.pin_dir), "pods") as pods:
        known = {POD_KEY.unpack(key)[0]: POD_VALUE.unpack(value) for key, value in pods.items()}
    entries = []
    for links in pins.read_links(pins.links_dir(instance.pin_dir)).cgroups:
        address4, address6, _, _ = known.get(links.netns_cookie or 0, (NO_IP, NO_IP, 0, 0))
        entries.append(
            {
                "cgroup_id": links.cgroup_id,
                "path": None,
                "programs": count_pinned(links.path),
                "netns_cookie": links.netns_cookie,
                "address4": None if address4 == NO_IP else ip_to_text(address4),
                "address6": None if address6 == NO_IP else ip_to_text(address6),
            }
        )
    return entries


_FROM_BPF = {"services": _services, "workloads": _workloads, "endpoints": _endpoints, "pods": _pods}
KINDS = (*_FROM_BPF, "policies")


def namespace_of(entry: Entry) -> str:
    if "namespace" in entry:
        return str(entry["namespace"])
    return str(entry.get("resource") or entry.get("name") or entry.get("service") or "").partition("/")[0]


_COLUMNS: dict[str, Sequence[str]] = {
    "services": ("NAMESPACE", "SERVICE", "VIP", "PORTS", "ENDPOINTS", "REFUSED"),
    "workloads": ("NAMESPACE", "WORKLOAD", "ADDRESS", "NODE", "HEALTHY", "SERVICES"),
    "endpoints": ("NAMESPACE", "SERVICE", "PORT", "SLOT", "ENDPOINT"),
    "policies": ("NAMESPACE", "POLICY", "SCOPE", "ACTION"),
    "pods": ("ADDRESSES", "NETNS COOKIE", "CGROUP", "PATH", "PROGRAMS"),
}


def rows(what: str, entries: list[Entry], source: str = "state") -> tuple[Sequence[str], list[Sequence[Any]]]:
    """Columns and cells, with istioctl's names where it has them. What is said has an error, or none."""
    columns, cells = _COLUMNS[what], [_ROWS[what](entry) for entry in entries]
    if source == "xds":
        columns = (*columns, "ERROR")
        cells = [(*row, entry.get("error")) for row, entry in zip(cells, entries, strict=True)]
    return columns, cells


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
    is_healthy = entry.get("healthy", entry.get("status", "HEALTHY") == "HEALTHY")
    healthy = ("yes" if is_healthy else "no") if "name" in entry else "-"
    name, addresses = entry.get("name") or entry.get("resource"), ",".join(entry.get("addresses", []))
    services = ",".join(sorted(name.partition("/")[2] for name in entry.get("services", {})))
    return (entry.get("namespace"), name, addresses, entry.get("node"), healthy, services)


def _endpoint_row(entry: Entry) -> Sequence[Any]:
    namespace, _, host = str(entry["service"]).partition("/")
    address = entry["endpoint"]
    shown = f"[{address}]" if ":" in address else address
    return (namespace, host or entry["id"], entry["port"], entry["slot"], f"{shown}:{entry['endpoint_port']}")


def _policy_row(entry: Entry) -> Sequence[Any]:
    namespace, _, name = str(entry.get("resource") or entry.get("name")).partition("/")
    if "scope" not in entry and "is_held" not in entry:
        scope = {None: "WORKLOAD_SELECTOR", "": "GLOBAL"}.get(entry["namespace"], "NAMESPACE")
        return (namespace, name, scope, None)
    return (namespace, name, entry.get("scope"), entry.get("action"))


def _pod_row(entry: Entry) -> Sequence[Any]:
    addresses = ",".join(filter(None, (entry["address4"], entry["address6"])))
    return (addresses, entry["netns_cookie"], entry["cgroup_id"], entry["path"], entry["programs"])


_ROWS: dict[str, Callable[[Entry], Sequence[Any]]] = {
    "services": _service_row,
    "workloads": _workload_row,
    "endpoints": _endpoint_row,
    "policies": _policy_row,
    "pods": _pod_row,
}
