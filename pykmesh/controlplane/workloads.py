"""Workloads of the mesh, made from Pods, WorkloadEntries, endpoints of ServiceEntries and EndpointSlices.

Each maker yields messages; a workload lists the services that it serves, with its own target port for each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec
from google.protobuf.wrappers_pb2 import UInt32Value

from pykmesh.contracts.address import TRUST_DOMAIN
from pykmesh.controlplane.services import MeshService, PortNames, Source
from pykmesh.controlplane.settings import MeshSettings
from pykmesh.manifests.addresses import IP, is_ip
from pykmesh.manifests.objects import (
    EndpointSlice,
    Labels,
    Metadata,
    Node,
    Pod,
    Protocol,
    ServiceEntry,
    WorkloadEntry,
    WorkloadEntrySpec,
    service_hostname,
)
from pykmesh.proto import workload_pb2 as wire

REDIRECTION = "ambient.istio.io/redirection"
TUNNEL = "networking.istio.io/tunnel"

_NAME_LABELS = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
_REVISION_LABELS = ("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
_TYPES = {"Deployment": wire.DEPLOYMENT, "CronJob": wire.CRONJOB, "Job": wire.JOB}
_JOB_OF_CRON = re.compile(r"(?P<cron>.+)-\d{8,10}")

TargetOf = Callable[[MeshService, wire.Port, PortNames], int | None]
"""The target port that a workload has for a port of a service; None if it cannot serve that port."""


class Selection:
    """Finds the services that select a workload, by its labels and namespace."""

    def __init__(self, services: Iterable[MeshService]) -> None:
        self._candidates: dict[tuple[str, str, str], list[MeshService]] = defaultdict(list)
        for service in services:
            if service.selector:
                first = min(service.selector.items())
                self._candidates[(service.message.namespace, *first)].append(service)

    def of(self, namespace: str, labels: Labels) -> Iterator[MeshService]:
        for label in labels.items():
            for service in self._candidates.get((namespace, *label), ()):
                if service.selector.items() <= labels.items():
                    yield service


class Surroundings(msgspec.Struct, frozen=True):
    """What workloads are looked up in."""

    mesh: MeshSettings
    services: Mapping[str, MeshService]
    selection: Selection
    localities: Mapping[str, wire.Locality]
    slices_of_pods: Mapping[tuple[str, str], tuple[str, ...]]
    """Keys of the services that name a pod, by (namespace, pod), in EndpointSlices."""

    def pod_uid(self, pod: Pod) -> str:
        return f"{self.mesh.cluster_id}//Pod/{pod.namespace}/{pod.name}"

    def uid(self, group_and_kind: str, *path: str) -> str:
        return "/".join((self.mesh.cluster_id, group_and_kind, *path))

    def start(self, uid: str, metadata: Metadata) -> wire.Workload:
        """A workload with what all kinds have in common."""
        trust_domain = self.mesh.trust_domain
        return wire.Workload(
            uid=uid,
            name=metadata.name,
            namespace=metadata.namespace,
            cluster_id=self.mesh.cluster_id,
            network=self.mesh.network,
            trust_domain="" if trust_domain == TRUST_DOMAIN else trust_domain,
        )


def surroundings(
    services: Mapping[str, MeshService],
    nodes: Iterable[Node],
    slices: Iterable[EndpointSlice],
    mesh: MeshSettings,
) -> Surroundings:
    named: dict[tuple[str, str], tuple[str, ...]] = {}
    for slice_ in slices:
        for endpoint in slice_.endpoints if slice_.service_name else ():
            ref = endpoint.target_ref
            if ref and ref.kind == "Pod":
                pod = (ref.namespace or slice_.namespace, ref.name)
                named[pod] = (*named.get(pod, ()), _service_key(slice_, mesh))
    return Surroundings(
        mesh=mesh,
        services=services,
        selection=Selection(services.values()),
        localities={node.name: locality for node in nodes if (locality := _node_locality(node))},
        slices_of_pods=named,
    )


def pod_workload(pod: Pod, around: Surroundings) -> wire.Workload | None:
    """None for a pod without address, or that has ended."""
    if pod.is_over or not pod.ips:
        return None
    name, type_ = _owner_name_and_type(pod, types_by_owner=around.mesh.dialect.types_by_owner)
    made = around.start(around.pod_uid(pod), pod.metadata)
    made.addresses.extend(ip.packed for ip in pod.ips)
    made.service_account = pod.spec.service_account_name
    made.node = pod.spec.node_name
    made.status = wire.HEALTHY if pod.is_ready else wire.UNHEALTHY
    made.network_mode = wire.HOST_NETWORK if pod.spec.host_network else wire.STANDARD
    made.workload_name, made.workload_type = name, type_
    _describe(made, pod.labels, pod.metadata.annotations)
    if pod.spec.node_name in around.localities:
        made.locality.CopyFrom(around.localities[pod.spec.node_name])
    _serve(made, _services_of_pod(pod, around), _pod_targets(pod))
    return made


def entry_workload(entry: WorkloadEntry, around: Surroundings) -> wire.Workload:
    """The workload of a WorkloadEntry."""
    labels, annotations = entry.all_labels, entry.metadata.annotations
    uid = around.uid("networking.istio.io/WorkloadEntry", entry.namespace, entry.name)
    made = around.start(uid, entry.metadata)
    group = annotations.get("istio.io/autoRegistrationGroup", "")
    made.workload_name = group or labels.get("service.istio.io/workload-name", "") or entry.name
    made.workload_type = wire.POD
    _describe(made, labels, annotations)
    _locate(made, entry.spec, around)
    serves_services = around.mesh.dialect.entry_ports_serve_services
    targets = _endpoint_targets(entry.spec, own_ports_serve_services=serves_services)
    _serve(made, around.selection.of(entry.namespace, labels), targets)
    return made


def service_entry_workloads(entry: ServiceEntry, around: Surroundings) -> Iterator[wire.Workload]:
    """The endpoints written in a ServiceEntry; without any, DNS resolution makes one of each host."""
    keys = {host: f"{entry.namespace}/{host}" for host in entry.spec.hosts}
    own = {
        host: service
        for host, key in keys.items()
        if (service := around.services.get(key)) and service.metadata is entry.metadata
    }
    if not own:  # a dialect that cannot say them, or another entry has the hosts
        return
    for endpoint in entry.spec.endpoints:
        yield _service_entry_workload(entry, endpoint, own.values(), around)
    if entry.spec.resolution.is_by_name and not entry.spec.endpoints and not entry.spec.workload_selector:
        for host, service in own.items():
            yield _service_entry_workload(entry, WorkloadEntrySpec(address=host), (service,), around)


def slice_workloads(slice_: EndpointSlice, around: Surroundings) -> Iterator[wire.Workload]:
    """The endpoints that are no pods: nothing is known of them, so their addresses count as shared."""
    service = around.services.get(_service_key(slice_, around.mesh))
    if not service or service.source is not Source.SERVICE or slice_.address_type == "FQDN":
        return
    ports = list(_slice_ports(slice_, service))
    for endpoint in slice_.endpoints:
        is_pod = endpoint.target_ref is not None and endpoint.target_ref.kind == "Pod"
        if is_pod or not endpoint.addresses or not all(map(is_ip, endpoint.addresses)):
            continue
        first = endpoint.addresses[0]
        uid = around.uid("discovery.k8s.io/EndpointSlice", slice_.namespace, slice_.name, first)
        made = around.start(uid, slice_.metadata)
        made.addresses.extend(IP(address).packed for address in endpoint.addresses)
        made.status = wire.HEALTHY if endpoint.conditions.ready else wire.UNHEALTHY
        made.network_mode = wire.HOST_NETWORK
        made.services[service.key].ports.extend(ports)
        yield made


def _service_entry_workload(
    entry: ServiceEntry, spec: WorkloadEntrySpec, services: Iterable[MeshService], around: Surroundings
) -> wire.Workload:
    uid = around.uid("networking.istio.io/ServiceEntry", entry.namespace, entry.name, spec.address)
    made = around.start(uid, entry.metadata)
    made.workload_name, made.workload_type = entry.name, wire.POD
    _describe(made, entry.labels, entry.metadata.annotations)
    _locate(made, spec, around)
    _serve(made, services, _endpoint_targets(spec, own_ports_serve_services=True))
    return made


def _describe(made: wire.Workload, labels: Labels, annotations: Labels) -> None:
    """Sets what labels and annotations say: the canonical service, and how the workload is reached."""
    made.canonical_name = _first(labels, _NAME_LABELS) or made.workload_name
    made.canonical_revision = _first(labels, _REVISION_LABELS) or "latest"
    if annotations.get(REDIRECTION) == "enabled":
        made.tunnel_protocol = wire.HBONE
    if "http" in labels.get(TUNNEL, "").split(","):
        made.tunnel_protocol, made.native_tunnel = wire.HBONE, True


def _locate(made: wire.Workload, spec: WorkloadEntrySpec, around: Surroundings) -> None:
    """Sets what an endpoint says of itself: its address or hostname, network, locality, weight, account."""
    if is_ip(spec.address):
        made.addresses.append(IP(spec.address).packed)
    else:
        made.hostname = spec.address
    made.service_account = spec.service_account
    if spec.network:
        made.network = spec.network
    if spec.locality:
        region, zone, subzone, *_ = (*spec.locality.split("/"), "", "")
        made.locality.CopyFrom(wire.Locality(region=region, zone=zone, subzone=subzone))
    if spec.weight and around.mesh.dialect.says_capacity:
        made.capacity.CopyFrom(UInt32Value(value=spec.weight))


def _serve(made: wire.Workload, services: Iterable[MeshService], target_of: TargetOf) -> None:
    for service in services:
        ports = []
        for port in service.message.ports:
            target = target_of(service, port, service.port_names[port.service_port])
            if target is not None:
                ports.append(wire.Port(service_port=port.service_port, target_port=target))
        made.services[service.key].ports.extend(ports)  # present even without ports


def _services_of_pod(pod: Pod, around: Surroundings) -> Iterator[MeshService]:
    seen = set()
    for service in around.selection.of(pod.namespace, pod.labels):
        seen.add(service.key)
        yield service
    for key in around.slices_of_pods.get((pod.namespace, pod.name), ()):
        service_ = around.services.get(key)
        if service_ and service_.source is Source.SERVICE and key not in seen:
            seen.add(key)
            yield service_


def _pod_targets(pod: Pod) -> TargetOf:
    named: dict[str, int] = {}
    for container in pod.spec.containers:
        for port in container.ports:
            if port.protocol is Protocol.TCP and port.name:
                named.setdefault(port.name, port.container_port)

    def target_of(service: MeshService, port: wire.Port, names: PortNames) -> int | None:
        if names.target:
            return named.get(names.target)
        if service.source is Source.SERVICE_ENTRY:  # which has no named targets: its ports' own names count
            return named.get(names.name, port.target_port)
        return port.target_port

    return target_of


def _endpoint_targets(spec: WorkloadEntrySpec, *, own_ports_serve_services: bool) -> TargetOf:
    def target_of(service: MeshService, port: wire.Port, names: PortNames) -> int | None:
        if names.target:
            return spec.ports.get(names.target)
        if service.source is Source.SERVICE_ENTRY or own_ports_serve_services:
            return spec.ports.get(names.name, port.target_port)
        return port.target_port

    return target_of


def _slice_ports(slice_: EndpointSlice, service: MeshService) -> Iterator[wire.Port]:
    """The ports of a slice bear the names of the service's ports."""
    numbers = {names.name: number for number, names in service.port_names.items()}
    for port in slice_.ports:
        if port.port and port.protocol is Protocol.TCP and port.name in numbers:
            yield wire.Port(service_port=numbers[port.name], target_port=port.port)


def _service_key(slice_: EndpointSlice, mesh: MeshSettings) -> str:
    return f"{slice_.namespace}/{service_hostname(slice_.service_name, slice_.namespace, mesh.domain)}"


def _owner_name_and_type(pod: Pod, *, types_by_owner: bool) -> tuple[str, wire.WorkloadType.ValueType]:
    """Only pods with a generated name take that of their owner."""
    controllers = [ref for ref in pod.metadata.owner_references if ref.controller]
    if not controllers or not pod.metadata.generate_name:
        return pod.name, wire.POD
    kind, name = controllers[0].kind, controllers[0].name
    template_hash = pod.labels.get("pod-template-hash", "")
    if kind == "ReplicaSet" and template_hash and name.endswith(f"-{template_hash}"):
        kind, name = "Deployment", name.removesuffix(f"-{template_hash}")
    elif kind == "Job" and (match := _JOB_OF_CRON.fullmatch(name)):
        kind, name = "CronJob", match["cron"]
    if not types_by_owner:
        return name, wire.POD
    return (name, _TYPES[kind]) if kind in _TYPES else (pod.name, wire.POD)


def _node_locality(node: Node) -> wire.Locality | None:
    region = node.labels.get("topology.kubernetes.io/region", "")
    zone = node.labels.get("topology.kubernetes.io/zone", "")
    subzone = node.labels.get("topology.istio.io/subzone", "")
    if not (region or zone or subzone):
        return None
    return wire.Locality(region=region, zone=zone, subzone=subzone)


def _first(labels: Labels, names: Iterable[str]) -> str:
    return next((labels[name] for name in names if name in labels), "")
