"""The spec of Istio's DestinationRule (networking.istio.io/v1), with the rules that Istio checks.

Fields that exist are read even where nothing honours them: only so can they be named.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated, Any

import msgspec

from pykmesh.manifests.durations import GoDuration, PositiveDuration
from pykmesh.manifests.http_route import HeaderName
from pykmesh.manifests.names import PortNumber

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Percent = Annotated[int, msgspec.Meta(ge=0, le=100)]
_Any = dict[str, Any]


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False):
    """How all parts are read."""


class SimpleLB(Enum):
    UNSPECIFIED = "UNSPECIFIED"
    LEAST_CONN = "LEAST_CONN"
    RANDOM = "RANDOM"
    PASSTHROUGH = "PASSTHROUGH"
    ROUND_ROBIN = "ROUND_ROBIN"
    LEAST_REQUEST = "LEAST_REQUEST"


RingSize = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
"""Envoy takes eight times as many, and half a gigabyte for them."""
_TABLE_MAX = 5_000_011
_Printed = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]*\Z", max_length=4096)]


class HTTPCookie(_Part, frozen=True, kw_only=True):
    name: HeaderName
    path: _Printed = ""
    ttl: GoDuration | None = None
    attributes: list[_Any] | None = None


class RingHash(_Part, frozen=True, kw_only=True):
    minimum_ring_size: RingSize = 0


class MagLev(_Part, frozen=True, kw_only=True):
    """A size of 0 is Envoy's own; another is a prime."""

    table_size: Count = 0

    def __post_init__(self) -> None:
        if self.table_size and not _is_prime(self.table_size):
            raise ValueError(f"tableSize must be a prime of up to {_TABLE_MAX}: {self.table_size}")


def _is_prime(number: int) -> bool:
    is_in_reach = 2 <= number <= _TABLE_MAX
    return is_in_reach and all(number % factor for factor in range(2, math.isqrt(number) + 1))


class ConsistentHash(_Part, frozen=True, kw_only=True):
    http_header_name: HeaderName | None = None
    http_cookie: HTTPCookie | None = None
    use_source_ip: bool = False
    http_query_parameter_name: _Printed | None = None
    ring_hash: RingHash | None = None
    maglev: MagLev | None = None
    minimum_ring_size: RingSize = 0

    def __post_init__(self) -> None:
        keys = (self.http_header_name, self.http_cookie, self.use_source_ip, self.http_query_parameter_name)
        if sum(map(bool, keys)) != 1:
            raise ValueError(
                "one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName must be given"
            )
        if self.ring_hash and self.maglev:
            raise ValueError("only one of ringHash and maglev may be given")


class LoadBalancer(_Part, frozen=True, kw_only=True):
    simple: SimpleLB | None = None
    consistent_hash: ConsistentHash | None = None
    locality_lb_setting: _Any | None = None
    zone_aware_lb_setting: _Any | None = None
    warmup: _Any | None = None
    warmup_duration_secs: str | None = None

    def __post_init__(self) -> None:
        if self.simple and self.consistent_hash:
            raise ValueError("only one of simple and consistentHash may be given")


class TCPSettings(_Part, frozen=True, kw_only=True):
    max_connections: Count | None = None
    connect_timeout: PositiveDuration | None = None
    tcp_keepalive: _Any | None = None
    max_connection_duration: GoDuration | None = None
    idle_timeout: GoDuration | None = None


class HTTPSettings(_Part, frozen=True, kw_only=True):
    """A count of 0 is no limit of its own."""

    http1_max_pending_requests: Count = 0
    http2_max_requests: Count = 0
    max_requests_per_connection: Count = 0
    max_retries: Count = 0
    idle_timeout: GoDuration | None = None
    h2_upgrade_policy: str | None = None
    use_client_protocol: bool = False
    max_concurrent_streams: Count = 0
    http2_keep_alive: _Any | None = None


class ConnectionPool(_Part, frozen=True, kw_only=True):
    tcp: TCPSettings = TCPSettings()
    http: HTTPSettings = HTTPSettings()


class OutlierDetection(_Part, frozen=True, kw_only=True):
    split_external_local_origin_errors: bool = False
    consecutive_local_origin_failures: Count | None = None
    consecutive_errors: Count | None = None
    consecutive_gateway_errors: Count | None = None
    consecutive_5xx_errors: Count | None = msgspec.field(name="consecutive5xxErrors", default=None)
    interval: PositiveDuration | None = None
    base_ejection_time: PositiveDuration | None = None
    max_ejection_percent: Percent = 0
    min_health_percent: Percent = 0
    outlier_detection_http_error_codes: tuple[Any, ...] = ()


class TLSMode(Enum):
    DISABLE = "DISABLE"
    SIMPLE = "SIMPLE"
    MUTUAL = "MUTUAL"
    ISTIO_MUTUAL = "ISTIO_MUTUAL"


class ClientTLS(_Part, frozen=True, kw_only=True):
    """With nothing said: none."""

    mode: TLSMode = TLSMode.DISABLE
    client_certificate: str = ""
    private_key: str = ""
    ca_certificates: str = ""
    credential_name: str = ""
    subject_alt_names: tuple[str, ...] = ()
    sni: Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]*\Z", max_length=253)] = ""
    insecure_skip_verify: bool | None = None
    ca_crl: str = ""


class _Policy(_Part, frozen=True, kw_only=True):
    load_balancer: LoadBalancer | None = None
    connection_pool: ConnectionPool | None = None
    outlier_detection: OutlierDetection | None = None
    tls: ClientTLS | None = None


class PortSelector(_Part, frozen=True, kw_only=True):
    number: PortNumber


class PortPolicy(_Policy, frozen=True, kw_only=True):
    port: PortSelector


class TrafficPolicy(_Policy, frozen=True, kw_only=True):
    port_level_settings: tuple[PortPolicy, ...] = ()
    tunnel: _Any | None = None
    proxy_protocol: _Any | None = None
    retry_budget: _Any | None = None

    def at(self, port: int) -> PortPolicy | TrafficPolicy:
        """What holds for a port: its own settings alone, where it has any."""
        return next((own for own in self.port_level_settings if own.port.number == port), self)


class Subset(_Part, frozen=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[-A-Za-z0-9_.]{1,63}\Z")]
    labels: dict[str, str] = {}
    traffic_policy: TrafficPolicy | None = None


class DestinationRuleSpec(_Part, frozen=True, kw_only=True):
    host: Annotated[str, msgspec.Meta(min_length=1)]
    traffic_policy: TrafficPolicy = TrafficPolicy()
    subsets: tuple[Subset, ...] = ()
    workload_selector: _Any | None = None
    export_to: tuple[str, ...] = ()
