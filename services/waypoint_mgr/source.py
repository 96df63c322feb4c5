"""What is configured: Gateways that are waypoints, routes, policies, DestinationRules and services.

From a folder that is watched, here, or from an API server (cluster.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import anyio
import anyio.to_thread
import msgspec

from pykmesh.contracts.address import ROOT_NAMESPACE
from pykmesh.manifests.authorization_policy import Action, AuthorizationPolicySpec, Rule
from pykmesh.manifests.destination_rule import ClientTLS, DestinationRuleSpec
from pykmesh.manifests.folder import Folder
from pykmesh.manifests.http_route import HTTPRouteSpec, whole_kind
from pykmesh.manifests.objects import (
    GATEWAY_NAME,
    USE_WAYPOINT,
    USE_WAYPOINT_NAMESPACE,
    WAYPOINT_CLASSES,
    AuthorizationPolicy,
    BackendTLSPolicy,
    DestinationRule,
    Gateway,
    GRPCRoute,
    HTTPRoute,
    Labels,
    Namespace,
    Object,
    ObjectRef,
    Protocol,
    RequestAuthentication,
    Service,
    ServiceEntry,
    ServicePort,
    ServiceSpec,
    TCPRoute,
    VirtualService,
    ref_of,
    service_hostname,
)
from pykmesh.manifests.request_authentication import JWTRule, RequestAuthenticationSpec
from pykmesh.manifests.virtual_service import VirtualServiceSpec
from services.waypoint_mgr.keys import place_of
from services.waypoint_mgr.protocols import AppProtocol

DRY_RUN: Final = "istio.io/dry-run"
_OF_MESHES: Final = (".istio.io", "gateway.networking.k8s.io", "gateway.networking.x-k8s.io")
_T = TypeVar("_T", bound=Object)


def mesh_name(namespace: str, name: str, domain: str) -> str:
    """A Kubernetes service's name in the mesh, `namespace/hostname`."""
    return f"{namespace}/{service_hostname(name, namespace, domain)}"


class Route(msgspec.Struct, frozen=True):
    """An HTTPRoute, or another as the HTTPRoute that does the same."""

    ref: ObjectRef
    created: str
    spec: HTTPRouteSpec
    carries: AppProtocol = AppProtocol.HTTP
    """What it routes."""
    generation: int = 0

    @classmethod
    def of(cls, obj: HTTPRoute | GRPCRoute | TCPRoute) -> Route:
        carries = {GRPCRoute: AppProtocol.HTTP2, TCPRoute: AppProtocol.TCP}.get(type(obj), AppProtocol.HTTP)
        spec = obj.spec if isinstance(obj, HTTPRoute) else obj.spec.as_http
        return cls(ref_of(obj), obj.metadata.creation_timestamp, spec, carries, obj.metadata.generation)

    @property
    def namespace(self) -> str:
        return self.ref.namespace

    @property
    def name(self) -> str:
        return self.ref.name


class Policy(msgspec.Struct, frozen=True):
    """An AuthorizationPolicy, and what it is for, by names in the mesh."""

    ref: ObjectRef
    spec: AuthorizationPolicySpec
    is_dry_run: bool = False
    services: frozenset[str] = frozenset()
    waypoints: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()
    """Of Gateways."""
    unknown: tuple[str, ...] = ()
    """Targets that are none here."""

    @classmethod
    def of(
        cls, obj: AuthorizationPolicy, domain: str, entry_hosts: Mapping[ObjectRef, tuple[str, ...]]
    ) -> Policy:
        is_dry_run = obj.metadata.annotations.get(DRY_RUN, "").lower() == "true"
        return cls(ref_of(obj), obj.spec, is_dry_run, *_targets(obj, domain, entry_hosts))

    @property
    def denies(self) -> bool:
        """CUSTOM asks an authorizer of its own, which there is none of here."""
        return self.spec.action in (Action.DENY, Action.CUSTOM)

    @property
    def denying_all(self) -> Policy:
        """Of one that no Envoy takes: whom it is for nobody reaches."""
        spec = msgspec.structs.replace(self.spec, action=Action.DENY, rules=(Rule(),))
        return self if self.is_dry_run else msgspec.structs.replace(self, spec=spec)

    @property
    def not_enforced(self) -> str:
        """Why it refuses nothing; "" if it is enforced."""
        if self.is_dry_run:
            return f"the annotation {DRY_RUN} says that it is not to be enforced"
        return "AUDIT: nothing is logged" if self.spec.action is Action.AUDIT else ""


class Authentication(msgspec.Struct, frozen=True):
    """A RequestAuthentication, and what it is for, by names in the mesh."""

    ref: ObjectRef
    spec: RequestAuthenticationSpec
    services: frozenset[str] = frozenset()
    waypoints: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, obj: RequestAuthentication, domain: str, entry_hosts: Mapping[ObjectRef, tuple[str, ...]]
    ) -> Authentication:
        return cls(ref_of(obj), obj.spec, *_targets(obj, domain, entry_hosts))

    def with_keys_of_nobody(self, keys: str) -> Authentication:
        """The same rules, with what they look for and the headers that they take away. No token is good."""
        return self._with(
            msgspec.structs.replace(rule, jwks=keys, jwks_uri="") for rule in self.spec.jwt_rules
        )

    def with_keys(self, found: Mapping[str, str]) -> Authentication:
        """With the keys of places that are known, as if they stood in it."""
        return self._with(
            msgspec.structs.replace(rule, jwks=found[place], jwks_uri="")
            if (place := place_of(rule)) in found
            else rule
            for rule in self.spec.jwt_rules
        )

    def _with(self, rules: Iterable[JWTRule]) -> Authentication:
        return msgspec.structs.replace(self, spec=msgspec.structs.replace(self.spec, jwt_rules=tuple(rules)))


def _targets(
    obj: AuthorizationPolicy | RequestAuthentication,
    domain: str,
    entry_hosts: Mapping[ObjectRef, tuple[str, ...]],
) -> tuple[frozenset[str], frozenset[str], frozenset[str], tuple[str, ...]]:
    """Services, waypoints, classes of Gateways; and those that are none here."""
    services, waypoints, classes, unknown = set[str](), set[str](), set[str](), list[str]()
    for target in obj.spec.targets:
        name = mesh_name(obj.namespace, target.name, domain)
        if target.kind == "Service":
            services.add(name)
        elif target.kind == "Gateway":
            waypoints.add(name)
        elif target.kind == "GatewayClass" and obj.namespace == ROOT_NAMESPACE:
            classes.add(target.name)
        elif hosts := entry_hosts.get(ObjectRef(target.kind, obj.namespace, target.name)):
            services.update(f"{obj.namespace}/{host}" for host in hosts)
        else:
            unknown.append(f"{target.kind} {target.name}")
    return frozenset(services), frozenset(waypoints), frozenset(classes), tuple(unknown)


class Destination(msgspec.Struct, frozen=True):
    """A DestinationRule; `host` may begin with `*`."""

    ref: ObjectRef
    created: str
    host: str
    spec: DestinationRuleSpec

    @classmethod
    def of(cls, obj: DestinationRule, domain: str) -> Destination:
        """A short name is one of the rule's own namespace."""
        host = whole_host(obj.spec.host, obj.namespace, domain)
        return cls(ref_of(obj), obj.metadata.creation_timestamp, host, obj.spec)

    def says_of(self, hostname: str) -> int:
        """How much of a host's name it says; 0: it is not for this one."""
        return says_of(self.host, hostname)

    def is_seen_in(self, namespace: str) -> bool:
        return is_exported(self.spec.export_to, self.ref.namespace, namespace)


class Virtual(msgspec.Struct, frozen=True):
    """A VirtualService."""

    ref: ObjectRef
    created: str
    spec: VirtualServiceSpec
    domain: str

    @classmethod
    def of(cls, obj: VirtualService, domain: str) -> Virtual:
        return cls(ref_of(obj), obj.metadata.creation_timestamp, obj.spec, domain)

    @property
    def is_for_mesh(self) -> bool:
        """Not for gateways at the edge alone."""
        return not self.spec.gateways or "mesh" in self.spec.gateways

    @property
    def delegates(self) -> Iterator[ObjectRef]:
        """Those that it leaves some of its requests to."""
        for route in self.spec.http:
            if (to := route.delegate) is not None:
                yield ObjectRef(self.ref.kind, to.namespace or self.ref.namespace, to.name)

    def whole(self, host: str) -> str:
        """A short name is one of its own namespace."""
        return whole_host(host, self.ref.namespace, self.domain)

    def says_of(self, hostname: str) -> int:
        """How much of a host's name it says; 0: it is not for this one."""
        return max((says_of(self.whole(host), hostname) for host in self.spec.hosts), default=0)

    def is_seen_in(self, namespace: str) -> bool:
        return is_exported(self.spec.export_to, self.ref.namespace, namespace)

    def backends(self, *, with_subsets: bool = False) -> Iterator[tuple[str, str]]:
        """The hosts that it leads to, or to subsets of which: by their names in the mesh, and as they are."""
        for destination in self.spec.destinations:
            if not with_subsets or destination.subset:
                host = self.whole(destination.host)
                yield self._mesh_name(host), host

    def _mesh_name(self, host: str) -> str:
        parts = host.removesuffix(f".svc.{self.domain}").split(".")
        is_kubernetes = len(parts) == 2 and host != ".".join(parts)
        return f"{parts[1] if is_kubernetes else self.ref.namespace}/{host}"


def whole_host(host: str, namespace: str, domain: str) -> str:
    is_short = "." not in host and not host.startswith("*")
    return f"{host}.{namespace}.svc.{domain}" if is_short else host


def says_of(host: str, hostname: str) -> int:
    """How much of a host's name another one says, which may begin with `*`; 0: it means another."""
    if host == hostname:
        return len(hostname) + 1
    is_below = host.startswith("*") and hostname.endswith(host[1:])
    return len(host) if is_below else 0


def is_exported(export_to: Collection[str], own: str, namespace: str) -> bool:
    """Whether what is in a namespace holds in another."""
    return not export_to or any(
        to in ("*", namespace) or (to == "." and own == namespace) for to in export_to
    )


class BackendTLS(NamedTuple):
    """What is to be spoken to in TLS: a service's port, by its name, or all of its ports.

    `tls`: how; None: in a way that cannot be.
    """

    service: str
    port: str
    by: ObjectRef
    tls: ClientTLS | None


def _backends_of(
    policy: BackendTLSPolicy, domain: str, entry_hosts: Mapping[ObjectRef, tuple[str, ...]]
) -> Iterator[BackendTLS]:
    for target in policy.spec.targets:
        kind = whole_kind(target.group, target.kind)
        hosts = entry_hosts.get(ObjectRef(kind, policy.namespace, target.name), ())
        names = [f"{policy.namespace}/{host}" for host in hosts]
        if kind == "Service":
            names = [mesh_name(policy.namespace, target.name, domain)]
        tls = policy.spec.validation.client
        yield from (BackendTLS(name, target.section_name, ref_of(policy), tls) for name in names)


class EntryHost(Service, frozen=True, kw_only=True):
    """A host of a ServiceEntry, with that's name, as a Service of its ports."""

    export_to: tuple[str, ...] = ()


def _hosts_of(entry: ServiceEntry) -> Iterator[tuple[str, EntryHost]]:
    ports = tuple(
        ServicePort(
            port=each.number,
            name=each.name,
            protocol=Protocol.UDP if each.protocol.upper() == "UDP" else Protocol.TCP,
            app_protocol=each.protocol.lower() or "tcp",
        )
        for each in entry.spec.ports
    )
    for host in entry.spec.hosts:
        spec = ServiceSpec(ports=ports)
        made = EntryHost(metadata=entry.metadata, spec=spec, export_to=entry.spec.export_to)
        yield f"{entry.namespace}/{host}", made


_Guard = TypeVar("_Guard", Policy, Authentication, Destination)


class Objects(msgspec.Struct, frozen=True):
    """Waypoints and services by their names in the mesh (a waypoint is named as its own service is)."""

    waypoints: Mapping[str, Gateway] = {}
    services: Mapping[str, Service] = {}
    routes: tuple[Route, ...] = ()
    policies: tuple[Policy, ...] = ()
    destinations: tuple[Destination, ...] = ()
    virtuals: tuple[Virtual, ...] = ()
    authentications: tuple[Authentication, ...] = ()
    backend_tls: tuple[BackendTLS, ...] = ()
    namespaces: Mapping[str, Labels] = {}
    """Those that are said, with their labels."""
    errors: tuple[str, ...] = ()
    is_whole: bool = True
    """False when a file, or part of one, counts as it last was, or not at all."""
    is_known: bool = True
    """False when something counts not at all that never was good."""
    ignored: tuple[str, ...] = ()
    """Kinds of Istio and Gateway API that are there and not read."""

    @classmethod
    def of(
        cls,
        objects: Iterable[Object],
        domain: str,
        *,
        errors: Iterable[str] = (),
        is_whole: bool = True,
        is_known: bool = True,
        ignored: Iterable[str] = (),
        classes: Collection[str] = WAYPOINT_CLASSES,
    ) -> Objects:
        """`classes`: of the Gateways that are waypoints here."""
        objects = [*objects]
        gateways = (o for o in objects if isinstance(o, Gateway) and o.spec.gateway_class_name in classes)
        entries = [o for o in objects if isinstance(o, ServiceEntry)]
        oldest_last = sorted(entries, key=lambda o: (o.metadata.creation_timestamp, o.name), reverse=True)
        services = [o for o in objects if isinstance(o, Service)]
        entry_hosts = {ref_of(o): o.spec.hosts for o in entries}
        return cls(
            waypoints=_by_mesh_name(gateways, domain),
            services=_by_mesh_name((o for o in services if o.is_external_name), domain)
            | dict(pair for each in oldest_last for pair in _hosts_of(each))
            | _by_mesh_name((o for o in services if not o.is_external_name), domain),
            routes=tuple(Route.of(o) for o in objects if isinstance(o, HTTPRoute | GRPCRoute | TCPRoute)),
            policies=tuple(
                Policy.of(o, domain, entry_hosts) for o in objects if isinstance(o, AuthorizationPolicy)
            ),
            destinations=tuple(Destination.of(o, domain) for o in objects if isinstance(o, DestinationRule)),
            authentications=tuple(
                Authentication.of(o, domain, entry_hosts)
                for o in objects
                if isinstance(o, RequestAuthentication)
            ),
            backend_tls=tuple(
                found
                for o in objects
                if isinstance(o, BackendTLSPolicy)
                for found in _backends_of(o, domain, entry_hosts)
            ),
            virtuals=tuple(Virtual.of(o, domain) for o in objects if isinstance(o, VirtualService)),
            namespaces={o.name: o.labels for o in objects if isinstance(o, Namespace)},
            errors=tuple(errors),
            is_whole=is_whole,
            is_known=is_known,
            ignored=tuple(sorted(kind for kind in ignored if kind.partition("/")[0].endswith(_OF_MESHES))),
        )

    @property
    def by_ref(self) -> dict[ObjectRef, object]:
        """All that an Envoy may be told of."""
        parts = (self.routes, self.virtuals, self.policies, self.authentications, self.destinations)
        found: dict[ObjectRef, object] = {each.ref: each for part in parts for each in part}
        for tls in self.backend_tls:
            found[tls.by] = found.get(tls.by, ()), tls
        return found

    def namespaces_of(self, waypoint: Gateway) -> set[str]:
        """Those whose services may come by way of it any moment: its own, and guests that name it."""
        return {waypoint.namespace} | (self._named_by(waypoint) - self.turned_away(waypoint))

    def with_guards_of(self, before: Objects) -> Objects:
        """What guarded before and is not here any more guards on: it may be in a file that cannot be read."""
        by = {each.by for each in self.backend_tls}
        return msgspec.structs.replace(
            self,
            policies=_with_lost(self.policies, before.policies),
            authentications=_with_lost(self.authentications, before.authentications),
            destinations=_with_lost(self.destinations, before.destinations),
            backend_tls=self.backend_tls + tuple(each for each in before.backend_tls if each.by not in by),
        )

    def turned_away(self, waypoint: Gateway) -> set[str]:
        """Namespaces that name it, which it does not let in."""
        named = self._named_by(waypoint)
        return {one for one in named if not waypoint.lets_in(one, self.namespaces.get(one, {}))}

    def is_anothers(self, name: str) -> bool:
        """A Service of a waypoint's name is there that is none of its own: it is asked in its place."""
        found = self.services.get(name)
        return found is not None and found.labels.get(GATEWAY_NAME) != self.waypoints[name].name

    def _named_by(self, waypoint: Gateway) -> set[str]:
        return {
            namespace
            for namespace, labels in self._labels()
            if labels.get(USE_WAYPOINT) == waypoint.name
            and labels.get(USE_WAYPOINT_NAMESPACE) == waypoint.namespace
        }

    def _labels(self) -> Iterator[tuple[str, Labels]]:
        yield from self.namespaces.items()
        for service in self.services.values():
            yield service.namespace, service.labels


def _with_lost(now: tuple[_Guard, ...], before: tuple[_Guard, ...]) -> tuple[_Guard, ...]:
    there = {each.ref for each in now}
    return now + tuple(each for each in before if each.ref not in there)


def _by_mesh_name(objects: Iterable[_T], domain: str) -> dict[str, _T]:
    return {mesh_name(obj.namespace, obj.name, domain): obj for obj in objects}


async def watch(
    path: Path, keep: Path, domain: str, poll_s: float, changed: Callable[[Objects], None]
) -> None:
    """Tells what the folder says, now and whenever that changes. Runs until cancelled."""
    folder = Folder(path, keep=keep)
    last: Objects | None = None
    while True:
        sight = await anyio.to_thread.run_sync(folder.look)
        if last is None or folder.has_changed(sight):
            content = await anyio.to_thread.run_sync(folder.read, sight)
            found = Objects.of(
                (located.object for located in content.objects),
                domain,
                errors=map(str, content.errors),
                is_whole=not content.refused,
                is_known=content.is_known,
                ignored=content.ignored,
            )
            if found != last:
                last = found
                changed(found)
        await anyio.sleep(poll_s)
