"""Answers who goes by way of a waypoint, and where the endpoints of services are, for waypoint_mgr."""

from __future__ import annotations

from pykmesh.contracts import messages
from pykmesh.contracts.waypoints import (
    Endpoint,
    MeshService,
    ServicePort,
    WaypointsReply,
    WaypointsRequest,
)
from pykmesh.kernel.records import ip_to_text
from services.map_writer.desired import Rules, own_endpoints, target_port
from services.map_writer.follower import Follower
from services.map_writer.identities import Identities
from services.map_writer.mesh import place_of
from services.map_writer.principals import Principals


class Waypoints:
    """Reads the state that the loop owns; never changes it."""

    def __init__(self, follower: Follower, rules: Rules, identities: Identities) -> None:
        self._follower = follower
        self._rules = rules
        self._identities = identities
        self._principals = Principals(identities)

    async def answer(self, data: bytes) -> bytes:
        """Raises ContractError."""
        request = messages.decode(WaypointsRequest, data)
        principals: dict[str, bytes] = {}
        if request.with_principals and self._follower.synced:
            principals = await self._principals.of(self._follower.mesh)
        return messages.encode(self._reply(request, principals))

    def _reply(self, request: WaypointsRequest, principals: dict[str, bytes]) -> WaypointsReply:
        mesh = self._follower.mesh
        if not self._follower.synced:
            return WaypointsReply(messages.VERSION, is_synced=False)
        users = {
            name: sorted(mesh.waypoint_users(mesh.services[name]))
            for name in request.waypoints
            if name in mesh.services
        }
        wanted = dict.fromkeys([*(user for names in users.values() for user in names), *request.backends])
        if request.namespaces:
            namespaces = set(request.namespaces)
            wanted |= dict.fromkeys(n for n in mesh.services if n.partition("/")[0] in namespaces)
        wanted |= dict.fromkeys(each.uid for each in mesh.workloads_in(request.workload_namespaces))
        revisions = frozenset(request.revisions)
        services = [
            self._service(name, with_revisions=name in revisions) for name in wanted if name in mesh.services
        ]
        services += [self._workload(uid) for uid in wanted if uid in mesh.workloads]
        return WaypointsReply(
            messages.VERSION,
            is_synced=True,
            users=users,
            services=services,
            namespace_ids={n: self._identities.namespace_id(n) for n in request.client_namespaces},
            account_ids={a: self._identities.account_id(a) for a in request.client_accounts},
            principals=principals,
            service_secret=self._identities.service_secret,
        )

    def _workload(self, uid: str) -> MeshService:
        """The ports of services at which it is an endpoint."""
        mesh = self._follower.mesh
        workload = mesh.workload(uid)
        vips = (
            [ip_to_text(ip) for ip in workload.addresses] if workload.network == self._rules.network else []
        )
        served: dict[int, tuple[str, int]] = {}
        for name, _ in sorted(workload.services):
            for port, target in mesh.services[name].ports if name in mesh.services else ():
                if own := target_port(workload.services, name, port, target):
                    served.setdefault(own, (name, port))
        owned = [
            vip
            for vip, ip in zip(vips, workload.addresses, strict=False)
            if mesh.pod_at(place_of(workload.network, ip)) is workload
        ]
        ports = [
            ServicePort(
                own, [Endpoint(vips[0], own, others=[vip for vip in owned if vip != vips[0]])], serves
            )
            for own, serves in served.items()
            if vips
        ]
        return MeshService(uid, vips, ports, owned)

    def _service(self, name: str, *, with_revisions: bool) -> MeshService:
        mesh = self._follower.mesh
        service = mesh.services[name]
        ports = own_endpoints(mesh, service, self._rules, with_revisions=with_revisions)
        here = [place for place in service.vips if place[0] == self._rules.network]
        return MeshService(
            name,
            [ip_to_text(ip) for _, ip in here],
            [ServicePort(port, endpoints) for port, endpoints in ports.items()],
            [ip_to_text(ip) for network, ip in here if mesh.vip_owner(place_of(network, ip)) == name],
        )
