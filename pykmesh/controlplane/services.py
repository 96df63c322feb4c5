"""Services of the mesh, made from Services and ServiceEntries: messages, and what selects workloads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum

import msgspec

from pykmesh.contracts.address import SELECTION_EXTENSION
from pykmesh.controlplane.dialect import Dialect, Scopes
from pykmesh.controlplane.settings import MeshSettings
from pykmesh.manifests.addresses import IPFamily, IPRange
from pykmesh.manifests.objects import (
    EntryPort,
    Labels,
    Metadata,
    Namespace,
    Protocol,
    Resolution,
    Service,
    ServiceEntry,
    ServicePort,
    SessionAffinity,
    service_hostname,
)
from pykmesh.proto import workload_pb2 as wire

TRAFFIC_DISTRIBUTION = "networking.istio.io/traffic-distribution"

LOAD_BALANCING = "pykmesh.io/load-balancing"
LEAST_CONNECTIONS = "least-connections"
VISIBILITY = "pykmesh.io/visibility"

# Ports that carry a known protocol over TCP when nothing says otherwise: SMTP, DNS, MySQL, MongoDB.
_WELL_KNOWN_TCP = frozenset({25, 53, 3306, 27017})

_APP_PROTOCOLS = {
    "http": wire.HTTP11,
    "http2": wire.HTTP2,
    "grpc": wire.GRPC,
    "https": wire.TLS,
    "tls": wire.TLS,
    "tcp": wire.TCP,
}
# Known by name, but not on the wire; a well-known port number does not make them TCP.
_UNSAID_PROTOCOLS = frozenset({"udp", "grpc-web", "http_proxy", "hbone", "mongo", "redis", "mysql"})
_KUBERNETES_PROTOCOLS = {
    "kubernetes.io/h2c": "http2",
    "kubernetes.io/ws": "http",
    "kubernetes.io/wss": "https",
}


class Source(Enum):
    SERVICE = "Service"
    SERVICE_ENTRY = "ServiceEntry"


class PortNames(msgspec.Struct, frozen=True):
    """How workloads find a port: by its own name, and by the name of its target ("" if that is a number)."""

    name: str
    target: str = ""


class MeshService(msgspec.Struct, frozen=True, kw_only=True):
    """One hostname in one namespace. `message` is complete but for what other services decide (canonical)."""

    source: Source
    metadata: Metadata
    selector: Labels
    port_names: Mapping[int, PortNames]
    message: wire.Service

    @property
    def key(self) -> str:
        """The name of the resource."""
        return f"{self.message.namespace}/{self.message.hostname}"

    @property
    def age(self) -> tuple[str, str, str]:
        """Sorts the oldest first; objects of a folder have no age, so their names decide."""
        return self.metadata.creation_timestamp, self.metadata.namespace, self.metadata.name


def mesh_services(
    services: Iterable[Service],
    entries: Iterable[ServiceEntry],
    namespaces: Iterable[Namespace],
    mesh: MeshSettings,
) -> dict[str, MeshService]:
    """All services by key. Of two with one key a Service goes before a ServiceEntry, then the older one."""
    annotations = {namespace.name: namespace.metadata.annotations for namespace in namespaces}
    found: dict[str, MeshService] = {}
    for service in services:
        if not service.is_external_name:
            made = _from_service(service, annotations.get(service.namespace, {}), mesh)
            found[made.key] = made
    made_of_entries = (
        made for entry in entries for made in _from_entry(entry, annotations.get(entry.namespace, {}), mesh)
    )
    for made in sorted(made_of_entries, key=lambda made: made.age):
        found.setdefault(made.key, made)
    if mesh.dialect.says_canonical:
        _mark_canonical(found.values())
    return found


def _mark_canonical(services: Iterable[MeshService]) -> None:
    """Each hostname has one canonical service: a Service, or else the oldest ServiceEntry.

    (Services of one hostname share the namespace, so they never compete.)
    """
    by_rank = sorted(services, key=lambda service: (service.source is not Source.SERVICE, service.age))
    hostnames: set[str] = set()
    for service in by_rank:
        service.message.canonical = service.message.hostname not in hostnames
        hostnames.add(service.message.hostname)


def _from_service(service: Service, inherited: Labels, mesh: MeshSettings) -> MeshService:
    spec = service.spec
    message = wire.Service(
        name=service.name,
        namespace=service.namespace,
        hostname=service_hostname(service.name, service.namespace, mesh.domain),
        addresses=[wire.NetworkAddress(network=mesh.network, address=vip.packed) for vip in service.vips],
        ports=[_service_port(port, mesh.dialect) for port in spec.ports],
        load_balancing=_service_load_balancing(service, inherited, mesh.dialect),
        ip_families=_ip_families(service.ip_families),
        extensions=_extensions(service.metadata, _affinity_s(service)),
        visibility=_visibility(service.metadata),
    )
    names = {
        port.port: PortNames(port.name, port.target_port if isinstance(port.target_port, str) else "")
        for port in spec.ports
    }
    return MeshService(
        source=Source.SERVICE,
        metadata=service.metadata,
        selector=spec.selector,
        port_names=names,
        message=message,
    )


def _affinity_s(service: Service) -> int:
    spec = service.spec
    is_affine = spec.session_affinity is SessionAffinity.CLIENT_IP
    return spec.session_affinity_config.client_ip.timeout_seconds if is_affine else 0


def _extensions(metadata: Metadata, affinity_s: int) -> list[wire.Extension]:
    """What no field of the API says, and istiod therefore does not: for data planes of this project."""
    least = metadata.annotations.get(LOAD_BALANCING) == LEAST_CONNECTIONS
    if not affinity_s and not least:
        return []
    found = wire.Extension(name=SELECTION_EXTENSION)
    found.config.Pack(wire.Selection(affinity_seconds=affinity_s, least_connections=least))
    return [found]


def _visibility(metadata: Metadata) -> wire.Service.Visibility.ValueType:
    """An annotation: istiod says PUBLIC of what `exportTo` keeps in its namespace (seen in 1.31)."""
    hidden = metadata.annotations.get(VISIBILITY) == "namespace"
    return wire.Service.NAMESPACE if hidden else wire.Service.PUBLIC


def _service_port(port: ServicePort, dialect: Dialect) -> wire.Port:
    """A target port of 0 stands for a name, which each workload resolves for itself."""
    named = isinstance(port.target_port, str) and port.target_port
    target = 0 if named else port.target_port or port.port
    said = _service_protocol(port) if dialect.says_app_protocol else wire.UNKNOWN
    return wire.Port(service_port=port.port, target_port=int(target), app_protocol=said)


def _service_protocol(port: ServicePort) -> wire.AppProtocol.ValueType:
    """The field `appProtocol`, or else the port's name up to its first hyphen, names the protocol."""
    if port.protocol is Protocol.UDP:
        return wire.UNKNOWN
    text = _KUBERNETES_PROTOCOLS.get(port.app_protocol, port.app_protocol or port.name).lower()
    name = "grpc-web" if text.startswith("grpc-web") else text.partition("-")[0]
    if name not in _APP_PROTOCOLS and name not in _UNSAID_PROTOCOLS and port.port in _WELL_KNOWN_TCP:
        return wire.TCP
    return _APP_PROTOCOLS.get(name, wire.UNKNOWN)


def _service_load_balancing(
    service: Service, inherited: Labels, dialect: Dialect
) -> wire.LoadBalancing | None:
    spec = service.spec
    if spec.internal_traffic_policy == "Local":
        found = wire.LoadBalancing(
            routing_preference=[wire.LoadBalancing.NODE], mode=wire.LoadBalancing.STRICT
        )
    else:
        found = _preference(spec.traffic_distribution, service.metadata.annotations, inherited, dialect)
    if spec.publish_not_ready_addresses:
        found.health_policy = wire.LoadBalancing.ALLOW_ALL
    return found if found.ByteSize() else None


def _preference(said: str, annotations: Labels, inherited: Labels, dialect: Dialect) -> wire.LoadBalancing:
    """What the field says goes before the annotation, and that before the one of the namespace."""
    from_namespace = inherited.get(TRAFFIC_DISTRIBUTION, "") if dialect.inherits_traffic_distribution else ""
    for text in (said, annotations.get(TRAFFIC_DISTRIBUTION, ""), from_namespace):
        scopes = _scopes(text, dialect)
        if scopes:
            return wire.LoadBalancing(routing_preference=scopes, mode=wire.LoadBalancing.FAILOVER)
    return wire.LoadBalancing()


def _scopes(distribution: str, dialect: Dialect) -> Scopes:
    match distribution.lower():
        case "preferclose":
            return dialect.prefers_close
        case "prefersamezone":
            return dialect.prefers_close if dialect.prefers_same_node else ()
        case "prefersamenode":
            return dialect.prefers_same_node
        case _:
            return ()


def _ip_families(families: Sequence[IPFamily]) -> wire.IPFamilies.ValueType:
    if len(families) > 1:
        return wire.DUAL
    return wire.IPV4_ONLY if families[0] is IPFamily.IPV4 else wire.IPV6_ONLY


def _from_entry(entry: ServiceEntry, inherited: Labels, mesh: MeshSettings) -> Iterator[MeshService]:
    """One service a host; none at all if the dialect cannot say one of the addresses."""
    if not mesh.dialect.says_ranges and any(item.prefix_len is not None for item in entry.spec.addresses):
        return
    spec = entry.spec
    names = {port.number: PortNames(port.name) for port in spec.ports}
    for host in spec.hosts:
        message = wire.Service(
            name=entry.name,
            namespace=entry.namespace,
            hostname=host,
            addresses=_entry_addresses(entry, host, mesh.network),
            ports=[_entry_port(port, mesh.dialect) for port in spec.ports],
            subject_alt_names=spec.subject_alt_names,
            load_balancing=_entry_load_balancing(entry, inherited, mesh.dialect),
            extensions=_extensions(entry.metadata, 0),
            visibility=_visibility(entry.metadata),
        )
        yield MeshService(
            source=Source.SERVICE_ENTRY,
            metadata=entry.metadata,
            selector=spec.workload_selector.labels if spec.workload_selector else {},
            port_names=names,
            message=message,
        )


def _entry_addresses(entry: ServiceEntry, host: str, network: str) -> list[wire.NetworkAddress]:
    """The addresses written, or else those allocated for the host."""
    if entry.takes_address(host):
        allocated = (item.value for item in entry.status.addresses if item.host == host)
        return [wire.NetworkAddress(network=network, address=address.packed) for address in allocated]
    return [_network_address(address, network) for address in entry.spec.addresses]


def _network_address(address: IPRange, network: str) -> wire.NetworkAddress:
    return wire.NetworkAddress(network=network, address=address.packed, length=address.prefix_len)


def _entry_port(port: EntryPort, dialect: Dialect) -> wire.Port:
    said = _APP_PROTOCOLS.get(port.protocol.lower(), wire.UNKNOWN)
    return wire.Port(
        service_port=port.number,
        target_port=port.target_port or port.number,
        app_protocol=said if dialect.says_app_protocol else wire.UNKNOWN,
    )


def _entry_load_balancing(
    entry: ServiceEntry, inherited: Labels, dialect: Dialect
) -> wire.LoadBalancing | None:
    if entry.spec.resolution is not Resolution.NONE:
        found = _preference("", entry.metadata.annotations, inherited, dialect)
        return found if found.ByteSize() else None
    if not dialect.passes_unresolved_through:
        return None
    return wire.LoadBalancing(mode=wire.LoadBalancing.PASSTHROUGH, health_policy=wire.LoadBalancing.ALLOW_ALL)
