"""Which services go by way of a waypoint: labels of services and namespaces, as Istio reads them.

Unlike istiod, which says no waypoint until its Gateway has an address, a service that asks for one gets it at
once: while there is none, data planes refuse its traffic rather than let it past. They do the same where the
Gateway does not let the service's namespace in: it is said to go by way of a waypoint that there is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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

WAYPOINT_FOR = "istio.io/waypoint-for"
NONE = "none"
NOT_ALLOWED = "not-allowed--"
"""No object can be called so."""
_FOR_SERVICES = frozenset({"service", "all"})
_HBONE_PORT = 15008


def set_waypoints(
    services: Mapping[str, MeshService],
    namespaces: Iterable[Namespace],
    gateways: Iterable[Gateway],
    mesh: MeshSettings,
) -> None:
    """Writes into the services' messages what they go by way of."""
    labels = {namespace.name: namespace.labels for namespace in namespaces}
    waypoints = {(g.namespace, g.name): g for g in gateways if g.is_waypoint}
    for service in services.values():
        metadata = service.metadata
        if GATEWAY_NAME in metadata.labels:  # a waypoint's own service
            continue
        place = _place(metadata.labels, metadata.namespace) or _place(
            labels.get(metadata.namespace, {}), metadata.namespace
        )
        if place is None or place[1] == NONE:
            continue
        gateway = waypoints.get(place)
        if gateway is not None and gateway.labels.get(WAYPOINT_FOR, "service") not in _FOR_SERVICES:
            continue
        namespace, name = place
        own_labels = labels.get(metadata.namespace, {})
        if gateway is not None and not gateway.lets_in(metadata.namespace, own_labels):
            name = NOT_ALLOWED
        service.message.waypoint.hostname.namespace = namespace
        service.message.waypoint.hostname.hostname = service_hostname(name, namespace, mesh.domain)
        service.message.waypoint.hbone_mtls_port = _HBONE_PORT


def _place(labels: Labels, namespace: str) -> tuple[str, str] | None:
    """Namespace and name of the Gateway that is asked for; None where nothing is said."""
    name = labels.get(USE_WAYPOINT)
    return None if name is None else (labels.get(USE_WAYPOINT_NAMESPACE, namespace), name)
