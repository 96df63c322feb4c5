"""Services and routes, translated to the configuration of a waypoint's Envoys. Pure.

Routes attached to a Service go before those attached to the waypoint's Gateway; a service without any is
reached straight. Among all matches for a host and port the order is Gateway API's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from pykmesh.contracts.handoff import told_address
from pykmesh.contracts.waypoints import MeshService, is_workload, namespace_of
from pykmesh.kernel.records import ip_from_text
from pykmesh.manifests.http_route import HTTPMethod, RouteMatch
from pykmesh.manifests.objects import Gateway, Labels, ObjectRef, Service, SessionAffinity, ref_of
from services.waypoint_mgr import cors, envoy, principals
from services.waypoint_mgr.attachments import (
    ACCEPTED,
    UNSUPPORTED_VALUE,
    Condition,
    Mesh,
    age,
    attach,
    carried,
)
from services.waypoint_mgr.destinations import (
    Destinations,
    Encryption,
    cluster_fields,
    connection_fields,
    hash_policies,
)
from services.waypoint_mgr.envoy import Json, Port
from services.waypoint_mgr.limits import misread, rate_limit
from services.waypoint_mgr.policies import Clients, Guard
from services.waypoint_mgr.protocols import AppProtocol
from services.waypoint_mgr.rules import Target, action_of, match_fields, rank, straight_to, tcp_target
from services.waypoint_mgr.source import Authentication, BackendTLS, Destination, Policy, Route, Virtual
from services.waypoint_mgr.spans import CLUSTER, Spans
from services.waypoint_mgr.tls import NO_ROOTS, Roots
from services.waypoint_mgr.tokens import NO_KEYS, Tokens
from services.waypoint_mgr.virtual import VirtualServices

ACCESS_LOG: Final = "pykmesh.io/access-log"
"""An annotation of the Gateway; "true": its Envoys log each request on their standard output."""

_ANY_HOST: Final = "*"


class Configuration(msgspec.Struct, frozen=True):
    """A waypoint's resources by name, in proto JSON, but for the listener: its address is an instance's."""

    chains: tuple[Json, ...] = ()
    routes: Mapping[str, Json] = {}
    clusters: Mapping[str, Json] = {}
    assignments: Mapping[str, Json] = {}
    protocols: Mapping[Port, AppProtocol] = {}
    """What each port is taken to carry."""
    conditions: tuple[Condition, ...] = ()
    policies: tuple[Condition, ...] = ()
    """What is said of AuthorizationPolicies."""
    destinations: tuple[Condition, ...] = ()
    """And of DestinationRules."""
    virtuals: tuple[Condition, ...] = ()
    """And of VirtualServices."""
    authentications: tuple[Condition, ...] = ()
    """And of RequestAuthentications."""
    conflicts: tuple[str, ...] = ()
    """Services that claim an address and port that another one has: its owner, else the first by name."""
    misread: tuple[str, ...] = ()
    """Annotations that say nothing that is understood."""

    def listener(self, address: str, port: int) -> Json:
        return envoy.listener(address, port, self.chains)

    @property
    def refused(self) -> frozenset[ObjectRef]:
        """Routes that are wrong in themselves: what they said before may be put in their place."""
        return frozenset(
            condition.of
            for condition in (*self.conditions, *self.virtuals)
            if condition.type == ACCEPTED and condition.reason == UNSUPPORTED_VALUE
        )


class Wanted(msgspec.Struct, frozen=True):
    """What is said of how to serve: of all waypoints."""

    routes: Sequence[Route] = ()
    policies: Sequence[Policy] = ()
    destinations: Sequence[Destination] = ()
    virtuals: Sequence[Virtual] = ()
    authentications: Sequence[Authentication] = ()
    key_errors: Mapping[str, str] = {}
    """Of places whose keys have not come, why."""
    backend_tls: Sequence[BackendTLS] = ()
    roots: Roots = NO_ROOTS
    only_tls: bool = False
    """Nothing of DestinationRules counts but what they close."""
    namespaces: Mapping[str, Labels] = {}
    """The labels of each that is said."""
    blamed: Mapping[ObjectRef, str] = {}
    """Objects that no Envoy takes, and why: of those nothing counts but that they guard."""
    blamed_routes: Sequence[Route] = ()

    def blaming(self, blamed: Mapping[ObjectRef, str]) -> Wanted:
        """Without these, but what they guard is closed."""
        return msgspec.structs.replace(
            self,
            routes=[each for each in self.routes if each.ref not in blamed],
            virtuals=[each for each in self.virtuals if each.ref not in blamed],
            policies=[each.denying_all if each.ref in blamed else each for each in self.policies],
            authentications=[
                each.with_keys_of_nobody(NO_KEYS) if each.ref in blamed else each
                for each in self.authentications
            ],
            backend_tls=[each._replace(tls=None) if each.by in blamed else each for each in self.backend_tls],
            blamed=blamed,
            blamed_routes=[*self.blamed_routes, *(each for each in self.routes if each.ref in blamed)],
        )

    @property
    def reduced(self) -> Wanted:
        """Without what an Envoy may refuse though it seemed right; no token is good then."""
        unknown = [each.with_keys_of_nobody(NO_KEYS) for each in self.authentications]
        return msgspec.structs.replace(self, virtuals=(), authentications=unknown, only_tls=True)


def translate(
    waypoint: Gateway,
    users: Sequence[MeshService],
    known: Mapping[str, MeshService],
    services: Mapping[str, Service],
    wanted: Wanted,
    domain: str,
    clients: Clients | None = None,
    spans: Spans | None = None,
    names: Path | None = None,
) -> Configuration:
    """`users`: services whose traffic goes by way of it. `known`, `services`: by `namespace/hostname`.

    `names`: where clients' names are, if they are forwarded.
    """
    mesh = Mesh(users, known, services, domain, wanted.namespaces)
    made = _Translation(waypoint, mesh, services, wanted, clients or Clients(), spans, names)
    for user in mesh.users.values():
        for at in mesh.ports(user):
            made.take(user, at)
    return made.configuration()


class _Translation:
    """One waypoint's configuration while it is made, port by port of the services that go by way of it."""

    def __init__(
        self,
        waypoint: Gateway,
        mesh: Mesh,
        services: Mapping[str, Service],
        wanted: Wanted,
        clients: Clients,
        spans: Spans | None,
        names: Path | None,
    ) -> None:
        affine = {n for n, s in services.items() if s.spec.session_affinity is SessionAffinity.CLIENT_IP}
        self._waypoint, self._mesh, self._services = waypoint, mesh, services
        self._attached = attach(waypoint, mesh, wanted.routes)
        self._guard = Guard(waypoint, mesh, wanted.policies, clients)
        self._destinations = Destinations(
            waypoint,
            wanted.destinations,
            wanted.backend_tls,
            roots=wanted.roots,
            only_tls=wanted.only_tls,
            blamed=wanted.blamed,
            affine=affine,
        )
        self._tokens = Tokens(waypoint, mesh, wanted.authentications, wanted.key_errors)
        self._virtuals = VirtualServices(waypoint, mesh, wanted.virtuals, self._destinations)
        self._logs = waypoint.metadata.annotations.get(ACCESS_LOG) == "true"
        self._blamed = [*_blamed(waypoint, wanted, attach(waypoint, mesh, wanted.blamed_routes).conditions)]
        self._spans = spans
        self._tracing = spans.tracing(f"{waypoint.name}.{waypoint.namespace}") if spans else None
        self._first = [principals.script(names)] if names else []
        self._told = _Told(mesh, clients.service_secret)
        self._chains, self._routes = list[Json](), dict[str, Json]()
        self._protocols, self._as_backend = dict[Port, AppProtocol](), dict[Port, AppProtocol]()

    def take(self, user: MeshService, at: Port) -> None:
        """What comes to a port of a service, and what its routes lead to."""
        own = self._attached.to_ports.get(at, [])
        protocol = self._protocols[at] = self._mesh.protocol(at, carried(own))
        vips = self._told.free(user.vips, at)
        if not vips:
            return
        # A guest's route on the Gateway is for the guest's own services.
        behind = self._attached.of_gateway(protocol, (self._waypoint.namespace, namespace_of(user.name)))
        routed = [] if is_workload(user.name) else own or behind
        if protocol is AppProtocol.TCP:
            used = self._take_connections(at, vips, routed, is_own=bool(own))
        else:
            used = self._take_requests(user, at, vips, routed, is_own=bool(own))
        carries = max(carried(routed), min(protocol, AppProtocol.HTTP))
        for backend in used:
            self._as_backend[backend] = max(self._as_backend.get(backend, AppProtocol.TCP), carries)

    def _take_connections(
        self, at: Port, vips: list[str], routed: Sequence[Route], *, is_own: bool
    ) -> frozenset[Port]:
        said = self._virtuals.tcp_of(at, is_overridden=is_own) or _tcp_target(at, routed, self._mesh)
        by_source = self._destinations.is_by_source(said.backends or (at,))
        self._chains += self._guard.tcp_chains(at, vips, self._logs, said.to, is_by_source=by_source)
        return said.backends

    def _take_requests(
        self, user: MeshService, at: Port, vips: list[str], routed: Sequence[Route], *, is_own: bool
    ) -> frozenset[Port]:
        before = [*self._first, *self._tokens.filters(at)]
        after = [*rate_limit(self._services.get(user.name), at)]
        virtual = self._virtuals.of(at, is_overridden=is_own)
        if virtual is not None:
            after += virtual.filters
            used = virtual.backends
            kept = [_kept(route, sorted(used), self._destinations) for route in virtual.routes]
            self._routes[at.cluster] = _with_hosts(at, [_virtual_host(_ANY_HOST, kept)])
        else:
            after += [cors.FILTER] if _has_cors(routed) else []
            self._routes[at.cluster], used = _route_configuration(
                at, routed, self._mesh, self._destinations, is_by_host=not is_own
            )
        self._chains.append(self._guard.http_chain(at, vips, self._logs, self._tracing, before, after))
        return used

    def configuration(self) -> Configuration:
        """When all ports are taken."""
        mesh, guard, destinations, told = self._mesh, self._guard, self._destinations, self._told
        passing = list(_passing(mesh, guard, self._logs, told))
        spoken, without = self._spoken(), self._attached.without_ports(self._protocols, self._waypoint)
        ways = {at: destinations.encryption(at, spoken[at], mesh.port_name(at)) for at in sorted(spoken)}
        return Configuration(
            chains=(*self._chains, *passing),
            routes=self._routes,
            clusters={at.cluster: _cluster(at, spoken[at], destinations, way) for at, way in ways.items()}
            | ({CLUSTER: self._spans.cluster} if self._spans else {})
            | ({envoy.PASSING: envoy.passing_cluster()} if passing else {}),
            assignments={
                at.cluster: envoy.load_assignment(
                    at, [] if way.is_closed else mesh.endpoints(at, destinations.revision(at))
                )
                for at, way in ways.items()
            },
            protocols=spoken | self._protocols,
            conditions=self._told_of((*self._attached.conditions, *without), *_ROUTES),
            policies=self._told_of(guard.conditions(), "AuthorizationPolicy"),
            destinations=self._told_of(destinations.conditions(), *_DESTINATIONS),
            virtuals=self._told_of(self._virtuals.conditions(), "VirtualService"),
            authentications=self._told_of(self._tokens.conditions(), "RequestAuthentication"),
            conflicts=tuple(told.conflicts),
            misread=(
                *principals.misread(self._waypoint.metadata.annotations),
                *(one for name in mesh.users for one in misread(name, self._services.get(name))),
            ),
        )

    def _told_of(self, conditions: Iterable[Condition], *kinds: str) -> tuple[Condition, ...]:
        """Of those that are blamed that alone."""
        blamed = [one for one in self._blamed if one.of.kind in kinds]
        refs = {one.of for one in blamed}
        return (*(one for one in conditions if one.of not in refs), *blamed)

    def _spoken(self) -> dict[Port, AppProtocol]:
        """To the endpoints of each port: of one that is reached straight too, what routes to it carry."""
        return self._protocols | {
            at: max(self._protocols.get(at, AppProtocol.TCP), self._mesh.protocol(at, carries))
            for at, carries in self._as_backend.items()
        }


_ROUTES: Final = ("HTTPRoute", "GRPCRoute", "TCPRoute")
_DESTINATIONS: Final = ("DestinationRule", "BackendTLSPolicy")


def _blamed(waypoint: Gateway, wanted: Wanted, of_routes: Iterable[Condition]) -> Iterator[Condition]:
    """What is told of each, at what it names."""
    others = wanted.blamed.keys() - {each.ref for each in wanted.blamed_routes}
    said = [Condition(ref, ref_of(waypoint), ACCEPTED, True, ACCEPTED) for ref in sorted(others)]
    for one in (*said, *(each for each in of_routes if each.type == ACCEPTED)):
        message = f"no Envoy takes it: {wanted.blamed[one.of]}"
        yield msgspec.structs.replace(one, status=False, reason=UNSUPPORTED_VALUE, message=message)


def _passing(mesh: Mesh, guard: Guard, logs: bool, told: _Told) -> Iterator[Json]:
    """What is meant for a workload at a port of no service: no HTTP is looked for in it.

    Envoy looks by the port first: a port that any chain is for needs one of its own here.
    """
    used = {0, *(at.port for user in mesh.users.values() for at in mesh.ports(user))}
    for user in mesh.users.values():
        if not is_workload(user.name):
            continue
        for vip in user.vips:
            for port in sorted(used - {each.port for each in user.ports}):
                at = Port(user.name, port, subset=vip)
                if told.free([vip], at):
                    yield from guard.tcp_chains(at, [vip], logs, envoy.PASSING, [envoy.passed_to(vip)])


def _cluster(at: Port, protocol: AppProtocol, destinations: Destinations, way: Encryption) -> Json:
    policy = destinations.policy(at)
    fields = cluster_fields(policy) | way.socket
    return envoy.cluster(at, protocol, fields, connection_fields(policy), way.options)


def _tcp_target(at: Port, routes: Sequence[Route], mesh: Mesh) -> Target:
    """The oldest route's, or the service itself."""
    if not routes:
        return Target(at.cluster)
    (rule,) = routes[0].spec.rules
    return tcp_target(rule, partial(mesh.resolve, namespace=routes[0].namespace))


class _Told:
    """Of what is told of connections to an address and port, whose that is: first in the eyes of the kernel.

    Nobody's where it stands for addresses of two: neither shall get what is meant for the other.
    """

    def __init__(self, mesh: Mesh, secret: bytes) -> None:
        self._secret = secret
        self._owners: dict[tuple[str, int], str] = {}
        self.conflicts: list[str] = []
        for user in mesh.users.values():
            for vip in user.owned:
                for at in mesh.ports(user):
                    key = told_address(ip_from_text(vip), secret), at.port
                    if self._owners.setdefault(key, user.name) != user.name:
                        self._owners[key] = _NOBODYS

    def free(self, vips: Iterable[str], at: Port) -> list[str]:
        """The addresses at which nobody else is, each once: Envoy refuses two chains for one."""
        free: dict[str, str] = {}
        for vip in vips:
            told = told_address(ip_from_text(vip), self._secret)
            owner = self._owners.setdefault((told, at.port), at.service)
            if owner == at.service:
                free.setdefault(told, vip)
            elif owner == _NOBODYS:
                like = "cannot be told from an address of another service"
                self.conflicts.append(f"{at.service}: {vip} port {at.port} {like}: nobody is served there")
            else:
                self.conflicts.append(f"{at.service}: {vip} port {at.port} is {owner}'s")
        return list(free.values())


_NOBODYS: Final = ""


class _Entry(msgspec.Struct, frozen=True):
    """One match of one rule."""

    hosts: tuple[str, ...]
    order: tuple[object, ...]
    """Among all entries of a host."""
    fields: Json


def _has_cors(routes: Iterable[Route]) -> bool:
    return any(item.cors for route in routes for rule in route.spec.rules for item in rule.filters)


def _route_configuration(
    at: Port, routes: Sequence[Route], mesh: Mesh, destinations: Destinations, *, is_by_host: bool
) -> tuple[Json, frozenset[Port]]:
    """Without routes, straight to the service. Also returns the backends that it names.

    `is_by_host`: host names of the routes count. Not those of a Service's (GEP-1294).
    """
    if not routes:
        hosts = [_virtual_host(_ANY_HOST, [_kept(straight_to(at), [at], destinations)])]
        return _with_hosts(at, hosts), frozenset()
    entries, backends = list[_Entry](), set[Port]()
    for route in routes:
        asked = (is_by_host and route.spec.hostnames) or (_ANY_HOST,)
        resolve = partial(mesh.resolve, namespace=route.namespace)
        for index, rule in enumerate(route.spec.rules):
            action = action_of(rule, at, resolve, route.carries)
            backends |= action.backends
            name = {"name": f"{route.namespace}/{route.name}/{rule.name or index}"}
            fields = name | _kept(action.fields, sorted(action.backends), destinations)
            shared = [item.cors for item in rule.filters if item.cors and "route" in action.fields]
            for match in rule.matches or (RouteMatch(),):
                asked_for = match_fields(match)
                may_ask = shared if match.method in (None, HTTPMethod.OPTIONS) else []
                for refused in filter(None, (cors.refusal(each, asked_for) for each in may_ask)):
                    order = (rank(match), age(route), len(entries))
                    entries.append(_Entry(asked, order, name | refused))
                order = (rank(match), age(route), len(entries))
                entries.append(_Entry(asked, order, fields | {"match": asked_for}))
    by_host: dict[str, list[_Entry]] = {}
    for entry in entries:
        for host in dict.fromkeys(entry.hosts):
            by_host.setdefault(host, []).append(entry)
    return _with_hosts(at, [_host(name, by_host) for name in sorted(by_host)]), frozenset(backends)


def _kept(route: Json, backends: Iterable[Port], destinations: Destinations) -> Json:
    """With what keeps requests at their endpoints."""
    found = hash_policies(map(destinations.policy, backends))
    if not found or "route" not in route:
        return route
    return route | {"route": route["route"] | {"hashPolicy": found}}


def _with_hosts(at: Port, hosts: list[Json]) -> Json:
    return {"name": at.cluster, "virtualHosts": hosts, "ignorePortInHostMatching": True}


def _host(name: str, by_host: Mapping[str, list[_Entry]]) -> Json:
    """Requests of a host go by the routes that name it, then by those that name it less exactly."""
    seen, found = set[int](), list[Json]()
    for host in _covering(name):
        new = [entry for entry in by_host.get(host, ()) if id(entry) not in seen]
        seen.update(map(id, new))
        found += [entry.fields for entry in sorted(new, key=lambda entry: entry.order)]
    return _virtual_host(name, found)


def _covering(name: str) -> Iterator[str]:
    """The names of hosts, which may have a wildcard, that mean this one too: the most exact first."""
    yield name
    yield from (
        wider for at, letter in enumerate(name) if letter == "." and (wider := f"*{name[at:]}") != name
    )
    if name != _ANY_HOST:
        yield _ANY_HOST


def _virtual_host(name: str, routes: list[Json]) -> Json:
    return {"name": name, "domains": [name], "routes": routes}
