"""Objects in, `istio.workload.Address` messages out: what istiod would say of the same cluster.

Pure: the result depends on the objects, their ages and the settings alone. Addresses must have been given
already (see `allocate`); an object without one is not sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec

from pykmesh.controlplane.services import mesh_services
from pykmesh.controlplane.settings import MeshSettings
from pykmesh.controlplane.waypoints import Waypoints
from pykmesh.controlplane.workloads import (
    entry_workload,
    pod_workload,
    service_entry_workloads,
    slice_workloads,
    surroundings,
)
from pykmesh.manifests.objects import (
    EndpointSlice,
    Gateway,
    Namespace,
    Node,
    Object,
    Pod,
    Service,
    ServiceEntry,
    WorkloadEntry,
)
from pykmesh.proto import workload_pb2 as wire

_T = TypeVar("_T", bound=Object)


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """All objects, by kind."""

    namespaces: tuple[Namespace, ...] = ()
    nodes: tuple[Node, ...] = ()
    pods: tuple[Pod, ...] = ()
    services: tuple[Service, ...] = ()
    slices: tuple[EndpointSlice, ...] = ()
    service_entries: tuple[ServiceEntry, ...] = ()
    workload_entries: tuple[WorkloadEntry, ...] = ()
    gateways: tuple[Gateway, ...] = ()

    @classmethod
    def of(cls, objects: Iterable[Object]) -> Cluster:
        everything = tuple(objects)

        def all_of(kind: type[_T]) -> tuple[_T, ...]:
            return tuple(obj for obj in everything if isinstance(obj, kind))

        return cls(
            namespaces=all_of(Namespace),
            nodes=all_of(Node),
            pods=all_of(Pod),
            services=all_of(Service),
            slices=all_of(EndpointSlice),
            service_entries=all_of(ServiceEntry),
            workload_entries=all_of(WorkloadEntry),
            gateways=all_of(Gateway),
        )


def translate(cluster: Cluster, mesh: MeshSettings) -> Mapping[str, wire.Address]:
    """All resources by name: services by `namespace/hostname`, workloads by uid."""
    services = mesh_services(cluster.services, cluster.service_entries, cluster.namespaces, mesh)
    waypoints = Waypoints(cluster.namespaces, cluster.gateways, mesh)
    waypoints.set_for_services(services.values())
    around = surroundings(services, cluster.nodes, cluster.slices, mesh)
    resources = {key: wire.Address(service=service.message) for key, service in services.items()}
    for pod in cluster.pods:
        made = pod_workload(pod, around)
        if made:
            waypoints.set_for_workload(made, pod.labels)
            resources[made.uid] = wire.Address(workload=made)
    for workload_entry in cluster.workload_entries:
        made = entry_workload(workload_entry, around)
        waypoints.set_for_workload(made, workload_entry.all_labels)
        resources[made.uid] = wire.Address(workload=made)
    for service_entry in cluster.service_entries:
        for made in service_entry_workloads(service_entry, around):
            resources[made.uid] = wire.Address(workload=made)
    for slice_ in cluster.slices:
        for made in slice_workloads(slice_, around):
            resources[made.uid] = wire.Address(workload=made)
    return resources
