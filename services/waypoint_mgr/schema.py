"""Which fields Envoy's messages have: from a file that is made at build time, of envoy-data-plane's classes.

    python -m services.waypoint_mgr.schema FILE

To import those classes takes seconds and 20 MB in each process that does.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec

FILE: Final = Path(__file__).with_name("envoy.json")
WELL_KNOWN: Final = "google.protobuf."
"""How kinds begin whose JSON is not their fields: a duration, a wrapped number, …"""
ANY: Final = f"{WELL_KNOWN}Any"
_PACKAGE: Final = "envoy_data_plane."
_ROOTS: Final = (
    "config.cluster.v3.Cluster",
    "config.endpoint.v3.ClusterLoadAssignment",
    "config.listener.v3.Listener",
    "config.route.v3.RouteConfiguration",
    "config.trace.v3.OpenTelemetryConfig",
    "extensions.access_loggers.stats.v3.Config",
    "extensions.access_loggers.stream.v3.StdoutAccessLog",
    "extensions.filters.http.cors.v3.Cors",
    "extensions.filters.http.cors.v3.CorsPolicy",
    "extensions.filters.http.fault.v3.HTTPFault",
    "extensions.filters.http.jwt_authn.v3.JwtAuthentication",
    "extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
    "extensions.filters.http.lua.v3.Lua",
    "extensions.filters.http.rbac.v3.RBAC",
    "extensions.filters.http.router.v3.Router",
    "extensions.filters.listener.original_dst.v3.OriginalDst",
    "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
    "extensions.filters.network.rbac.v3.RBAC",
    "extensions.filters.network.set_filter_state.v3.Config",
    "extensions.filters.network.tcp_proxy.v3.TcpProxy",
    "extensions.http.original_ip_detection.xff.v3.XffConfig",
    "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
    "extensions.tracers.opentelemetry.samplers.v3.ParentBasedSamplerConfig",
    "extensions.tracers.opentelemetry.samplers.v3.TraceIdRatioBasedSamplerConfig",
    "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
    "extensions.upstreams.http.v3.HttpProtocolOptions",
)
"""What waypoints are configured with, and all that is in them."""


class Field(msgspec.Struct, frozen=True, array_like=True):
    """`kind`: of a message or enum. `of_map`: the fields of its entries, key and value."""

    number: int
    type: str
    kind: str = ""
    is_repeated: bool = False
    oneof: str = ""
    of_map: tuple[Field, Field] | None = None


class Schema(msgspec.Struct, frozen=True):
    """Fields of messages by their JSON names, numbers of enums."""

    messages: dict[str, dict[str, Field]]
    enums: dict[str, dict[str, int]]


@cache
def schema() -> Schema:
    """Raises OSError where it was not made."""
    return msgspec.json.decode(FILE.read_bytes(), type=Schema)


def make() -> Schema:
    """Of the classes that are installed."""
    made = Schema({}, {})
    for root in _ROOTS:
        full = f"envoy.{root}"
        package, _, name = full.rpartition(".")
        kind = getattr(importlib.import_module(_PACKAGE + package), _as_class(name))
        _add(kind, made)
        made.messages[full] = made.messages[_name(kind)]  # HTTPFault is HttpFault there
    return made


def _as_class(name: str) -> str:
    from betterproto2.casing import pascal_case  # noqa: PLC0415  (at build time alone)

    return str(pascal_case(name))


def _add(kind: Any, made: Schema) -> None:
    """With all that is in it. What the classes know of themselves has no name for others."""
    name = _name(kind)
    if name.startswith(WELL_KNOWN) or name in made.messages or name in made.enums:
        return
    if not hasattr(kind, "_betterproto"):
        numbers = {each.name: int(each) for each in kind}
        made.enums[name] = numbers | kind.betterproto_renamed_proto_names_to_value()
        return
    fields = made.messages[name] = {}
    own = kind._betterproto  # noqa: SLF001
    for attribute, meta in own.meta_by_field_name.items():
        if meta.map_meta:
            key, value = meta.map_meta
            inner = own.cls_by_field[f"{attribute}.value"]
            of_map = _field(key, None, made), _field(value, inner, made)
            found = Field(meta.number, meta.proto_type, of_map=of_map)
        else:
            found = _field(meta, own.cls_by_field[attribute], made)
        fields[_json_name(attribute)] = found


def _field(meta: Any, kind: Any, made: Schema) -> Field:
    kind = meta.unwrap() if meta.unwrap else kind
    is_named = meta.proto_type in ("message", "enum")
    if is_named:
        _add(kind, made)
    return Field(
        meta.number, meta.proto_type, _name(kind) if is_named else "", bool(meta.repeated), meta.group or ""
    )


def _json_name(attribute: str) -> str:
    first, *rest = attribute.rstrip("_").split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in rest)


def _name(kind: Any) -> str:
    package = kind.__module__.removeprefix(_PACKAGE) + "."
    return f"{WELL_KNOWN if WELL_KNOWN in package else package}{kind.__name__}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(msgspec.json.encode(make(), order="sorted"))
