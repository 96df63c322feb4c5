"""Resources in the plain terms of a recording's `expect.json`: services and workloads."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

from pykmesh.proto import workload_pb2 as wire

Plain = dict[str, Any]


def view(resources: Mapping[str, wire.Address]) -> dict[str, dict[str, Plain]]:
    """Services by key with the workloads that list them as endpoints, and workloads by uid."""
    workloads = {name: a.workload for name, a in sorted(resources.items()) if a.HasField("workload")}
    services = {name: a.service for name, a in sorted(resources.items()) if a.HasField("service")}
    seen = {key: _service(service) for key, service in services.items()}
    for uid, workload in workloads.items():
        for key in workload.services:
            seen[key]["endpoints"].append(_endpoint(services[key], key, uid, workload))
    return {"services": seen, "workloads": {uid: _workload(workload) for uid, workload in workloads.items()}}


def _service(service: wire.Service) -> Plain:
    shown: Plain = {
        "name": service.name,
        "namespace": service.namespace,
        "hostname": service.hostname,
        "vips": [_network_address(address) for address in service.addresses],
        "ports": [
            {
                "service_port": port.service_port,
                "target_port": port.target_port,
                "app_protocol": wire.AppProtocol.Name(port.app_protocol),
            }
            for port in service.ports
        ],
        "ip_families": wire.IPFamilies.Name(service.ip_families),
        "endpoints": [],
    }
    shown |= {"subject_alt_names": list(service.subject_alt_names)} if service.subject_alt_names else {}
    shown |= {"canonical": True} if service.canonical else {}
    shown |= {"ingress_use_waypoint": True} if service.ingress_use_waypoint else {}
    shown |= {"visibility": wire.Service.Visibility.Name(service.visibility)} if service.visibility else {}
    if service.HasField("load_balancing"):
        shown["load_balancing"] = _load_balancing(service.load_balancing)
    return shown


def _load_balancing(lb: wire.LoadBalancing) -> Plain:
    """Only what differs from the defaults."""
    shown: Plain = {}
    if lb.routing_preference:
        shown["routing_preference"] = [
            wire.LoadBalancing.Scope.Name(scope) for scope in lb.routing_preference
        ]
    if lb.mode:
        shown["mode"] = wire.LoadBalancing.Mode.Name(lb.mode)
    if lb.health_policy:
        shown["health_policy"] = wire.LoadBalancing.HealthPolicy.Name(lb.health_policy)
    return shown


def _workload(workload: wire.Workload) -> Plain:
    shown: Plain = {
        "name": workload.name,
        "namespace": workload.namespace,
        "addresses": [_ip(address) for address in workload.addresses],
        "network": workload.network,
        "tunnel_protocol": wire.TunnelProtocol.Name(workload.tunnel_protocol),
        "network_mode": wire.NetworkMode.Name(workload.network_mode),
        "status": wire.WorkloadStatus.Name(workload.status),
        "trust_domain": workload.trust_domain,
        "service_account": workload.service_account,
        "cluster_id": workload.cluster_id,
        "workload_type": wire.WorkloadType.Name(workload.workload_type),
        "network_gateway": None,
        "services": {
            key: {str(port.service_port): port.target_port for port in workload.services[key].ports}
            for key in sorted(workload.services)
        },
    }
    texts = ("hostname", "canonical_name", "canonical_revision", "workload_name", "node", "native_tunnel")
    shown |= {name: value for name in texts if (value := getattr(workload, name))}
    if workload.HasField("locality"):
        parts = ("region", "zone", "subzone")
        shown["locality"] = {part: value for part in parts if (value := getattr(workload.locality, part))}
    if workload.HasField("capacity"):
        shown["capacity"] = workload.capacity.value
    return shown


def _endpoint(service: wire.Service, key: str, uid: str, workload: wire.Workload) -> Plain:
    own = {port.service_port: port.target_port for port in workload.services[key].ports}
    targets = {port.service_port: own.get(port.service_port) or port.target_port for port in service.ports}
    allows_all = service.load_balancing.health_policy == wire.LoadBalancing.ALLOW_ALL
    return {
        "uid": uid,
        "addresses": [_ip(address) for address in workload.addresses],
        "health": wire.WorkloadStatus.Name(workload.status),
        "ports": {str(port): target for port, target in targets.items() if target},
        "usable": workload.status == wire.HEALTHY or allows_all,
    }


def _network_address(address: wire.NetworkAddress) -> str:
    length = f"/{address.length}" if address.HasField("length") else ""
    return f"{address.network}/{_ip(address.address)}{length}"


def _ip(packed: bytes) -> str:
    return str(ipaddress.ip_address(packed))
