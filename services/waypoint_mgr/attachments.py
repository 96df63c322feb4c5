"""Which routes are for which ports of a waypoint's services, and what their authors are told.

A route attaches to a Service or ServiceEntry whose traffic goes by way of the waypoint, or to its Gateway, if
that lets its namespace in: then it is for the Gateway's services, or, of another namespace, for its own.
Backends in other namespaces need no ReferenceGrant, and policies for them are not asked: those are for what
comes to a service by way of its own waypoint.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple, TypeVar

import msgspec

from pykmesh.contracts.waypoints import Endpoint, MeshService, ServicePort, namespace_of
from pykmesh.manifests.http_route import BackendObjectRef, ParentRef
from pykmesh.manifests.objects import (
    Gateway,
    GatewayListener,
    Labels,
    ObjectRef,
    RouteGroupKind,
    Service,
    ref_of,
)
from services.waypoint_mgr.envoy import Port
from services.waypoint_mgr.protocols import AppProtocol, is_only_udp, protocol_of, says_tcp
from services.waypoint_mgr.rules import Unresolved, action_of, errors_in
from services.waypoint_mgr.source import Authentication, EntryHost, Policy, Route, is_exported, mesh_name

ACCEPTED: Final = "Accepted"
RESOLVED_REFS: Final = "ResolvedRefs"
PARTIALLY_INVALID: Final = "PartiallyInvalid"
UNSUPPORTED_VALUE: Final = "UnsupportedValue"
_P = TypeVar("_P", Policy, Authentication)
_NO_PORT: Final = ServicePort(0)
_KINDS: Final = (AppProtocol.HTTP2, AppProtocol.HTTP, AppProtocol.TCP)
"""GRPCRoutes, HTTPRoutes and TCPRoutes."""
_ROUTE_KINDS: Final = ("GRPCRoute", "HTTPRoute", "TCPRoute")


class Condition(msgspec.Struct, frozen=True):
    """What a waypoint says of a route or policy, by Gateway API's types and reasons.

    `parent` is what a route names, at a port or section (of a Gateway a listener) if it says one; of a policy
    the waypoint.
    """

    of: ObjectRef
    parent: ObjectRef
    type: str
    status: bool
    reason: str
    message: str = ""
    section: str = ""
    port: int = 0
    generation: int = 0
    """Of the route, as an API server counts."""


class Listener(msgspec.Struct, frozen=True):
    """What is said of a Gateway's listener."""

    name: str
    kinds: tuple[str, ...]
    """Of the routes that it takes."""
    are_kinds_known: bool
    """Whether that is all that it is to take."""
    routes: int
    """How many it has."""


class Mesh:
    """The services that a waypoint may meet, by `namespace/hostname`."""

    def __init__(
        self,
        users: Sequence[MeshService],
        known: Mapping[str, MeshService],
        services: Mapping[str, Service],
        domain: str,
        namespaces: Mapping[str, Labels],
    ) -> None:
        """`namespaces`: the labels of each."""
        self.namespaces = namespaces
        self.users = {user.name: user for user in sorted(users, key=lambda user: user.name)}
        self._known = {**known, **self.users}
        self._services = services
        self._domain = domain
        self._entries: dict[ObjectRef, list[str]] = {}
        for name, service in services.items():
            if isinstance(service, EntryHost):
                ref = ObjectRef("ServiceEntry", service.namespace, service.name)
                self._entries.setdefault(ref, []).append(name)

    def name_of(self, namespace: str, name: str) -> str:
        """Of a Kubernetes Service."""
        return mesh_name(namespace, name, self._domain)

    def users_of(self, ref: ObjectRef) -> list[MeshService]:
        """Of a Service, or a ServiceEntry, those that go by way of the waypoint."""
        names = self._entries.get(ref, [])
        if ref.kind == "Service":
            names = [self.name_of(ref.namespace, ref.name)]
        return [self.users[name] for name in names if name in self.users]

    def ports(self, user: MeshService) -> Iterator[Port]:
        """Those that connections go to."""
        for port in user.ports:
            if not is_only_udp(self._services.get(user.name), port.port):
                yield Port(user.name, port.port)

    def port_name(self, at: Port) -> str:
        service = self._services.get(at.service)
        names = [item.name for item in service.spec.ports if item.port == at.port] if service else []
        return names[0] if names else ""

    def protocol(self, at: Port, routed_as: AppProtocol) -> AppProtocol:
        """Of a workload's port it is that of the service which it serves there."""
        serves = self._port(at).serves or (at.service, at.port)
        return protocol_of(self._services.get(serves[0]), serves[1], routed_as)

    def says_tcp(self, at: Port) -> bool:
        serves = self._port(at).serves or (at.service, at.port)
        return says_tcp(self._services.get(serves[0]), serves[1])

    def _port(self, at: Port) -> ServicePort:
        found = self._known.get(at.service)
        return next((each for each in found.ports if each.port == at.port), _NO_PORT) if found else _NO_PORT

    def endpoints(self, at: Port, revision: str | None = None) -> Sequence[Endpoint]:
        """`revision`: those of which alone."""
        found = self._port(at).endpoints
        return found if revision is None else [each for each in found if each.revision == revision]

    def _is_seen_in(self, name: str, namespace: str) -> bool:
        found = self._services.get(name)
        return not isinstance(found, EntryHost) or is_exported(found.export_to, found.namespace, namespace)

    def _is_entry(self, name: str) -> bool:
        return isinstance(self._services.get(name), EntryHost)

    def at_host(self, host: str, namespace: str, port: int | None, asked: int) -> Port | None:
        """A host's port: that which is said, its only one, or the one that was asked for.

        Of several that have the host it is the one in the namespace, else a Kubernetes Service.
        """
        found = [
            name
            for name in self._known
            if name.partition("/")[2] == host and self._is_seen_in(name, namespace)
        ]
        if not found:
            return None
        name = min(found, key=lambda name: (name.partition("/")[0] != namespace, self._is_entry(name), name))
        ports = [one.port for one in self._known[name].ports]
        wanted = port or (ports[0] if len(ports) == 1 else asked)
        return Port(name, wanted) if wanted in ports else None

    def resolve(self, ref: BackendObjectRef, namespace: str) -> Port | Unresolved:
        """`namespace`: of the route."""
        if ref.is_hostname:
            if ref.namespace:
                return Unresolved("InvalidKind", f"Hostname {ref.name}: it has no namespace")
            found = self.at_host(ref.name, namespace, ref.port, 0)
            return found or Unresolved("BackendNotFound", f"there is no host {ref.name} with port {ref.port}")
        if not ref.is_service:
            what = f"{ref.group}/{ref.kind} {ref.name}"
            return Unresolved("InvalidKind", f"{what}: only a Service or a Hostname is a backend")
        name = self.name_of(ref.namespace or namespace, ref.name)
        service = self._known.get(name)
        if service is None:
            return Unresolved("BackendNotFound", f"there is no Service {name}")
        if all(port.port != ref.port for port in service.ports):
            return Unresolved("BackendNotFound", f"Service {name} has no port {ref.port}")
        return Port(name, ref.port or 0)


def targeted(found: Sequence[_P], waypoint: Gateway, mesh: Mesh) -> tuple[list[_P], list[_P]]:
    """Policies for all that goes by way of a waypoint, and those for services of it alone."""
    name, class_name = mesh.name_of(waypoint.namespace, waypoint.name), waypoint.spec.gateway_class_name
    of_all = [one for one in found if name in one.waypoints or class_name in one.classes]
    return of_all, [one for one in found if one not in of_all and one.services & mesh.users.keys()]


class Attached(msgspec.Struct, frozen=True):
    """The accepted routes, in the order of their age."""

    to_ports: dict[Port, list[Route]]
    to_gateway: list[Route]
    conditions: list[Condition]

    def of_gateway(self, protocol: AppProtocol, namespaces: Container[str]) -> list[Route]:
        """Those of these namespaces that route what a port carries."""
        is_tcp = protocol is AppProtocol.TCP
        return [
            route
            for route in self.to_gateway
            if (route.carries is AppProtocol.TCP) == is_tcp and route.namespace in namespaces
        ]

    def without_ports(self, protocols: Mapping[Port, AppProtocol], waypoint: Gateway) -> Iterator[Condition]:
        """What is said of the Gateway's routes that are for none of the ports which come by way of it.

        `protocols`: what each of these carries.
        """
        for route in self.to_gateway:
            is_tcp = route.carries is AppProtocol.TCP
            found = [
                (protocol is AppProtocol.TCP) == is_tcp
                for at, protocol in protocols.items()
                if route.namespace in (waypoint.namespace, namespace_of(at.service))
            ]
            if not found or any(found):
                continue
            what = "TCP alone" if is_tcp else "HTTP (a Service says so by a port's name or appProtocol)"
            message = f"it is for no port: none that goes this way carries {what}"
            for each in self.conditions:
                if (each.of, each.parent, each.type) == (route.ref, ref_of(waypoint), ACCEPTED):
                    yield msgspec.structs.replace(
                        each, type=PARTIALLY_INVALID, reason=UNSUPPORTED_VALUE, message=message
                    )


class _Refusal(NamedTuple):
    reason: str
    message: str


def attach(waypoint: Gateway, mesh: Mesh, routes: Sequence[Route]) -> Attached:
    """Of several kinds for one port the first counts, whatever their age (GEP-1294)."""
    attached = Attached({}, [], [])
    for route in sorted(routes, key=lambda route: (_KINDS.index(route.carries), *age(route))):
        parents = [(parent, _parent_ref(route, parent)) for parent in route.spec.parent_refs]
        ours = [(parent, ref) for parent, ref in parents if _is_ours(ref, waypoint, mesh)]
        if ours:
            _attach_route(route, ours, waypoint, mesh, attached)
    return attached


def carried(routes: Iterable[Route]) -> AppProtocol:
    """What a port with these routes carries, if it does not say so itself."""
    return max((route.carries for route in routes), default=AppProtocol.TCP)


def age(route: Route) -> tuple[str, str, str]:
    """Sorts the oldest first; objects of a folder have no age, so their names decide."""
    return route.created, route.namespace, route.name


def _attach_route(
    route: Route,
    parents: list[tuple[ParentRef, ObjectRef]],
    waypoint: Gateway,
    mesh: Mesh,
    attached: Attached,
) -> None:
    errors = [error for rule in route.spec.rules for error in errors_in(rule)]
    for parent, ref in parents:
        found = _Refusal(UNSUPPORTED_VALUE, "; ".join(errors)) if errors else None
        found = found or _refusal(route, parent, ref, waypoint, mesh)
        ports = [] if found else list(_ports_of(route, parent, ref, mesh))
        others = {
            port: other for port in ports if (other := _goes_before(route, attached.to_ports.get(port, ())))
        }
        if others and len(others) == len(ports):
            found = _Refusal("Conflicted", _told_of(others))
        if found:
            said = [Condition(route.ref, ref, ACCEPTED, False, found.reason, found.message)]
        else:
            said = [Condition(route.ref, ref, ACCEPTED, True, ACCEPTED), *_what_is_left_out(route, ref, mesh)]
            if others:
                said.append(
                    Condition(route.ref, ref, PARTIALLY_INVALID, True, UNSUPPORTED_VALUE, _told_of(others))
                )
        at = {"section": parent.section_name, "port": parent.port or 0, "generation": route.generation}
        attached.conditions.extend(msgspec.structs.replace(each, **at) for each in said)
        if found:
            continue
        if ref.kind == "Gateway":
            _add(attached.to_gateway, route)
        for port in ports:
            if port not in others:
                _add(attached.to_ports.setdefault(port, []), route)


def _goes_before(route: Route, there: Sequence[Route]) -> Route | None:
    """One that came first, where two cannot be for one port: of another kind, or TCPRoutes."""
    is_alone = route.carries is AppProtocol.TCP
    others = (each for each in there if each is not route and (is_alone or each.ref.kind != route.ref.kind))
    return next(others, None)


def _told_of(others: Mapping[Port, Route]) -> str:
    return "; ".join(
        f"port {port.port} goes by {other.ref}, which goes before" for port, other in others.items()
    )


def _add(routes: list[Route], route: Route) -> None:
    if not any(known is route for known in routes):
        routes.append(route)


def listeners_of(
    waypoint: Gateway, said: Iterable[Condition], namespaces: Mapping[str, Labels]
) -> tuple[Listener, ...]:
    """By what is said of the routes that name it."""
    attached = [
        each
        for each in said
        if each.parent == ref_of(waypoint)
        and each.type == ACCEPTED
        # one that is let in is attached, also where it cannot be honoured
        and (each.status or each.reason == UNSUPPORTED_VALUE)
    ]

    def routes(item: GatewayListener) -> int:
        found = {
            each.of
            for each in attached
            if each.section in ("", item.name)
            and each.port in (0, item.port)
            and item.takes(each.of.kind)
            and waypoint.lets_in(each.of.namespace, namespaces.get(each.of.namespace, {}), [item])
        }
        return len(found)

    return tuple(
        Listener(
            item.name,
            tuple(filter(item.takes, _ROUTE_KINDS)),
            {*item.allowed_routes.kinds} <= {RouteGroupKind(kind=kind) for kind in _ROUTE_KINDS},
            routes(item),
        )
        for item in waypoint.spec.listeners
    )


def _parent_ref(route: Route, parent: ParentRef) -> ObjectRef:
    return ObjectRef(parent.whole_kind, parent.namespace or route.namespace, parent.name)


def _is_ours(ref: ObjectRef, waypoint: Gateway, mesh: Mesh) -> bool:
    if ref.kind == "Gateway":
        return ref == ref_of(waypoint)
    return bool(mesh.users_of(ref))


def _refusal(
    route: Route, parent: ParentRef, ref: ObjectRef, waypoint: Gateway, mesh: Mesh
) -> _Refusal | None:
    if ref.kind == "Gateway":
        listeners = [
            item
            for item in waypoint.spec.listeners
            if parent.section_name in ("", item.name) and parent.port in (None, item.port)
        ]
        if not listeners and (parent.section_name or parent.port is not None):
            return _Refusal("NoMatchingParent", "the Gateway has no such listener")
        takers = [item for item in listeners if item.takes(route.ref.kind)]
        if listeners and not takers:
            what = f"no listener takes routes of kind {route.ref.kind} (allowedRoutes)"
            return _Refusal("NotAllowedByListeners", what)
        labels = mesh.namespaces.get(route.namespace, {})
        if not waypoint.lets_in(route.namespace, labels, takers):
            what = f"no listener lets routes of namespace {route.namespace} in (allowedRoutes)"
            return _Refusal("NotAllowedByListeners", what)
        return None
    if ref.namespace != route.namespace:
        what = f"a route for clients of one namespace (the {ref.kind} is in another)"
        return _Refusal("NotAllowedByParent", f"{what} is not honoured by waypoints")
    if not _ports_of(route, parent, ref, mesh):
        what = " that carries nothing but TCP" if route.carries is AppProtocol.TCP else " that may carry HTTP"
        return _Refusal("NoMatchingParent", f"the {ref.kind} has no such port{what}")
    return None


def _ports_of(route: Route, parent: ParentRef, ref: ObjectRef, mesh: Mesh) -> list[Port]:
    """Of a Service or ServiceEntry; none of a Gateway, which stands behind all."""
    found = (
        port
        for user in mesh.users_of(ref)
        for port in mesh.ports(user)
        if parent.port in (None, port.port) and parent.section_name in ("", mesh.port_name(port))
    )
    if route.carries is not AppProtocol.TCP:
        is_named = parent.port is not None or bool(parent.section_name)
        return [port for port in found if is_named or not mesh.says_tcp(port)]
    return [port for port in found if mesh.protocol(port, AppProtocol.TCP) is AppProtocol.TCP]


def _what_is_left_out(route: Route, parent: ObjectRef, mesh: Mesh) -> Iterator[Condition]:
    """Backends that are none, and what is not honoured."""
    resolve = partial(mesh.resolve, namespace=route.namespace)
    rules = route.spec.rules
    actions = [action_of(rule, Port("", 0), resolve, route.carries) for rule in rules]
    unresolved = list(dict.fromkeys(one for action in actions for one in action.unresolved))
    reason = unresolved[0].reason if unresolved else RESOLVED_REFS
    message = "; ".join(one.message for one in unresolved)
    yield Condition(route.ref, parent, RESOLVED_REFS, not unresolved, reason, message)
    dropped = [f"rules[{i}]: {what}" for i, action in enumerate(actions) for what in action.dropped]
    if route.spec.hostnames and parent.kind != "Gateway":
        dropped.append(f"hostnames (a route of a {parent.kind} is for whatever host is asked for there)")
    if dropped:
        message = f"not honoured: {'; '.join(dropped)}"
        yield Condition(route.ref, parent, PARTIALLY_INVALID, True, UNSUPPORTED_VALUE, message)
