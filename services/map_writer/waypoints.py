"""Answers who goes by way of a waypoint, and where the endpoints of services are, for waypoint_mgr."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import anyio
import anyio.to_thread

from pykmesh.contracts import messages
from pykmesh.contracts.address import workload_message
from pykmesh.contracts.waypoints import (
    TRUST_DOMAIN,
    Endpoint,
    MeshService,
    ServicePort,
    WaypointsReply,
    WaypointsRequest,
    account_name,
)
from pykmesh.kernel.records import ip_to_text
from services.map_writer.desired import Rules, own_endpoints, target_port
from services.map_writer.follower import Follower
from services.map_writer.identities import Identities
from services.map_writer.mesh import place_of, raw_of


class Account(NamedTuple):
    namespace: str
    name: str
    """`contracts.waypoints.account_name`."""


class Principals:
    """Who workloads are, by SPIFFE names without the scheme; of each workload that is read once."""

    def __init__(self) -> None:
        self._read: dict[bytes, tuple[Account, str]] = {}

    def of(self, raws: Iterable[bytes]) -> dict[str, Account]:
        """An account that is in several trust domains has no name: ids do not tell them apart."""
        self._read = {raw: self._read.get(raw) or _account(raw) for raw in raws}
        names = dict[Account, set[str]]()
        for account, name in set(self._read.values()):
            names.setdefault(account, set()).add(name)
        return {name: account for account, (name, *others) in names.items() if name and not others}


def _account(raw: bytes) -> tuple[Account, str]:
    """And its principal; "" of a workload that says no namespace."""
    said = workload_message(raw)
    account = Account(said.namespace, account_name(said.namespace, said.service_account))
    domain, service_account = said.trust_domain or TRUST_DOMAIN, said.service_account or "default"
    return account, f"{domain}/ns/{said.namespace}/sa/{service_account}" if said.namespace else ""


class Waypoints:
    """Reads the state that the loop owns; never changes it."""

    def __init__(self, follower: Follower, rules: Rules, identities: Identities) -> None:
        self._follower = follower
        self._rules = rules
        self._identities = identities
        self._principals = Principals()
        self._reading = anyio.Lock()
        self._named: dict[str, bytes] = {}
        self._good_until = 0.0

    async def answer(self, data: bytes) -> bytes:
        """Raises ContractError."""
        request = messages.decode(WaypointsRequest, data)
        names = await self._principals_of_all() if request.with_principals else {}
        return messages.encode(self._reply(request, names))

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
        )

    async def _principals_of_all(self) -> dict[str, bytes]:
        """Beside the loop, and for a tenth of the time at most: it may take half a second."""
        async with self._reading:
            if time.monotonic() < self._good_until:
                return self._named
            began = time.monotonic()
            raws = [raw_of(workload) for workload in self._follower.mesh.workloads.values()]
            self._named = await anyio.to_thread.run_sync(self._principals_of, raws)
            ended = time.monotonic()
            self._good_until = ended + 9 * (ended - began)
            return self._named

    def _principals_of(self, raws: list[bytes]) -> dict[str, bytes]:
        found = self._principals.of(raws)
        namespace_id, account_id = self._identities.namespace_id, self._identities.account_id
        return {name: namespace_id(each.namespace) + account_id(each.name) for name, each in found.items()}

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
        ports = [ServicePort(own, [Endpoint(vips[0], own)], serves) for own, serves in served.items() if vips]
        owned = [
            vip
            for vip, ip in zip(vips, workload.addresses, strict=False)
            if mesh.pod_at(place_of(workload.network, ip)) is workload
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
