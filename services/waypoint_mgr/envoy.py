"""Envoy's resources as proto JSON: what a waypoint's listener, chains, clusters and endpoints look like.

A connection finds its chain by its original destination (contracts.handoff). There is no default chain: what
came without one, or with one that no service has, is closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

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
UNLIMITED: Final = 2**32 - 1


class Port(msgspec.Struct, frozen=True, order=True):
    """A service's port: the unit of chains, routes and clusters. `service` is `namespace/hostname`.

    Or a workload's, by its uid; 0 is any that no other chain is for. `subset`: one of a DestinationRule's,
    which is a cluster of its own; of what passes to a workload, the address that it was meant for.
    """

    service: str
    port: int
    subset: str = ""

    @property
    def cluster(self) -> str:
        """The name of its cluster, its load assignment and its routes, in Istio's form."""
        return f"outbound|{self.port}|{self.subset}|{self.service}"

    @property
    def stat_name(self) -> str:
        """What statistics call it: `namespace/hostname|port`, with `_` for dots, which would split it."""
        return f"{self.service}|{self.port}{self.subset and f'|{self.subset}'}".replace(".", "_")


class Range(NamedTuple):
    """Addresses that begin alike."""

    address: str
    bits: int


def everybodys(vips: Iterable[str], secret: bytes) -> list[Range]:
    """What is told of any client's connections to these addresses."""
    return [Range(told_address(ip_from_text(vip), secret), SERVICE_BITS) for vip in vips]


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
    return closing_chain(Port("nobody", 1), [Range("255.255.255.255", 32)])


def closing_chain(at: Port, ranges: Iterable[Range]) -> Json:
    """There is no such cluster, so connections are closed at once."""
    proxy = typed("filters.network.tcp_proxy.v3.TcpProxy") | {"statPrefix": "closed", "cluster": "nobody"}
    return _chain(at, ranges, named("envoy.filters.network.tcp_proxy", proxy), name=f"{at.cluster}|closed")


def socket_address(address: str, port: int) -> Json:
    return {"socketAddress": {"address": address, "portValue": port}}


def http_chain(
    at: Port,
    ranges: Iterable[Range],
    access_log: bool,
    filters: Sequence[Json] = (),
    tracing: Json | None = None,
) -> Json:
    """`filters` are asked before a request is routed."""
    manager = typed("filters.network.http_connection_manager.v3.HttpConnectionManager") | {
        "statPrefix": at.stat_name,
        "rds": {"routeConfigName": at.cluster, "configSource": _ADS},
        "httpFilters": [*filters, _router()],
        # As Istio's waypoints, an inner hop: x-forwarded-for and -proto of the edge go on unchanged (without
        # this extension the peer would be added). So to Envoy whoever is named there last is the client:
        # nothing may be decided by its "remote" address, which anybody can write, but by the peer's.
        "originalIpDetectionExtensions": [
            {
                "name": "envoy.http.original_ip_detection.xff",
                "typedConfig": typed("http.original_ip_detection.xff.v3.XffConfig")
                | {"xffTrustedCidrs": {"cidrs": []}},
            }
        ],
        "upgradeConfigs": [{"upgradeType": "websocket"}],
        "normalizePath": True,
        "serverHeaderTransformation": "PASS_THROUGH",
        "streamIdleTimeout": NO_TIMEOUT,
        # When its chain changes a connection is told to go, and stays for so long, also one of HTTP/1.1 whose
        # client waits for its end: Envoy's five seconds are more than some have.
        "drainTimeout": "1s",
        "accessLog": [_request_log(at), *_access_log(access_log)],
        **({"tracing": tracing} if tracing else {}),
    }
    return _chain(at, ranges, named("envoy.filters.network.http_connection_manager", manager))


def _router() -> Json:
    """Without a cluster's own statistics of response codes, which nobody reads: `_request_log` has them."""
    return named(
        "envoy.filters.http.router", typed("filters.http.router.v3.Router") | {"dynamicStats": False}
    )


PASSING: Final = "passing"
"""The cluster of connections that go to where they were meant for."""
_PASSED_TO: Final = "envoy.network.transport_socket.original_dst_address"


def passing_cluster() -> Json:
    return {
        "name": PASSING,
        "type": "ORIGINAL_DST",
        "connectTimeout": CONNECT_TIMEOUT,
        "lbPolicy": "CLUSTER_PROVIDED",
    }


def passed_to(address: str) -> Json:
    """A filter before the proxy: PASSING leads to this address, at the port that was asked for."""
    host = f"[{address}]" if ":" in address else address
    text = {"textFormatSource": {"inlineString": f"{host}:%DOWNSTREAM_LOCAL_PORT%"}}
    config = typed("filters.network.set_filter_state.v3.Config") | {
        "onNewConnection": [{"objectKey": _PASSED_TO, "formatString": text}]
    }
    return named("envoy.filters.network.set_filter_state", config)


def tcp_chain(
    at: Port,
    ranges: Iterable[Range],
    access_log: bool,
    target: str | list[Json],
    filters: Sequence[Json] = (),
    *,
    is_by_source: bool = False,
) -> Json:
    """`target`: a cluster, or a split. `filters` are asked when the client's first byte comes.

    `is_by_source`: a client's connections keep to an endpoint.
    """
    to: Json = {"cluster": target} if isinstance(target, str) else {"weightedClusters": {"clusters": target}}
    proxy = typed("filters.network.tcp_proxy.v3.TcpProxy") | {
        "statPrefix": at.stat_name,
        **to,
        "accessLog": _access_log(access_log),
        **({"hashPolicy": [{"sourceIp": {}}]} if is_by_source else {}),
    }
    return _chain(at, ranges, *filters, named("envoy.filters.network.tcp_proxy", proxy))


def rbac(rules: Json) -> Json:
    return named("envoy.filters.http.rbac", typed("filters.http.rbac.v3.RBAC") | {"rules": rules})


def network_rbac(at: Port, rules: Json) -> Json:
    config = typed("filters.network.rbac.v3.RBAC") | {"rules": rules, "statPrefix": f"{at.stat_name}."}
    return named("envoy.filters.network.rbac", config)


def named(name: str, config: Json) -> Json:
    return {"name": name, "typedConfig": config}


def _chain(at: Port, ranges: Iterable[Range], *filters: Json, name: str = "") -> Json:
    """For what is told of these addresses."""
    told = [{"addressPrefix": found.address, "prefixLen": found.bits} for found in ranges]
    return {
        "name": name or at.cluster,
        "filterChainMatch": {"prefixRanges": told, **({"destinationPort": at.port} if at.port else {})},
        "filters": list(filters),
    }


def _access_log(wanted: bool) -> list[Json]:
    if not wanted:
        return []
    return [_extension("access_loggers.stream.v3.StdoutAccessLog", "envoy.access_loggers.stdout")]


REQUESTS: Final = "requests"
"""What the names of statistics of requests begin with."""
REQUEST_SERIES_MAX: Final = 3000
"""Of one Envoy. Requests that would begin another series are not counted, and this is told."""
REQUEST_TAGS: Final = (
    "client",
    "endpoint",
    "service",
    "port",
    "response_code",
    "response_flags",
    "grpc_status",
)
REQUEST_HISTOGRAMS: Final = ("duration", "request_bytes", "response_bytes")


def _request_log(at: Port) -> Json:
    """Counts each request by who asked whom for what, and how it ended (contracts.requests)."""
    values = (
        "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%",
        "%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        at.service.replace("%", "%%"),
        str(at.port),
        "%RESPONSE_CODE%",
        "%RESPONSE_FLAGS%",
        "%GRPC_STATUS_NUMBER%",
    )
    tags = [{"name": tag, "valueFormat": value} for tag, value in zip(REQUEST_TAGS, values, strict=True)]
    kinds = (("Milliseconds", "%DURATION%"), ("Bytes", "%BYTES_RECEIVED%"), ("Bytes", "%BYTES_SENT%"))
    histograms = [
        {"stat": {"name": name, "tags": tags}, "unit": unit, "valueFormat": value}
        for name, (unit, value) in zip(REQUEST_HISTOGRAMS, kinds, strict=True)
    ]
    # One scope for all chains, and bounded: each that asks and each that answers makes series of its own.
    scope = {
        "prefix": REQUESTS,
        "sharingName": REQUESTS,
        "maxHistograms": REQUEST_SERIES_MAX * len(REQUEST_HISTOGRAMS),
    }
    config = typed("access_loggers.stats.v3.Config") | {"statsScope": scope, "histograms": histograms}
    return named("envoy.access_loggers.stats", config)


def cluster(
    at: Port,
    protocol: AppProtocol,
    fields: Json | None = None,
    http: Json | None = None,
    options: Json | None = None,
) -> Json:
    """Endpoints as they are said, never by panic.

    `fields`, `http`, `options`: what is said beside, of it, of its HTTP connections, of its protocols.
    """
    version = "http2ProtocolOptions" if protocol is AppProtocol.HTTP2 else "httpProtocolOptions"
    protocols = typed("upstreams.http.v3.HttpProtocolOptions") | {
        "explicitHttpConfig": {version: {}},
        "commonHttpProtocolOptions": http or {},
        **(options or {}),
    }
    return {
        "name": at.cluster,
        "altStatName": at.stat_name,
        "type": "EDS",
        "edsClusterConfig": {"edsConfig": _ADS, "serviceName": at.cluster},
        "connectTimeout": CONNECT_TIMEOUT,
        "lbPolicy": "LEAST_REQUEST",
        "commonLbConfig": {"healthyPanicThreshold": {"value": 0}},
        "ignoreHealthOnHostRemoval": True,
        "typedExtensionProtocolOptions": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocols
        },
        **(fields or {}),
    }


def load_assignment(at: Port, endpoints: Iterable[Endpoint]) -> Json:
    members = [_endpoint(endpoint) for endpoint in endpoints]
    return {"clusterName": at.cluster, "endpoints": [{"lbEndpoints": members}] if members else []}


def _endpoint(endpoint: Endpoint) -> Json:
    at: Json = {"address": socket_address(endpoint.address, endpoint.port)}
    if endpoint.others:
        others = [socket_address(address, endpoint.port) for address in endpoint.others]
        at["additionalAddresses"] = [{"address": each} for each in others]
    said: Json = {"endpoint": at}
    return said | {"loadBalancingWeight": endpoint.weight} if endpoint.weight else said


def typed(name: str) -> Json:
    return {"@type": _TYPE + name}


def _extension(name: str, envoy_name: str = "") -> Json:
    """Named after its place: filters.http.router.v3.Router is envoy.filters.http.router."""
    return {"name": envoy_name or f"envoy.{name.rsplit('.', 2)[0]}", "typedConfig": typed(name)}
