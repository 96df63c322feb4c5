"""What `pykmesh get --from state` reads: the mesh as map_writer understands it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pykmesh.admin import Admin
from pykmesh.contracts.address import Service, Workload, workload_message
from pykmesh.kernel.records import ENDPOINT_VALUE, ip_to_text, port_number, range_to_text
from services.map_writer.follower import Follower
from services.map_writer.mesh import place_of
from services.map_writer.planner import Planner


def add_pages(admin: Admin, follower: Follower, planner: Callable[[], Planner]) -> None:
    admin.page(
        "/services", lambda: [_service(follower, planner(), name) for name in sorted(follower.mesh.services)]
    )
    admin.page("/workloads", lambda: _workloads(follower))
    admin.page("/endpoints", lambda: _endpoints(planner()))
    admin.page("/ids", lambda: {str(k): [*v] for k, v in planner().owner_of_list.items()})


def _service(follower: Follower, planner: Planner, name: str) -> dict[str, Any]:
    service = follower.mesh.services[name]
    return {
        "name": name,
        "vips": [f"{network}/{ip_to_text(ip)}" for network, ip in service.vips]
        + [f"{found.network}/{range_to_text(found.ip, found.bits)}" for found in service.ranges],
        "ports": {str(port): target for port, target in service.ports},
        "endpoints": follower.mesh.count_members(name),
        "refused": ", ".join(_refusals(follower, planner, service)),
    }


def _refusals(follower: Follower, planner: Planner, service: Service) -> list[str]:
    """Why connections to a service, or to a part of it, do not get there."""
    found = ["waypoint_unsupported"] if service.has_waypoint else planner.refusals_of(service.name)
    for network, ip in service.places:
        owner = follower.mesh.vip_owner(place_of(network, ip))
        if owner != service.name:
            found.append(f"{ip_to_text(ip)} is that of {owner}")
    return found


def _workloads(follower: Follower) -> list[dict[str, Any]]:
    found = sorted(follower.mesh.all_workloads(), key=lambda workload: workload.uid)
    return [_workload(follower, workload) for workload in found]


def _workload(follower: Follower, workload: Workload) -> dict[str, Any]:
    message = workload_message(workload.raw)
    return {
        "uid": workload.uid,
        "name": message.name,
        "namespace": message.namespace,
        "network": workload.network,
        "addresses": [ip_to_text(ip) for ip in workload.addresses],
        "node": message.node,
        "healthy": workload.healthy,
        "services": {name: {str(p): t for p, t in ports} for name, ports in workload.services},
        "policy_not_enforced": follower.mesh.has_policy(workload),
        "policies_missing": [name for name in workload.policies if name not in follower.mesh.policies],
    }


def _endpoints(planner: Planner) -> list[dict[str, Any]]:
    found = []
    for list_id, port_id in planner.owner_of_list.items():
        for slot, value in enumerate(planner.held.lists.get(list_id, ())):
            _, ip, port = ENDPOINT_VALUE.unpack(value)
            found.append(
                {
                    "service": port_id.service,
                    "port": port_id.port,
                    "slot": slot,
                    "endpoint": ip_to_text(ip),
                    "endpoint_port": port_number(port),
                }
            )
    return found
