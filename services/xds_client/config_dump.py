"""What is held, as ztunnel's `/config_dump` says it: `istioctl ztunnel-config … --file` reads that. Pure.

Names and words are those of ztunnel (src/state, src/rbac) and of istioctl's reader
(istioctl/pkg/writer/ztunnel/configdump/api.go). There is no mutual TLS here, so there are no
certificates; rules of policies are not read yet, and left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from google.protobuf.message import DecodeError

from pykmesh.contracts.address import TRUST_DOMAIN
from pykmesh.contracts.messages import ResourceType
from pykmesh.kernel.records import ip_from_wire, ip_to_text
from pykmesh.proto import authorization_pb2, workload_pb2
from services.xds_client.store import Held

Plain = dict[str, Any]
_TYPES: Final = ("deployment", "cronjob", "pod", "job")
_PROTOCOLS: Final = ("TCP", "HBONE")
_STATUS: Final = ("Healthy", "Unhealthy")
_NETWORK_MODES: Final = ("Standard", "HostNetwork")
_LB_MODES: Final = ("Standard", "Strict", "Failover", "Passthrough")
_HEALTH_POLICIES: Final = ("OnlyHealthy", "AllowAll")
_FAMILIES: Final = ("", "IPv4", "IPv6", "Dual")
_SCOPES: Final = ("Global", "Namespace", "WorkloadSelector")
_ACTIONS: Final = ("Allow", "Deny")


def config_dump(held: Mapping[ResourceType, Mapping[str, Held]]) -> Plain:
    """`unreadable` names what decides traffic here and is no whole message (see pages.py)."""
    workloads: list[workload_pb2.Workload] = []
    services: list[workload_pb2.Service] = []
    unreadable = []
    for name, resource in sorted(held[ResourceType.ADDRESS].items()):
        try:
            address = workload_pb2.Address.FromString(resource.value)
        except DecodeError:
            unreadable.append(name)
            continue
        if address.WhichOneof("type") == "workload":
            workloads.append(address.workload)
        else:
            services.append(address.service)
    members: defaultdict[str, list[workload_pb2.Workload]] = defaultdict(list)
    for workload in workloads:
        for name in workload.services:
            members[name].append(workload)
    return {
        "workloads": [_workload(workload) for workload in workloads],
        "services": [_service(each, members[f"{each.namespace}/{each.hostname}"]) for each in services],
        "policies": [_policy(resource) for _, resource in sorted(held[ResourceType.AUTHORIZATION].items())],
        "certificates": [],
        "workloadState": {},
        "unreadable": unreadable,
    }


def _word(words: tuple[str, ...], number: int) -> str:
    """A number that has no word yet is shown as it is."""
    return words[number] if number < len(words) else str(number)


def _ip(address: bytes) -> str:
    """One that is none, in a field that decides nothing here, is shown as its bytes."""
    try:
        return ip_to_text(ip_from_wire(address))
    except ValueError:
        return address.hex()


def _workload(message: workload_pb2.Workload) -> Plain:
    found: Plain = {
        "uid": message.uid,
        "workloadIps": [_ip(address) for address in message.addresses],
        "protocol": _word(_PROTOCOLS, message.tunnel_protocol),
        "name": message.name,
        "namespace": message.namespace,
        "trustDomain": message.trust_domain or TRUST_DOMAIN,
        "serviceAccount": message.service_account or "default",
        "network": message.network,
        "networkMode": _word(_NETWORK_MODES, message.network_mode),
        "workloadName": message.workload_name,
        "workloadType": _word(_TYPES, message.workload_type),
        "canonicalName": message.canonical_name,
        "canonicalRevision": message.canonical_revision,
        "hostname": message.hostname,
        "node": message.node,
        "nativeTunnel": message.native_tunnel,
        "authorizationPolicies": list(message.authorization_policies),
        "status": _word(_STATUS, message.status),
        "clusterId": message.cluster_id or "Kubernetes",
        "locality": {
            "region": message.locality.region,
            "zone": message.locality.zone,
            "subzone": message.locality.subzone,
        },
        "services": sorted(message.services),
        "capacity": message.capacity.value if message.HasField("capacity") else 1,
    }
    if message.HasField("waypoint"):
        found["waypoint"] = _gateway(message.waypoint)
    if message.HasField("network_gateway"):
        found["networkGateway"] = _gateway(message.network_gateway)
    if message.HasField("application_tunnel"):
        tunnel = message.application_tunnel
        found["applicationTunnel"] = {"protocol": _word(("NONE", "PROXY"), tunnel.protocol)}
        if tunnel.port:
            found["applicationTunnel"]["port"] = tunnel.port
    return found


def _gateway(message: workload_pb2.GatewayAddress) -> Plain:
    """By network/address or namespace/hostname: istioctl finds the service by either."""
    if message.WhichOneof("destination") == "hostname":
        destination = f"{message.hostname.namespace}/{message.hostname.hostname}"
    else:
        destination = _network_address(message.address)
    return {"destination": destination, "hboneMtlsPort": message.hbone_mtls_port}


def _network_address(message: workload_pb2.NetworkAddress) -> str:
    address = f"{message.network}/{_ip(message.address) if message.address else ''}"
    return f"{address}/{message.length}" if message.HasField("length") else address


def _ports(ports: Iterable[workload_pb2.Port]) -> dict[str, int]:
    return {str(port.service_port): port.target_port for port in ports}


def _service(message: workload_pb2.Service, members: list[workload_pb2.Workload]) -> Plain:
    name, ports = f"{message.namespace}/{message.hostname}", _ports(message.ports)
    takes_all = message.load_balancing.health_policy == workload_pb2.LoadBalancing.ALLOW_ALL
    found: Plain = {
        "name": message.name,
        "namespace": message.namespace,
        "hostname": message.hostname,
        "vips": [_network_address(address) for address in message.addresses],
        "ports": ports,
        "endpoints": {
            each.uid: {
                "workloadUid": each.uid,
                "service": name,
                "port": _ports(each.services[name].ports),
                "status": _word(_STATUS, each.status),
            }
            for each in members
            if takes_all or each.status == workload_pb2.HEALTHY
        },
        "subjectAltNames": list(message.subject_alt_names),
        "canonical": message.canonical,
    }
    if message.ip_families:
        found["ipFamilies"] = _word(_FAMILIES, message.ip_families)
    weighted = [each for each in message.weighted_waypoints if each.weight]
    if weighted:
        found["weightedWaypoints"] = [
            {**_gateway(each.destination), "weight": each.weight} for each in weighted
        ]
    if message.HasField("waypoint"):
        found["waypoint"] = _gateway(message.waypoint)
    elif weighted:  # istioctl reads this one alone: without it, it would say that there is none
        found["waypoint"] = _gateway(max(weighted, key=lambda each: each.weight).destination)
    if message.HasField("load_balancing"):
        balancing = message.load_balancing
        scopes = workload_pb2.LoadBalancing.Scope
        found["loadBalancer"] = {
            "mode": _word(_LB_MODES, balancing.mode),
            "routingPreferences": [scopes.Name(s).capitalize() for s in balancing.routing_preference],
            "healthPolicy": _word(_HEALTH_POLICIES, balancing.health_policy),
        }
    return found


def _policy(resource: Held) -> Plain:
    message = authorization_pb2.Authorization.FromString(resource.value)
    return {
        "name": message.name,
        "namespace": message.namespace,
        "scope": _word(_SCOPES, message.scope),
        "action": _word(_ACTIONS, message.action),
    }
