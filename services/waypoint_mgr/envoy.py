"""Envoy's resources as proto JSON: what a waypoint's listener, chains, clusters and endpoints look like.

A connection finds its chain by its original destination (contracts.handoff). There is no default chain: what
came without one, or with one that no service has, is closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from pykmesh.contracts.handoff import SERVICE_BITS, told_address
from pykmesh.contracts.waypoints import Endpoint
from pykmesh.kernel.records import ip_from_text
from services.waypoint_mgr.protocols import AppProtocol

Json = dict[str, Any]

LISTENER: Final = "waypoint"
CONNECT_TIMEOUT: Final = "10s"
NO_TIMEOUT: Final = "0s"

_TYPE: Final = "type.googleapis.com/envoy.extensions."
_ADS: Final[Json] = {"ads": {}, "resourceApiVersion": "V3"}
_UNLIMITED: Final = 2**32 - 1


class Port(msgspec.Struct, frozen=True, order=True):
    """A service's port: the unit of chains, routes and clusters. `service` is `namespace/hostname`."""

    service: str
    port: int

    @property
    def cluster(self) -> str:
        """The name of its cluster, its load assignment and its routes, in Istio's form."""
        return f"outbound|{self.port}||{self.service}"

    @property
    def stat_name(self) -> str:
        """What statistics call it: `namespace/hostname|port`, with `_` for dots, which would split it."""
        return f"{self.service}|{self.port}".replace(".", "_")


def listener(address: str, port: int, chains: Sequence[Json]) -> Json:
    """`::` takes IPv4 as well. A port that another holds is refused, not shared: no SO_REUSEPORT."""
    where = socket_address(address, port)
    if address == "::":
        where["socketAddress"]["ipv4Compat"] = True
    return {
        "name": LISTENER,
        "address": where,
        "listenerFilters": [_extension("filters.listener.original_dst.v3.OriginalDst")],
        "filterChains": list(chains) or [_nobodys_chain()],
        "enableReusePort": False,
        "connectionBalanceConfig": {"exactBalance": {}},
        "trafficDirection": "INBOUND",
    }


def _nobodys_chain() -> Json:
    """Envoy refuses a listener without chains; at this address there is nobody."""
    proxy = _typed("filters.network.tcp_proxy.v3.TcpProxy") | {"statPrefix": "nobody", "cluster": "nobody"}
    return _chain(Port("nobody", 1), ("255.255.255.255",), "envoy.filters.network.tcp_proxy", proxy)


def socket_address(address: str, port: int) -> Json:
    return {"socketAddress": {"address": address, "portValue": port}}


def http_chain(at: Port, vips: Iterable[str], access_log: bool) -> Json:
    manager = _typed("filters.network.http_connection_manager.v3.HttpConnectionManager") | {
        "statPrefix": at.stat_name,
        "rds": {"routeConfigName": at.cluster, "configSource": _ADS},
        "httpFilters": [_extension("filters.http.router.v3.Router")],
        # As Istio's waypoints, an inner hop: x-forwarded-for and -proto of the edge go on unchanged. Of no
        # peer is it believed who its client is (an empty list of trusted ones): that is whom we talk to.
        "originalIpDetectionExtensions": [
            {
                "name": "envoy.http.original_ip_detection.xff",
                "typedConfig": _typed("http.original_ip_detection.xff.v3.XffConfig")
                | {"xffTrustedCidrs": {"cidrs": []}},
            }
        ],
        "upgradeConfigs": [{"upgradeType": "websocket"}],
        "normalizePath": True,
        "serverHeaderTransformation": "PASS_THROUGH",
        "streamIdleTimeout": NO_TIMEOUT,
        "accessLog": _access_log(access_log),
    }
    return _chain(at, vips, "envoy.filters.network.http_connection_manager", manager)


def tcp_chain(at: Port, vips: Iterable[str], access_log: bool) -> Json:
    proxy = _typed("filters.network.tcp_proxy.v3.TcpProxy") | {
        "statPrefix": at.stat_name,
        "cluster": at.cluster,
        "accessLog": _access_log(access_log),
    }
    return _chain(at, vips, "envoy.filters.network.tcp_proxy", proxy)


def _chain(at: Port, vips: Iterable[str], name: str, config: Json) -> Json:
    """For whoever asks for one of these addresses."""
    told = (told_address(ip_from_text(vip)) for vip in vips)
    ranges = [{"addressPrefix": address, "prefixLen": SERVICE_BITS} for address in told]
    return {
        "name": at.cluster,
        "filterChainMatch": {"prefixRanges": ranges, "destinationPort": at.port},
        "filters": [{"name": name, "typedConfig": config}],
    }


def _access_log(wanted: bool) -> list[Json]:
    if not wanted:
        return []
    return [_extension("access_loggers.stream.v3.StdoutAccessLog", "envoy.access_loggers.stdout")]


def cluster(at: Port, protocol: AppProtocol) -> Json:
    """Endpoints as they are said, never by panic; limits none, as Istio's."""
    version = "http2ProtocolOptions" if protocol is AppProtocol.HTTP2 else "httpProtocolOptions"
    options = _typed("upstreams.http.v3.HttpProtocolOptions") | {"explicitHttpConfig": {version: {}}}
    return {
        "name": at.cluster,
        "altStatName": at.stat_name,
        "type": "EDS",
        "edsClusterConfig": {"edsConfig": _ADS, "serviceName": at.cluster},
        "connectTimeout": CONNECT_TIMEOUT,
        "lbPolicy": "LEAST_REQUEST",
        "commonLbConfig": {"healthyPanicThreshold": {"value": 0}},
        "ignoreHealthOnHostRemoval": True,
        "circuitBreakers": {"thresholds": [dict.fromkeys(_LIMITS, _UNLIMITED)]},
        "typedExtensionProtocolOptions": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    }


_LIMITS: Final = ("maxConnections", "maxPendingRequests", "maxRequests", "maxRetries")


def load_assignment(at: Port, endpoints: Iterable[Endpoint]) -> Json:
    members = [_endpoint(endpoint) for endpoint in endpoints]
    return {"clusterName": at.cluster, "endpoints": [{"lbEndpoints": members}] if members else []}


def _endpoint(endpoint: Endpoint) -> Json:
    said: Json = {"endpoint": {"address": socket_address(endpoint.address, endpoint.port)}}
    return said | {"loadBalancingWeight": endpoint.weight} if endpoint.weight else said


def _typed(name: str) -> Json:
    return {"@type": _TYPE + name}


def _extension(name: str, envoy_name: str = "") -> Json:
    """Named after its place: filters.http.router.v3.Router is envoy.filters.http.router."""
    return {"name": envoy_name or f"envoy.{name.rsplit('.', 2)[0]}", "typedConfig": _typed(name)}
