"""What a service's port carries, by Istio's protocol selection: `appProtocol`, else the name's first part.

A port that says nothing carries opaque TCP: to look at the first bytes would keep a server that speaks first
waiting. A route that names a port says that it carries HTTP, or gRPC; one for all ports says so of those that
do not say something else themselves.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from pykmesh.manifests.objects import Protocol, Service, ServicePort


class AppProtocol(IntEnum):
    """Of two that are said of one port the greater counts."""

    TCP = 0
    HTTP = 1
    """HTTP/1.1 to endpoints; clients may speak HTTP/2 as well."""
    HTTP2 = 2
    """HTTP/2 to endpoints, as gRPC needs it."""


_KUBERNETES: Final = {"kubernetes.io/h2c": "http2", "kubernetes.io/ws": "http", "kubernetes.io/wss": "https"}
_HTTP: Final = {
    "http": AppProtocol.HTTP,
    "http_proxy": AppProtocol.HTTP,
    "http2": AppProtocol.HTTP2,
    "h2c": AppProtocol.HTTP2,
    "grpc": AppProtocol.HTTP2,
    "grpc-web": AppProtocol.HTTP2,
}


_OPAQUE: Final = frozenset({"tcp", "tls", "https", "mongo", "mysql", "redis"})


def protocol_of(service: Service | None, port: int, routed_as: AppProtocol) -> AppProtocol:
    """Of a port of a mesh service; `service` is the Kubernetes object, where there is one.

    `routed_as`: what routes make of it, TCP for those that have none.
    """
    said = _said(service, port)
    return routed_as if said is AppProtocol.TCP else said


def says_tcp(service: Service | None, port: int) -> bool:
    """Whether a port says that it carries what is no HTTP, or none that can be read."""
    return _word(service, port) in _OPAQUE


def is_only_udp(service: Service | None, port: int) -> bool:
    """Nothing of it goes by way of a waypoint."""
    found = _ports(service, port)
    return bool(found) and all(item.protocol is Protocol.UDP for item in found)


def _said(service: Service | None, port: int) -> AppProtocol:
    return _HTTP.get(_word(service, port), AppProtocol.TCP)


def _word(service: Service | None, port: int) -> str:
    """What names the protocol; a port's name may be anything."""
    for item in _ports(service, port):
        if item.protocol is Protocol.TCP:
            text = _KUBERNETES.get(item.app_protocol, item.app_protocol or item.name).lower()
            return "grpc-web" if text.startswith("grpc-web") else text.partition("-")[0]
    return ""


def _ports(service: Service | None, port: int) -> list[ServicePort]:
    return [item for item in service.spec.ports if item.port == port] if service else []
