"""Kubernetes and Istio objects as the control plane reads them: the fields that shape the mesh.

The structs follow the manifests, names and nesting included (`podIPs` is `pod_ips`), so that the path of a
field that does not fit is the path that its author wrote. They are immutable, and a value of one of these
types is valid in itself: addresses parse, ports are in range, names can be part of a resource name.
Defaults are those that an API server fills in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import Enum
from typing import Annotated, Any, Final, TypeAlias

import msgspec

from pykmesh.contracts.settings import AFFINITY_S_MAX
from pykmesh.manifests.addresses import HEADLESS, IP, ClusterIP, IPFamily, IPRange, parse_text
from pykmesh.manifests.authorization_policy import AuthorizationPolicySpec, PolicyTargetRef
from pykmesh.manifests.destination_rule import ClientTLS, DestinationRuleSpec, TLSMode
from pykmesh.manifests.grpc_route import GRPCRouteSpec
from pykmesh.manifests.http_route import GATEWAY_GROUP, HTTPRouteSpec
from pykmesh.manifests.names import Name, PortNumber
from pykmesh.manifests.request_authentication import RequestAuthenticationSpec
from pykmesh.manifests.tcp_route import TCPRouteSpec
from pykmesh.manifests.virtual_service import VirtualServiceSpec

TargetPort = Annotated[int, msgspec.Meta(ge=0, le=65535)] | str
"""A number or the name of a container's port; 0 and "" are as good as none."""
Labels: TypeAlias = dict[str, str]


class IPFamilyPolicy(Enum):
    SINGLE_STACK = "SingleStack"
    PREFER_DUAL_STACK = "PreferDualStack"
    REQUIRE_DUAL_STACK = "RequireDualStack"


class Protocol(Enum):
    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class _Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False):
    """How all parts of a manifest are read. They hold no cycles, so the collector may pass them by."""


class OwnerReference(_Manifest, frozen=True, kw_only=True):
    kind: str
    name: str
    controller: bool = False


class Metadata(_Manifest, frozen=True, kw_only=True):
    name: Name
    namespace: Name = "default"
    generate_name: str = ""
    labels: Labels = {}
    annotations: Labels = {}
    owner_references: tuple[OwnerReference, ...] = ()
    creation_timestamp: str = ""
    deletion_timestamp: str = ""
    generation: int = 0
    uid: str = ""


class _Object(_Manifest, frozen=True, kw_only=True):
    metadata: Metadata

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def namespace(self) -> str:
        return self.metadata.namespace

    @property
    def labels(self) -> Labels:
        return self.metadata.labels


class Namespace(_Object, frozen=True, kw_only=True):
    pass


class NodeAddress(_Manifest, frozen=True, kw_only=True):
    type: str
    address: str


class NodeStatus(_Manifest, frozen=True, kw_only=True):
    addresses: tuple[NodeAddress, ...] = ()


class Node(_Object, frozen=True, kw_only=True):
    status: NodeStatus = NodeStatus()


class ContainerPort(_Manifest, frozen=True, kw_only=True):
    container_port: PortNumber
    name: str = ""
    protocol: Protocol = Protocol.TCP


class Container(_Manifest, frozen=True, kw_only=True):
    ports: tuple[ContainerPort, ...] = ()


class PodSpec(_Manifest, frozen=True, kw_only=True):
    node_name: str = ""
    service_account_name: str = "default"
    host_network: bool = False
    containers: tuple[Container, ...] = ()


class PodIP(_Manifest, frozen=True, kw_only=True):
    ip: IP


class PodCondition(_Manifest, frozen=True, kw_only=True):
    type: str
    status: str


class PodStatus(_Manifest, frozen=True, kw_only=True):
    phase: str = ""
    host_ip: IP | None = msgspec.field(name="hostIP", default=None)
    pod_ip: IP | None = msgspec.field(name="podIP", default=None)
    pod_ips: tuple[PodIP, ...] = msgspec.field(name="podIPs", default=())
    conditions: tuple[PodCondition, ...] = ()


class Pod(_Object, frozen=True, kw_only=True):
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def ips(self) -> tuple[IP, ...]:
        """All addresses, the primary one first."""
        if self.status.pod_ips:
            return tuple(entry.ip for entry in self.status.pod_ips)
        return (self.status.pod_ip,) if self.status.pod_ip else ()

    @property
    def is_over(self) -> bool:
        """It has ended for good: it holds no address any more."""
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def is_ready(self) -> bool:
        """May get connections. A pod that says nothing about itself may: nobody reports for a folder."""
        if self.metadata.deletion_timestamp:
            return False
        conditions = {condition.type: condition.status for condition in self.status.conditions}
        return not conditions or conditions.get("Ready") == "True"


class ServicePort(_Manifest, frozen=True, kw_only=True):
    port: PortNumber
    name: str = ""
    protocol: Protocol = Protocol.TCP
    target_port: TargetPort | None = None
    app_protocol: str = ""


class SessionAffinity(Enum):
    NONE = "None"
    CLIENT_IP = "ClientIP"


class ClientIPConfig(_Manifest, frozen=True, kw_only=True):
    timeout_seconds: Annotated[int, msgspec.Meta(ge=1, le=AFFINITY_S_MAX)] = 10_800


class SessionAffinityConfig(_Manifest, frozen=True, kw_only=True):
    client_ip: ClientIPConfig = msgspec.field(name="clientIP", default=ClientIPConfig())


class ServiceSpec(_Manifest, frozen=True, kw_only=True):
    type: str = "ClusterIP"
    cluster_ip: ClusterIP = msgspec.field(name="clusterIP", default=ClusterIP())
    cluster_ips: tuple[ClusterIP, ...] = msgspec.field(name="clusterIPs", default=())
    ip_families: tuple[IPFamily, ...] = ()
    ip_family_policy: IPFamilyPolicy | None = None
    ports: tuple[ServicePort, ...] = ()
    selector: Labels = {}
    publish_not_ready_addresses: bool = False
    internal_traffic_policy: str = "Cluster"
    traffic_distribution: str = ""
    session_affinity: SessionAffinity = SessionAffinity.NONE
    session_affinity_config: SessionAffinityConfig = SessionAffinityConfig()


class Service(_Object, frozen=True, kw_only=True):
    spec: ServiceSpec = ServiceSpec()

    @property
    def is_external_name(self) -> bool:
        return self.spec.type == "ExternalName"

    @property
    def is_headless(self) -> bool:
        return HEADLESS in (self.spec.cluster_ip, *self.spec.cluster_ips)

    @property
    def vips(self) -> tuple[IP, ...]:
        """The cluster addresses, the primary one first; none if it is headless."""
        written = self.spec.cluster_ips or (self.spec.cluster_ip,)
        return tuple(IP(text) for text in written if text not in ("", HEADLESS))

    @property
    def ip_families(self) -> tuple[IPFamily, ...]:
        """The families it serves, the primary one first: as written, else of its addresses, else IPv4."""
        families = self.spec.ip_families or tuple(dict.fromkeys(vip.family for vip in self.vips))
        families = families or (IPFamily.IPV4,)
        if self.spec.ip_family_policy in (None, IPFamilyPolicy.SINGLE_STACK) or len(families) == 2:
            return families
        return (*families, *(family for family in IPFamily if family not in families))


class EndpointConditions(_Manifest, frozen=True, kw_only=True):
    ready: bool = True


class TargetRef(_Manifest, frozen=True, kw_only=True):
    kind: str = ""
    name: str = ""
    namespace: str = ""
    uid: str = ""


class Endpoint(_Manifest, frozen=True, kw_only=True):
    addresses: tuple[str, ...] = ()
    conditions: EndpointConditions = EndpointConditions()
    target_ref: TargetRef | None = None


class EndpointPort(_Manifest, frozen=True, kw_only=True):
    name: str = ""
    port: PortNumber | None = None
    protocol: Protocol = Protocol.TCP


class EndpointSlice(_Object, frozen=True, kw_only=True):
    address_type: str = "IPv4"
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()

    @property
    def service_name(self) -> str:
        """The service that the endpoints are for; "" if they are for none."""
        return self.labels.get("kubernetes.io/service-name", "")


class Resolution(Enum):
    NONE = "NONE"
    STATIC = "STATIC"
    DNS = "DNS"
    DNS_ROUND_ROBIN = "DNS_ROUND_ROBIN"
    DYNAMIC_DNS = "DYNAMIC_DNS"

    @property
    def is_by_name(self) -> bool:
        return self not in (Resolution.NONE, Resolution.STATIC)


class EntryPort(_Manifest, frozen=True, kw_only=True):
    number: PortNumber
    name: str = ""
    protocol: str = ""
    target_port: PortNumber | None = None


class WorkloadEntrySpec(_Manifest, frozen=True, kw_only=True):
    address: str = ""
    ports: dict[str, PortNumber] = {}
    labels: Labels = {}
    network: str = ""
    locality: str = ""
    weight: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 0
    service_account: str = ""


class WorkloadEntry(_Object, frozen=True, kw_only=True):
    spec: WorkloadEntrySpec

    @property
    def all_labels(self) -> Labels:
        """Labels may be written in two places; those of the metadata win."""
        return self.spec.labels | self.metadata.labels


class WorkloadSelector(_Manifest, frozen=True, kw_only=True):
    labels: Labels = {}


class ServiceEntrySpec(_Manifest, frozen=True, kw_only=True):
    hosts: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    addresses: tuple[IPRange, ...] = ()
    ports: tuple[EntryPort, ...] = ()
    resolution: Resolution = Resolution.NONE
    endpoints: tuple[WorkloadEntrySpec, ...] = ()
    workload_selector: WorkloadSelector | None = None
    export_to: tuple[str, ...] = ()
    subject_alt_names: tuple[str, ...] = ()


class HostAddress(_Manifest, frozen=True, kw_only=True):
    value: IP
    host: str = ""


class ServiceEntryStatus(_Manifest, frozen=True, kw_only=True):
    addresses: tuple[HostAddress, ...] = ()


class ServiceEntry(_Object, frozen=True, kw_only=True):
    spec: ServiceEntrySpec
    status: ServiceEntryStatus = ServiceEntryStatus()

    @property
    def wants_addresses(self) -> bool:
        """Its hosts get an address of their own, unless they are wildcards (see `takes_address`)."""
        may = self.labels.get("networking.istio.io/enable-autoallocate-ip", "").lower() != "false"
        return may and not self.spec.addresses and self.spec.resolution is not Resolution.NONE

    def takes_address(self, host: str) -> bool:
        is_wildcard = host.startswith("*")
        return self.wants_addresses and (not is_wildcard or self.spec.resolution is Resolution.DYNAMIC_DNS)


class SelectorOperator(Enum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class LabelSelectorRequirement(_Manifest, frozen=True, kw_only=True):
    key: str
    operator: SelectorOperator
    values: tuple[str, ...] = ()

    def matches(self, labels: Labels) -> bool:
        match self.operator:
            case SelectorOperator.IN:
                return labels.get(self.key) in self.values
            case SelectorOperator.NOT_IN:
                return labels.get(self.key) not in self.values
            case SelectorOperator.EXISTS:
                return self.key in labels
            case SelectorOperator.DOES_NOT_EXIST:
                return self.key not in labels


class LabelSelector(_Manifest, frozen=True, kw_only=True):
    match_labels: Labels = {}
    match_expressions: tuple[LabelSelectorRequirement, ...] = ()

    def matches(self, labels: Labels) -> bool:
        """An empty one matches all."""
        return self.match_labels.items() <= labels.items() and all(
            requirement.matches(labels) for requirement in self.match_expressions
        )


class NamespacesFrom(Enum):
    ALL = "All"
    SELECTOR = "Selector"
    SAME = "Same"
    NONE = "None"


class RouteNamespaces(_Manifest, frozen=True, kw_only=True):
    from_: NamespacesFrom = msgspec.field(name="from", default=NamespacesFrom.SAME)
    selector: LabelSelector | None = None
    """Without one nobody is chosen."""


class RouteGroupKind(_Manifest, frozen=True, kw_only=True):
    kind: str
    group: str = GATEWAY_GROUP


class AllowedRoutes(_Manifest, frozen=True, kw_only=True):
    namespaces: RouteNamespaces = RouteNamespaces()
    kinds: tuple[RouteGroupKind, ...] = ()
    """None: those that there are."""


_WAYPOINTS_SPEAK: Final = ("HBONE", "HTTP", "TCP")


class GatewayListener(_Manifest, frozen=True, kw_only=True):
    name: str
    port: PortNumber
    protocol: str
    allowed_routes: AllowedRoutes = AllowedRoutes()
    hostname: str = ""
    tls: dict[str, Any] | None = None

    @property
    def ignored(self) -> list[str]:
        """What a waypoint passes over: its connections come from the kernel, whatever a listener says."""
        found = [name for name in ("hostname", "tls") if getattr(self, name)]
        return found if self.protocol in _WAYPOINTS_SPEAK else [*found, f"protocol {self.protocol}"]

    def takes(self, kind: str) -> bool:
        """Routes of a kind of Gateway API's."""
        kinds = self.allowed_routes.kinds
        return not kinds or RouteGroupKind(kind=kind) in kinds

    def lets_in(self, namespace_labels: Labels) -> bool:
        """Another namespace than the Gateway's own."""
        asked = self.allowed_routes.namespaces
        if asked.from_ is NamespacesFrom.SELECTOR:
            return asked.selector is not None and asked.selector.matches(namespace_labels)
        return asked.from_ is NamespacesFrom.ALL


class GatewayAddress(_Manifest, frozen=True, kw_only=True):
    value: str
    type: str = "IPAddress"


class GatewaySpec(_Manifest, frozen=True, kw_only=True):
    gateway_class_name: str
    listeners: tuple[GatewayListener, ...] = ()
    addresses: tuple[dict[str, Any], ...] = ()
    infrastructure: dict[str, Any] | None = None
    allowed_listeners: dict[str, Any] | None = None
    default_scope: str = ""
    tls: dict[str, Any] | None = None

    @property
    def ignored(self) -> list[str]:
        """What a waypoint passes over."""
        own = {
            "addresses": self.addresses, "infrastructure": self.infrastructure, "tls": self.tls,
            "allowedListeners": self.allowed_listeners, "defaultScope": self.default_scope,
        }  # fmt: skip
        found = [name for name, said in own.items() if said]
        names = Counter(each.name for each in self.listeners)
        found += [f"listeners: several are called {name}" for name, times in names.items() if times > 1]
        return found + [f"listeners[{each.name}].{what}" for each in self.listeners for what in each.ignored]


class GatewayStatus(_Manifest, frozen=True, kw_only=True):
    addresses: tuple[GatewayAddress, ...] = ()


class Gateway(_Object, frozen=True, kw_only=True):
    spec: GatewaySpec
    status: GatewayStatus = GatewayStatus()

    @property
    def is_waypoint(self) -> bool:
        return self.spec.gateway_class_name in WAYPOINT_CLASSES

    @property
    def is_for_services(self) -> bool:
        return self._is_for in ("service", "all")

    @property
    def is_for_workloads(self) -> bool:
        """For what is meant for pods' own addresses."""
        return self._is_for in ("workload", "all")

    @property
    def _is_for(self) -> str:
        return self.labels.get(WAYPOINT_FOR, "service")

    @property
    def misread(self) -> list[str]:
        """What it says that nobody understands, or looks at."""
        found = [f"spec.{what} is passed over" for what in self.spec.ignored]
        if self._is_for not in ("service", "workload", "all", "none"):
            found.append(f"label {WAYPOINT_FOR}: {self._is_for!r} is not known, so it is for nothing")
        return found

    def lets_in(
        self, namespace: str, labels: Labels, listeners: Iterable[GatewayListener] | None = None
    ) -> bool:
        """Whether services and routes of a namespace, which has these labels, may come: to any listener.

        `listeners`: to one of these.
        """
        if namespace == self.namespace:
            return True
        own_name = {NAMESPACE_NAME: namespace}  # as an API server labels each namespace
        asked = self.spec.listeners if listeners is None else listeners
        return any(listener.lets_in(labels | own_name) for listener in asked)


class HTTPRoute(_Object, frozen=True, kw_only=True):
    spec: HTTPRouteSpec = HTTPRouteSpec()


class GRPCRoute(_Object, frozen=True, kw_only=True):
    spec: GRPCRouteSpec = GRPCRouteSpec()


class TCPRoute(_Object, frozen=True, kw_only=True):
    spec: TCPRouteSpec


class AuthorizationPolicy(_Object, frozen=True, kw_only=True):
    spec: AuthorizationPolicySpec = AuthorizationPolicySpec()

    def __post_init__(self) -> None:
        _check_targets(self.spec.targets, self.namespace)


def _check_targets(targets: Iterable[PolicyTargetRef], namespace: str) -> None:
    for target in targets:
        if target.namespace not in ("", namespace):
            raise ValueError(f"a target in another namespace ({target.namespace}) cannot be had")


class DestinationRule(_Object, frozen=True, kw_only=True):
    spec: DestinationRuleSpec


class TLSTarget(_Manifest, frozen=True, kw_only=True):
    group: str = ""
    kind: str
    name: Name
    section_name: str = ""
    """Of a port; "" is all."""


class TLSName(_Manifest, frozen=True, kw_only=True):
    type: str = ""
    hostname: str = ""
    uri: str = ""


class TLSValidation(_Manifest, frozen=True, kw_only=True):
    """Whose certificate it should be. Roots in ConfigMaps are not read."""

    ca_certificate_refs: tuple[Any, ...] = ()
    hostname: str = ""
    well_known: str = msgspec.field(default="", name="wellKnownCACertificates")
    subject_alt_names: tuple[TLSName, ...] = ()

    @property
    def client(self) -> ClientTLS | None:
        """The same as a DestinationRule says it; None where nobody can be checked so."""
        if self.well_known != "System" or self.ca_certificate_refs or not self.hostname:
            return None
        names = tuple(each.hostname or each.uri for each in self.subject_alt_names)
        return ClientTLS(mode=TLSMode.SIMPLE, sni=self.hostname, subject_alt_names=names)


class BackendTLSPolicySpec(_Manifest, frozen=True, kw_only=True):
    target_ref: TLSTarget | None = None
    """Of v1alpha2."""
    target_refs: tuple[TLSTarget, ...] = ()
    validation: TLSValidation = TLSValidation()

    @property
    def targets(self) -> tuple[TLSTarget, ...]:
        return (*((self.target_ref,) if self.target_ref else ()), *self.target_refs)


class BackendTLSPolicy(_Object, frozen=True, kw_only=True):
    spec: BackendTLSPolicySpec = BackendTLSPolicySpec()


class VirtualService(_Object, frozen=True, kw_only=True):
    spec: VirtualServiceSpec = VirtualServiceSpec()


class RequestAuthentication(_Object, frozen=True, kw_only=True):
    spec: RequestAuthenticationSpec = RequestAuthenticationSpec()

    def __post_init__(self) -> None:
        _check_targets(self.spec.targets, self.namespace)


WAYPOINT_CLASS = "pykmesh-waypoint"
WAYPOINT_CLASSES = frozenset({"istio-waypoint", WAYPOINT_CLASS})
"""Gateway classes whose Gateways are waypoints."""
CLUSTER_CLASSES = frozenset({WAYPOINT_CLASS})
"""Of them those that are ours beside an istiod, which runs its own."""
NAMESPACE_NAME = "kubernetes.io/metadata.name"
WAYPOINT_FOR = "istio.io/waypoint-for"
USE_WAYPOINT = "istio.io/use-waypoint"
USE_WAYPOINT_NAMESPACE = "istio.io/use-waypoint-namespace"
GATEWAY_NAME = "gateway.networking.k8s.io/gateway-name"
"""The label of what belongs to a Gateway."""


def service_hostname(name: str, namespace: str, domain: str) -> str:
    """What a Kubernetes Service is called in the mesh."""
    return f"{name}.{namespace}.svc.{domain}"


Object: TypeAlias = (
    Namespace
    | Node
    | Pod
    | Service
    | EndpointSlice
    | ServiceEntry
    | WorkloadEntry
    | Gateway
    | HTTPRoute
    | GRPCRoute
    | TCPRoute
    | AuthorizationPolicy
    | DestinationRule
    | BackendTLSPolicy
    | VirtualService
    | RequestAuthentication
)

KINDS: dict[tuple[str, str], type[Object]] = {
    ("", "Namespace"): Namespace,
    ("", "Node"): Node,
    ("", "Pod"): Pod,
    ("", "Service"): Service,
    ("discovery.k8s.io", "EndpointSlice"): EndpointSlice,
    ("networking.istio.io", "ServiceEntry"): ServiceEntry,
    ("networking.istio.io", "WorkloadEntry"): WorkloadEntry,
    ("gateway.networking.k8s.io", "Gateway"): Gateway,
    ("gateway.networking.k8s.io", "HTTPRoute"): HTTPRoute,
    ("gateway.networking.k8s.io", "GRPCRoute"): GRPCRoute,
    ("gateway.networking.k8s.io", "TCPRoute"): TCPRoute,
    ("security.istio.io", "AuthorizationPolicy"): AuthorizationPolicy,
    ("networking.istio.io", "DestinationRule"): DestinationRule,
    ("gateway.networking.k8s.io", "BackendTLSPolicy"): BackendTLSPolicy,
    ("networking.istio.io", "VirtualService"): VirtualService,
    ("security.istio.io", "RequestAuthentication"): RequestAuthentication,
}
"""The types that are read, by API group and kind; the version within a group does not matter."""

_CLUSTER_SCOPED = (Namespace, Node)


class ObjectRef(msgspec.Struct, frozen=True, order=True):
    """What tells one object from another; `namespace` is "" for what has none."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


def ref_of(obj: Object) -> ObjectRef:
    namespace = "" if isinstance(obj, _CLUSTER_SCOPED) else obj.namespace
    return ObjectRef(type(obj).__name__, namespace, obj.name)


def from_plain(plain: Any, kind: type[Object]) -> Object:
    """Makes an object of a manifest in plain types.

    Raises `msgspec.ValidationError`, whose text ends with the path: … - at `$.spec.ports[0]`.
    """
    return msgspec.convert(plain, kind, dec_hook=parse_text)
