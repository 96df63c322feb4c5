"""One service, list or workload by name: what `pykmesh explain` asks.

Who is an endpoint is read from what is desired; why another member is none follows its rules here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from msgspec.structs import replace

from pykmesh.contracts.address import Families, Mode, Service, Workload, workload_message
from pykmesh.contracts.waypoints import HANDOFF_PORT
from pykmesh.kernel.records import ENDPOINT_VALUE, Ip, ip_to_text, is_v4, port_number
from pykmesh.proto import workload_pb2
from services.map_writer.desired import PortId, Rules, desired_service, target_port
from services.map_writer.locality import is_ranked, locality, rank
from services.map_writer.mesh import Mesh, raw_of

V4: Final = 4
_SCOPES: Final[dict[int, str]] = {number: name for name, number in workload_pb2.LoadBalancing.Scope.items()}


def services(mesh: Mesh, name: str) -> list[dict[str, Any]]:
    """By `namespace/hostname`, hostname, or `name.namespace`."""
    return [
        {
            "service": service.name,
            "addresses": [[network, ip_to_text(ip)] for network, ip in service.vips]
            + [[found.network, ip_to_text(found.ip)] for found in service.ranges],
            "ports": [port for port, _ in service.ports],
        }
        for service in mesh.services.values()
        if name in (service.name, service.hostname, _short(service))
    ]


def _short(service: Service) -> str:
    return f"{service.hostname.partition('.')[0]}.{service.name.partition('/')[0]}"


def workloads(mesh: Mesh, name: str) -> list[dict[str, Any]]:
    """By uid, or `namespace/name`."""
    if name in mesh.workloads:
        return [_workload(mesh.workload(name))]
    namespace, _, own = name.partition("/")
    begins = workload_pb2.Workload(name=own, namespace=namespace).SerializeToString()
    found = [uid for uid, value in mesh.workloads.items() if begins in raw_of(value)]
    called = ((uid, workload_message(raw_of(mesh.workloads[uid]))) for uid in found)
    return [
        _workload(mesh.workload(uid))
        for uid, message in called
        if (message.namespace, message.name) == (namespace, own)
    ]


def _workload(workload: Workload) -> dict[str, Any]:
    message = workload_message(workload.raw)
    return {
        "uid": workload.uid,
        "name": f"{message.namespace}/{message.name}",
        "network": workload.network,
        "addresses": [ip_to_text(ip) for ip in workload.addresses],
    }


def members(mesh: Mesh, owners: Mapping[int, PortId], rules: Rules, list_id: int) -> dict[str, Any] | None:
    """The service of a list and all its workloads: whether each is in the list, or why it is not."""
    owner = owners.get(list_id)
    service = mesh.services.get(owner.service) if owner else None
    if owner is None or service is None:
        return None
    values = desired_service(mesh, service.name, rules).lists.get(list_id, {})
    used = {(ip, port_number(port)) for _, ip, port in map(ENDPOINT_VALUE.unpack, values)}
    waypoints = list(filter(None, map(mesh.service_of, service.waypoints)))
    if waypoints:
        owner, service = replace(owner, port=HANDOFF_PORT), waypoints[0]
    return {
        "service": " and ".join(f"waypoint {each.name}" for each in waypoints) or service.name,
        "port": owner.port,
        "family": owner.family,
        "mode": service.mode.name,
        "scopes": [_SCOPES[scope] for scope in service.scopes],
        "here": mesh.here._asdict(),
        "members": [
            member for each in waypoints or [service] for member in _members(mesh, each, rules, owner, used)
        ],
    }


def _members(
    mesh: Mesh, service: Service, rules: Rules, owner: PortId, used: set[tuple[Ip, int]]
) -> Iterator[dict[str, Any]]:
    """`used`: what is in the list."""
    members = {member.uid: member for member in mesh.members_of(service.name)}
    obstacles = {uid: [*_obstacles(mesh, service, rules, owner, member)] for uid, member in members.items()}
    matches = {uid: _matches(mesh, service, member) for uid, member in members.items()}
    best = max((matches[uid] for uid, why in obstacles.items() if not why), default=0)
    if service.mode is Mode.STRICT:
        best = len(service.scopes)
    for uid, member in members.items():
        ips, port = mesh.addresses_of(member), _own_port(service, owner, member)
        why = obstacles[uid]
        if is_ranked(service) and matches[uid] < best:
            why.append(f"too far: {matches[uid]} of {len(service.scopes)} match, {best} are needed")
        if member.capacity == 0:
            why.append("weight 0")
        if not why and used.isdisjoint((ip, port) for ip in ips):
            is_refused = service.name == owner.service and bool(service.waypoints)
            # The others are a waypoint's instances on this node.
            why.append("the service's waypoint is not known" if is_refused else "others are taken before it")
        yield {
            **_workload(member),
            "addresses": [ip_to_text(ip) for ip in ips],
            "port": port,
            "healthy": member.healthy,
            "weight": member.capacity,
            "locality": _where(member),
            "matches": matches[uid],
            "unused": "; ".join(why) if why else None,
        }


def _own_port(service: Service, owner: PortId, member: Workload) -> int:
    return target_port(member.services, service.name, owner.port, dict(service.ports).get(owner.port, 0))


def _where(member: Workload) -> str:
    found = locality(member.raw)
    return "/".join(part for part in (found.region, found.zone, found.subzone, found.node) if part)


def _obstacles(mesh: Mesh, service: Service, rules: Rules, owner: PortId, member: Workload) -> Iterator[str]:
    """What keeps it out by itself, so that it is not compared with others."""
    if not member.healthy and not service.allows_unhealthy:
        yield "unhealthy"
    if member.network != rules.network:
        yield f"in network {member.network or '(none)'}, not {rules.network or '(none)'}"
    if rules.refuse_unenforced_policy and mesh.has_policy(member):
        yield "has policies"
    if member.hostname and not mesh.addresses_of(member):
        yield f"host name {member.hostname} is not known"
    if not _own_port(service, owner, member):
        yield f"serves no port {owner.port}"
    if service.families is (Families.V6 if owner.family == V4 else Families.V4):
        yield f"the service has no IPv{owner.family}"
    elif not any(is_v4(ip) == (owner.family == V4) for ip in mesh.addresses_of(member)):
        yield f"has no IPv{owner.family} address"


def _matches(mesh: Mesh, service: Service, member: Workload) -> int:
    return rank(service.scopes, mesh.here, locality(member.raw))
