"""Istio's labels of traffic, in their order, from what is known of both ends. Pure.

What is not known is "unknown", as in Istio. So are the principals and the security policy, always:
an address is no proof of identity, and what is carried in plaintext is never called mutual TLS.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pykmesh.contracts.messages import ServiceName, WorkloadName, service_name
from pykmesh.kernel.layout import Direction, Reason
from pykmesh.kernel.records import Ip

UNKNOWN: Final = "unknown"
NO_FLAGS: Final = "-"
CONNECT_FAILED: Final = "CONNECT"
DENIED: Final = "DENY"

_WORKLOAD: Final = (
    "workload",
    "canonical_service",
    "canonical_revision",
    "workload_namespace",
    "principal",
    "app",
    "version",
    "cluster",
    "region",
    "zone",
)
LABELS: Final = (
    "reporter",
    *(f"source_{name}" for name in _WORKLOAD),
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    *(f"destination_{name}" for name in _WORKLOAD),
    "request_protocol",
    "response_flags",
    "connection_security_policy",
)

Labels = tuple[str, ...]


class Edge(NamedTuple):
    """Traffic that has one set of labels, as the kernel names it: the socket's own end, and the other."""

    local: Ip
    remote: Ip
    service: int
    direction: int
    flags: str

    @property
    def source(self) -> Ip:
        return self.local if self.direction == Direction.OUTBOUND else self.remote

    @property
    def destination(self) -> Ip:
        return self.remote if self.direction == Direction.OUTBOUND else self.local


def refusal_flags(reason: int) -> str:
    """Istio's response flag of what the mesh refused: DENY by a policy, CONNECT for want of a way."""
    return DENIED if reason == Reason.POLICY_UNSUPPORTED else CONNECT_FAILED


def service_at(direction: int, destination: WorkloadName | None) -> ServiceName | None:
    """The service of a connection that names none, by the address that it went to; port 0.

    A service's own address (a port that it does not have, or traffic that is left alone) names it. Who
    accepts a connection sees not what the client asked for: it is taken for one to the first of the
    destination's services, as Istio guesses it.
    """
    if destination is None or not destination.service:
        return None
    if direction == Direction.INBOUND or destination.is_service:
        return service_name(destination.service, 0)
    return None


def labels(
    edge: Edge, source: WorkloadName | None, destination: WorkloadName | None, service: ServiceName | None
) -> Labels:
    """The values of LABELS. The source reports what went out, the destination what came in."""
    return (
        "source" if edge.direction == Direction.OUTBOUND else "destination",
        *_workload(source),
        *_service(service or service_at(edge.direction, destination)),
        *_workload(destination),
        "tcp",
        edge.flags,
        UNKNOWN,
    )


REQUEST_LABELS: Final = (*LABELS, "response_code", "grpc_response_status")


def request_labels(
    source: WorkloadName | None,
    destination: WorkloadName | None,
    service: ServiceName | None,
    response_code: str,
    response_flags: str,
    grpc_status: str,
) -> Labels:
    """The values of REQUEST_LABELS: the waypoint reports what was asked of a service, and who answered."""
    return (
        "waypoint",
        *_workload(source),
        *_service(service),
        *_workload(destination),
        "grpc" if grpc_status else "http",
        response_flags or NO_FLAGS,
        UNKNOWN,
        response_code,
        grpc_status,
    )


def _workload(name: WorkloadName | None) -> Labels:
    if name is None:
        return (UNKNOWN,) * len(_WORKLOAD)
    values = (
        name.workload,
        name.canonical_name,
        name.canonical_revision,
        name.namespace,
        "",
        name.canonical_name,
        name.canonical_revision,
        name.cluster,
        name.region,
        name.zone,
    )
    return tuple(value or UNKNOWN for value in values)


def _service(name: ServiceName | None) -> Labels:
    if name is None:
        return (UNKNOWN,) * 3
    return name.hostname or UNKNOWN, name.namespace or UNKNOWN, name.name or UNKNOWN
