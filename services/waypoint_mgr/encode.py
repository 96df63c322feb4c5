"""Proto JSON to the bytes that Envoy reads, by the schema of its messages (`schema.py`)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, Final

from google.protobuf import duration_pb2, empty_pb2, json_format, struct_pb2, timestamp_pb2, wrappers_pb2

from services.waypoint_mgr.envoy import LISTENER, Json
from services.waypoint_mgr.routes import Configuration
from services.waypoint_mgr.schema import ANY, WELL_KNOWN, Field, schema

_PREFIX: Final = "type.googleapis.com/"
CLUSTER_TYPE: Final = f"{_PREFIX}envoy.config.cluster.v3.Cluster"
ENDPOINT_TYPE: Final = f"{_PREFIX}envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER_TYPE: Final = f"{_PREFIX}envoy.config.listener.v3.Listener"
ROUTE_TYPE: Final = f"{_PREFIX}envoy.config.route.v3.RouteConfiguration"

Resources = Mapping[str, Mapping[str, bytes]]
"""By type URL, then by name."""

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_INT_RANGES: Final = {
    "int32": (-(2**31), 2**31),
    "int64": (-(2**63), 2**63),
    "uint32": (0, 2**32),
    "uint64": (0, 2**64),
}
_FIXED: Final = {"float": (_FIXED32, "<f"), "double": (_FIXED64, "<d")}
_SCALARS_KEPT: Final = 4096
_MISFITS: Final = (
    TypeError, ValueError, KeyError, AttributeError, OverflowError, struct.error, json_format.ParseError,
)  # fmt: skip
_WELL_KNOWN: Final = (duration_pb2, empty_pb2, struct_pb2, timestamp_pb2, wrappers_pb2)


class EncodeError(Exception):
    """JSON that is no such message; the text names the field."""


def encode(type_url: str, message: Json) -> bytes:
    """Raises `EncodeError`."""
    return _message(_kind_of(type_url), message, _last(type_url))


def resources(configuration: Configuration, address: str, port: int) -> Resources:
    """All that an instance gets that listens there. Raises `EncodeError`."""
    listener = configuration.listener(address, port)
    return {
        CLUSTER_TYPE: _encode_all(CLUSTER_TYPE, configuration.clusters),
        ENDPOINT_TYPE: _encode_all(ENDPOINT_TYPE, configuration.assignments),
        LISTENER_TYPE: _encode_all(LISTENER_TYPE, {LISTENER: listener}),
        ROUTE_TYPE: _encode_all(ROUTE_TYPE, configuration.routes),
    }


def _encode_all(type_url: str, messages: Mapping[str, Json]) -> dict[str, bytes]:
    return {name: encode(type_url, message) for name, message in messages.items()}


def _kind_of(type_url: str) -> str:
    kind = type_url.removeprefix(_PREFIX)
    if kind not in schema().messages:
        raise EncodeError(f"{type_url}: Envoy has no such message, or it is not in the schema")
    return kind


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _message(kind: str, value: Any, path: str) -> bytes:
    if not isinstance(value, dict):
        raise EncodeError(f"{path}: expected an object")
    if kind == ANY:
        return _any(value, path)
    parts, oneofs, fields = list[bytes](), dict[str, str](), schema().messages[kind]
    for name, item in value.items():
        field = fields.get(name)
        if field is None:
            raise EncodeError(f"{path}.{name}: {_last(kind)} has no such field")
        if field.oneof and (other := oneofs.setdefault(field.oneof, name)) != name:
            raise EncodeError(f"{path}.{name}: cannot be given beside {other}")
        parts.append(_written(field, item, f"{path}.{name}"))
    return b"".join(parts)


def _any(value: Json, path: str) -> bytes:
    type_url = value.get("@type")
    if not isinstance(type_url, str):
        raise EncodeError(f"{path}: expected an @type")
    rest = {name: item for name, item in value.items() if name != "@type"}
    body = _message(_kind_of(type_url), rest, f"{path}({_last(type_url)})")
    return _delimited(1, type_url.encode()) + _delimited(2, body)


def _written(field: Field, value: Any, path: str) -> bytes:
    """The field with its tag, as often as it is repeated."""
    if field.of_map:
        if not isinstance(value, dict):
            raise EncodeError(f"{path}: expected an object")
        entries = (_entry(field.of_map, key, item, path) for key, item in value.items())
        return b"".join(_delimited(field.number, entry) for entry in entries)
    if field.is_repeated:
        if not isinstance(value, list):
            raise EncodeError(f"{path}: expected a list")
        return b"".join(_single(field, item, f"{path}[{i}]") for i, item in enumerate(value))
    return _single(field, value, path)


def _entry(of_map: tuple[Field, Field], key: str, value: Any, path: str) -> bytes:
    return _single(of_map[0], key, path) + _single(of_map[1], value, f"{path}[{key}]")


def _single(field: Field, value: Any, path: str) -> bytes:
    is_well_known = field.kind.startswith(WELL_KNOWN) and field.kind != ANY
    if field.type == "message" and not is_well_known:
        return _delimited(field.number, _message(field.kind, value, path))
    try:
        if is_well_known:
            return _delimited(field.number, _well_known(field.kind, value))
        return _scalar(field, value)
    except _MISFITS as error:
        what = _last(field.kind) or field.type
        raise EncodeError(f"{path}: {value!r} is no {what}") from error


def _well_known(kind: str, value: Any) -> bytes:
    """Their own classes know how; few numbers and durations go in, again and again."""
    if isinstance(value, dict | list):
        return _parsed(kind, value)
    return _parsed_scalar(kind, value)


def _parsed(kind: str, value: Any) -> bytes:
    name = _last(kind)
    made = next(getattr(module, name) for module in _WELL_KNOWN if hasattr(module, name))()
    json_format.ParseDict(value, made)
    found: bytes = made.SerializeToString()
    return found


_parsed_scalar = lru_cache(_SCALARS_KEPT, typed=True)(_parsed)


def _scalar(field: Field, value: Any) -> bytes:
    """Raises one of `_MISFITS` for what is not of the type."""
    match field.type:
        case "string":
            if not isinstance(value, str):
                raise TypeError(value)
            return _delimited(field.number, value.encode())
        case "bool":
            if not isinstance(value, bool):
                raise TypeError(value)
            return _tag(field.number, _VARINT) + _varint(value)
        case "enum":
            return _tag(field.number, _VARINT) + _varint(schema().enums[field.kind][value])
        case "float" | "double":
            wire, form = _FIXED[field.type]
            return _tag(field.number, wire) + struct.pack(form, value)
        case _:
            least, end = _INT_RANGES[field.type]
            number = int(value) if isinstance(value, str) else value
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number < end:
                raise ValueError(value)
            return _tag(field.number, _VARINT) + _varint(number)


@cache
def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _delimited(number: int, body: bytes) -> bytes:
    return _tag(number, _DELIMITED) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    """Negative numbers as 64-bit ones."""
    rest, out = value % 2**64, bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)
