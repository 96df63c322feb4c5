"""What the maps should say of a service or an address. Pure: from the mesh to keys and values.

A service port has one list of endpoints for each address family (`PortId`); the entries of `services`
name the list and how long it is. An IPv6 address of a service whose endpoints have IPv4 only names
the IPv4 list: the connection then goes to a v4-mapped address.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from pykmesh.contracts.address import Families, Mode, Service, Workload
from pykmesh.kernel.layout import AddressKind, Reason
from pykmesh.kernel.records import (
    ADDRESS_VALUE,
    ENDPOINT_VALUE,
    SERVICE_KEY,
    Ip,
    is_v4,
    network_id,
    port_bytes,
    stable_id,
)
from services.map_writer.mesh import Mesh, Place, place_of


class PortId(NamedTuple):
    """Names a list of endpoints; its id in the maps is a hash of this."""

    service: str
    port: int
    family: int

    @property
    def id(self) -> int:
        return stable_id(f"{self.service}|{self.port}|{self.family}")


class Frontend(NamedTuple):
    """An entry of `services`, but for the number of endpoints, which the list decides."""

    list_id: int
    verdict: Reason


class DesiredService(NamedTuple):
    """`lists` maps list ids to endpoint values (each with the workload it comes from)."""

    frontends: dict[bytes, Frontend]
    lists: dict[int, dict[bytes, str]]
    ports: dict[int, PortId]


NOTHING = DesiredService({}, {}, {})


class Rules(NamedTuple):
    """Settings that decide what is desired."""

    network: str = ""
    refuse_unenforced_policy: bool = False


def desired_service(mesh: Mesh, name: str, rules: Rules) -> DesiredService:
    """The entries that belong to one service; none when it is gone, or has no address of its own."""
    service = mesh.services.get(name)
    if service is None:
        return NOTHING
    vips = [vip for vip in service.vips if mesh.vip_owner(place_of(*vip)) == name]
    if not vips:
        return NOTHING
    found = DesiredService({}, {}, {})
    for port, target in service.ports:
        _add_port(found, mesh, service, port, target, vips, rules)
    return found


def _add_port(
    found: DesiredService,
    mesh: Mesh,
    service: Service,
    port: int,
    target: int,
    vips: list[tuple[str, Ip]],
    rules: Rules,
) -> None:
    ids = {family: PortId(service.name, port, family) for family in (4, 6)}
    lists: dict[int, dict[bytes, str]] = {4: {}, 6: {}}
    verdict = _verdict(service)
    if verdict is Reason.ROUTED:
        lists = _lists(mesh, service, port, target, rules)
        if not lists[4] and not lists[6]:
            verdict = _verdict_without_endpoints(mesh, service, rules)
    for network, ip in vips:
        family = 4 if is_v4(ip) or (lists[4] and not lists[6]) else 6
        list_id = ids[family].id
        found.ports[list_id] = ids[family]
        found.lists[list_id] = lists[family]
        found.frontends[SERVICE_KEY.pack(ip, network_id(network), port_bytes(port))] = Frontend(
            list_id, verdict
        )


def _verdict(service: Service) -> Reason:
    if service.has_waypoint:
        return Reason.WAYPOINT_UNSUPPORTED
    if service.mode is Mode.PASSTHROUGH:
        return Reason.PASSTHROUGH
    return Reason.ROUTED


def _verdict_without_endpoints(mesh: Mesh, service: Service, rules: Rules) -> Reason:
    """Refused for having none (the programs see the empty list), or for what a setting refuses."""
    if not rules.refuse_unenforced_policy:
        return Reason.ROUTED
    if any(mesh.has_policy(workload) for workload in mesh.members_of(service.name)):
        return Reason.POLICY_UNSUPPORTED
    return Reason.ROUTED


def _lists(mesh: Mesh, service: Service, port: int, target: int, rules: Rules) -> dict[int, dict[bytes, str]]:
    """Endpoints by family; each value with the workload that it comes from."""
    lists: dict[int, dict[bytes, str]] = {4: {}, 6: {}}
    id4, id6 = (PortId(service.name, port, family).id for family in (4, 6))
    skips4, skips6 = service.families is Families.V6, service.families is Families.V4
    pack = ENDPOINT_VALUE.pack
    for workload in _usable(mesh, service, rules):
        endpoint_port = target_port(workload, service.name, port, target)
        if not endpoint_port:
            continue
        port_field = port_bytes(endpoint_port)
        for ip in workload.addresses:
            if is_v4(ip):
                if not skips4:
                    lists[4][pack(id4, ip, port_field)] = workload.uid
            elif not skips6:
                lists[6][pack(id6, ip, port_field)] = workload.uid
    return lists


def _usable(mesh: Mesh, service: Service, rules: Rules) -> Iterator[Workload]:
    for workload in mesh.members_of(service.name):
        if not workload.healthy and not service.allows_unhealthy:
            continue
        if workload.capacity == 0 or workload.network != rules.network:
            continue
        if rules.refuse_unenforced_policy and mesh.has_policy(workload):
            continue
        yield workload


def target_port(workload: Workload, service: str, port: int, target: int) -> int:
    """The workload's own port for a service port, else the service's; 0: it has none (xds.md 3.2)."""
    for name, ports in workload.services:
        if name == service:
            for service_port, own in ports:
                if service_port == port:
                    return own or target
    return target


def desired_address(mesh: Mesh, place: Place, rules: Rules) -> bytes | None:
    """The entry that says what an address is: a service's before a workload's. None: nobody's."""
    owner = mesh.vip_owner(place)
    if owner is not None:
        return _address_value(AddressKind.SERVICE, _address_verdict(mesh.services[owner]))
    pod = mesh.pod_at(place)
    if pod is None:
        return None
    if pod.has_waypoint:
        return _address_value(AddressKind.WORKLOAD, Reason.WAYPOINT_UNSUPPORTED)
    if rules.refuse_unenforced_policy and mesh.has_policy(pod):
        return _address_value(AddressKind.WORKLOAD, Reason.POLICY_UNSUPPORTED)
    return _PLAIN_WORKLOAD


@cache
def _address_value(kind: AddressKind, verdict: Reason) -> bytes:
    return ADDRESS_VALUE.pack(kind, verdict)


_PLAIN_WORKLOAD = _address_value(AddressKind.WORKLOAD, Reason.ROUTED)


def _address_verdict(service: Service) -> Reason:
    """For ports that the service does not have: refused, unless all its traffic is left alone."""
    passes = service.mode is Mode.PASSTHROUGH and not service.has_waypoint
    return Reason.PASSTHROUGH if passes else Reason.ROUTED
