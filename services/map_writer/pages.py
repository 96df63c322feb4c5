"""What `pykmesh get --from state`, `diff` and `explain` read: the mesh as map_writer understands it.

What takes long is made in a thread, from the mesh as it is when it is asked for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import anyio
import anyio.to_thread
from msgspec.structs import astuple

from pykmesh.admin import Admin, Page, Query, as_json
from pykmesh.contracts.address import Mode, Service, Workload, workload_message
from pykmesh.contracts.digest import digest
from pykmesh.contracts.messages import ResourceType
from pykmesh.kernel.layout import Reason
from pykmesh.kernel.records import ENDPOINT_VALUE, ip_to_text, port_number, range_to_text
from services.map_writer import lookup
from services.map_writer.desired import PortId, Rules, desired_service
from services.map_writer.drift import Readable, drift
from services.map_writer.follower import Follower
from services.map_writer.mesh import Mesh, place_of
from services.map_writer.planner import Planner
from services.map_writer.slots import Slots, count, split

SETTLE_DEADLINE_S: Final = 20.0
SETTLE_POLL_S: Final = 0.02
LONG_DEADLINE_S: Final = 120.0


class View(NamedTuple):
    """What a page is made from: nothing of it changes meanwhile."""

    mesh: Mesh
    owners: dict[int, PortId]
    lists: dict[int, Slots]
    refused: dict[str, list[str]]
    """Services of which something does not fit, and what."""
    rules: Rules


class Inspection:
    """Makes the pages, one at a time, in a thread."""

    def __init__(
        self,
        follower: Follower,
        planner: Callable[[], Planner],
        maps: Readable,
        rules: Rules,
        is_settled: Callable[[], bool],
    ) -> None:
        """`is_settled`: the mesh is whole, and the maps were written last for what it is now."""
        self._follower = follower
        self._planner = planner
        self._maps = maps
        self._rules = rules
        self._is_settled = is_settled
        self._turn = anyio.Lock()

    def add_pages(self, admin: Admin) -> None:
        admin.page("/ids", lambda: {str(k): astuple(v) for k, v in self._planner().owner_of_list.items()})
        for path, look in (
            ("/services", _services),
            ("/workloads", _workloads),
            ("/endpoints", _endpoints),
            ("/policies", _policies),
        ):
            admin.route(path, partial(self._now, look), LONG_DEADLINE_S)
        admin.route("/drift", partial(self._settled, self._drift), LONG_DEADLINE_S)
        admin.route("/digests", partial(self._settled, _digests), LONG_DEADLINE_S)
        admin.route("/lookup", self._lookup, LONG_DEADLINE_S)

    def _view(self) -> View:
        planner = self._planner()
        refused = {name: planner.refusals_of(name) for name in planner.refused_services}
        return View(
            self._follower.mesh.as_it_is(),
            planner.owner_of_list.copy(),
            planner.held.lists.copy(),
            refused,
            self._rules,
        )

    async def _now(self, look: Callable[[View], Any], _: Query) -> Page:
        async with self._turn:
            return await anyio.to_thread.run_sync(_shown, look, self._view())

    async def _lookup(self, query: Query) -> Page:
        """`?service=NAME`, `?workload=NAME` or `?list=ID` (sixteen hex digits)."""
        async with self._turn:
            return await anyio.to_thread.run_sync(self._found, self._view(), query)

    def _found(self, view: View, query: Query) -> Page:
        match [*query.items()]:
            case [("service", name)]:
                return as_json(lookup.services(view.mesh, name))
            case [("workload", name)]:
                return as_json(lookup.workloads(view.mesh, name))
            case [("list", text)] if re.fullmatch("[0-9a-f]{16}", text):
                return as_json(lookup.members(view.mesh, view.owners, self._rules, int(text, 16)))
        return as_json({"error": "ask for one of service=NAME, workload=NAME, list=ID"}, 400)

    async def _settled(self, look: Callable[[Mesh], dict[str, Any]], _: Query) -> Page:
        """In the middle of a change there is nothing to compare: `settled` says whether there was."""
        async with self._turn:
            with anyio.move_on_after(SETTLE_DEADLINE_S):
                while not self._is_settled():  # noqa: ASYNC110  (seldom asked: no writer need tell of it)
                    await anyio.sleep(SETTLE_POLL_S)
            if not self._is_settled():
                return as_json({"settled": False})
            found = await anyio.to_thread.run_sync(look, self._follower.mesh.as_it_is())
        return await anyio.to_thread.run_sync(as_json, {"settled": True, **found})

    def _drift(self, mesh: Mesh) -> dict[str, Any]:
        return drift(mesh, self._maps, self._rules)


def _digests(mesh: Mesh) -> dict[str, Any]:
    addresses = {name: digest(service) for name, service in mesh.services.items()}
    addresses |= {name: digest(workload) for name, workload in mesh.workloads.items()}
    policies = {name: digest(policy) for name, policy in mesh.policies.items() if policy.is_read}
    return {"resources": {ResourceType.ADDRESS.name: addresses, ResourceType.AUTHORIZATION.name: policies}}


def _shown(look: Callable[[View], Any], view: View) -> Page:
    return as_json(look(view))


def _services(view: View) -> list[dict[str, Any]]:
    counts = _endpoint_counts(view)
    return [
        _service(view, service, counts.get(name, {})) for name, service in sorted(view.mesh.services.items())
    ]


def _endpoint_counts(view: View) -> dict[str, dict[int, int]]:
    """Of each service, how many endpoints each of its ports has in the maps, of both families."""
    found: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for list_id, slots in view.lists.items():
        if (owner := view.owners.get(list_id)) is not None:
            ports = found[owner.service]
            ports[owner.port] = ports.get(owner.port, 0) + count(slots)
    return found


def _service(view: View, service: Service, counts: dict[int, int]) -> dict[str, Any]:
    """`endpoints`: of the port with the most; a service without addresses has no lists: its members."""
    members = 0 if service.places else view.mesh.count_members(service.name)
    return {
        "name": service.name,
        "vips": [f"{network}/{ip_to_text(ip)}" for network, ip in service.vips]
        + [f"{found.network}/{range_to_text(found.ip, found.bits)}" for found in service.ranges],
        "ports": {str(port): target for port, target in service.ports},
        "endpoints": max(counts.values(), default=members),
        "waypoint": _waypoint(view.mesh, service),
        "refused": ", ".join(_refusals(view, service, counts)),
    }


def _waypoint(mesh: Mesh, service: Service) -> str:
    """Its name, or what is said of it, of several with their weights; empty where there is none."""
    names = []
    for said in service.waypoints:
        found = mesh.service_of(said)
        name = found.name if found else said.service or (ip_to_text(said.ip) if said.ip else "unknown")
        names.append(f"{name} ({said.weight})" if len(service.waypoints) > 1 else name)
    return ", ".join(names)


def _refusals(view: View, service: Service, counts: dict[int, int]) -> list[str]:
    """Why connections to a service, or to a part of it, do not get there."""
    found = [*view.refused.get(service.name, ())]
    if service.networks and view.rules.network not in service.networks:
        return [*found, f"not in this node's network {view.rules.network!r}"]
    if service.waypoints:
        desired = desired_service(view.mesh, service.name, view.rules)
        verdicts = {frontend.verdict for frontend in desired.frontends.values()}
        found += sorted(verdict.label for verdict in verdicts if verdict is not Reason.ROUTED)
    elif _is_somewhere(view.mesh, service) and service.mode is not Mode.PASSTHROUGH and not found:
        empty = [str(port) for port, _ in service.ports if not counts.get(port)]
        found += [f"no_endpoint ({', '.join(empty)})"] if empty else []
    for network, ip in service.places:
        place = place_of(network, ip)
        owner, own_view = view.mesh.vip_owner(place), view.mesh.scoped.get(place, {}).get(service.namespace)
        if owner == service.name:
            continue
        if own_view is not None and view.mesh.vip_owner(own_view) == service.name:
            found.append(f"{ip_to_text(ip)} is seen in {service.namespace} only")
        else:
            found.append(f"{ip_to_text(ip)} is that of {owner}")
    return found


def _is_somewhere(mesh: Mesh, service: Service) -> bool:
    """Whether an address of it is its own in anybody's eyes."""
    return any(mesh.vip_owner(place_of(*place)) == service.name for place in service.places)


def _workloads(view: View) -> list[dict[str, Any]]:
    found = sorted(view.mesh.all_workloads(), key=lambda workload: workload.uid)
    return [_workload(view.mesh, workload) for workload in found]


def _workload(mesh: Mesh, workload: Workload) -> dict[str, Any]:
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
        "policy_not_enforced": mesh.has_policy(workload),
        "policies_missing": [name for name in workload.policies if name not in mesh.policies],
    }


def _policies(view: View) -> list[dict[str, Any]]:
    """`namespace` is the scope: "" everything, null those workloads that name the policy."""
    return [
        {
            "name": name,
            "namespace": policy.namespace,
            "dry_run": policy.dry_run,
            "is_read": policy.is_read,
        }
        for name, policy in sorted(view.mesh.policies.items())
    ]


def _endpoints(view: View) -> list[dict[str, Any]]:
    found = []
    for list_id, port_id in view.owners.items():
        for slot, value in enumerate(split(view.lists.get(list_id, []))):
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
