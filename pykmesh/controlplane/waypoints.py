"""Which services and workloads go by way of a waypoint: their labels and namespaces', as Istio reads them.

Unlike istiod, which says no waypoint until its Gateway has an address, a service that asks for one gets it at
once: while there is none, data planes refuse its traffic rather than let it past. They do the same where the
Gateway does not let the service's namespace in: it is said to go by way of a waypoint that there is not.
"""

from __future__ import annotations

from collections.abc import Iterable

from pykmesh.controlplane.services import MeshService
from pykmesh.controlplane.settings import MeshSettings
from pykmesh.manifests.objects import (
    GATEWAY_NAME,
    USE_WAYPOINT,
    USE_WAYPOINT_NAMESPACE,
    Gateway,
    Labels,
    Namespace,
    service_hostname,
)
from pykmesh.proto import workload_pb2 as wire

NONE = "none"
NOT_ALLOWED = "not-allowed--"
"""No object can be called so."""
_HBONE_PORT = 15008


class Waypoints:
    """The Gateways, and who asks for which."""

    def __init__(
        self, namespaces: Iterable[Namespace], gateways: Iterable[Gateway], mesh: MeshSettings
    ) -> None:
        self._labels = {namespace.name: namespace.labels for namespace in namespaces}
        self._gateways = {(g.namespace, g.name): g for g in gateways if g.is_waypoint}
        self._mesh = mesh

    def set_for_services(self, services: Iterable[MeshService]) -> None:
        """Writes into their messages what they go by way of."""
        for service in services:
            place = self._place(service.metadata.labels, service.metadata.namespace)
            gateway = place and self._gateways.get(place)
            if place and (gateway is None or gateway.is_for_services):
                self._say(service.message.waypoint, place, gateway, service.metadata.namespace)

    def set_for_workload(self, workload: wire.Workload, labels: Labels) -> None:
        """What is meant for its own address: where its Gateway says that it is for workloads.

        Of one that there is not nobody knows what it is for. A label of the workload's own means this, as it
        has no other meaning; one of its namespace is about services.
        """
        place = self._place(labels, workload.namespace)
        gateway = place and self._gateways.get(place)
        is_for_it = gateway.is_for_workloads if gateway else USE_WAYPOINT in labels
        if place and is_for_it:
            self._say(workload.waypoint, place, gateway, workload.namespace)

    def _place(self, labels: Labels, namespace: str) -> tuple[str, str] | None:
        """Namespace and name of the Gateway that is asked for. None for a waypoint itself, or for none."""
        if GATEWAY_NAME in labels:
            return None
        of_namespace = self._labels.get(namespace, {})
        place = _asked_for(labels, namespace) or _asked_for(of_namespace, namespace)
        return None if place is None or place[1] == NONE else place

    def _say(
        self, said: wire.GatewayAddress, place: tuple[str, str], gateway: Gateway | None, user: str
    ) -> None:
        namespace, name = place
        if gateway is not None and not gateway.lets_in(user, self._labels.get(user, {})):
            name = NOT_ALLOWED
        said.hostname.namespace = namespace
        said.hostname.hostname = service_hostname(name, namespace, self._mesh.domain)
        said.hbone_mtls_port = _HBONE_PORT


def _asked_for(labels: Labels, namespace: str) -> tuple[str, str] | None:
    name = labels.get(USE_WAYPOINT)
    return None if name is None else (labels.get(USE_WAYPOINT_NAMESPACE, namespace), name)
