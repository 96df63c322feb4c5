"""Proto JSON to the bytes that Envoy reads, by the schemas of envoy-data-plane's classes.

The classes say which fields there are; the bytes are written from them directly, for what they do to make
their own is a hundred times as slow (each message compiles its validator). Their import takes a second, so
it waits until a message of a package is needed.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple

from services.waypoint_mgr.envoy import LISTENER, Json
from services.waypoint_mgr.routes import Configuration

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
_MISFITS: Final = (TypeError, ValueError, KeyError, AttributeError, OverflowError, struct.error)


class EncodeError(Exception):
    """JSON that is no such message; the text names the field."""


def encode(type_url: str, message: Json) -> bytes:
    """Raises `EncodeError`."""
    return _message(_class_of(type_url), message, type_url.rpartition(".")[2])


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


class _Field(NamedTuple):
    """`kind` is the class of a message or an enum; `of_map`: the fields of its entries, key and value."""

    number: int
    type: str
    kind: Any
    is_repeated: bool
    is_well_known: bool
    """Its JSON is not its fields: a duration, a wrapped number, …"""
    oneof: str | None
    of_map: tuple[_Field, _Field] | None


@cache
def _class_of(type_url: str) -> Any:
    from betterproto2.casing import pascal_case  # noqa: PLC0415  (with the classes, when needed)

    package, _, name = type_url.removeprefix(_PREFIX).rpartition(".")
    try:
        return getattr(importlib.import_module(f"envoy_data_plane.{package}"), pascal_case(name))
    except (ImportError, AttributeError) as error:
        raise EncodeError(f"{type_url}: Envoy has no such message") from error


@cache
def _field(owner: Any, json_name: str) -> _Field | None:
    from betterproto2.casing import safe_snake_case  # noqa: PLC0415  (with the classes, when needed)

    name = safe_snake_case(json_name)
    schema = owner._betterproto  # noqa: SLF001  (what the classes know of themselves has no other name)
    meta = schema.meta_by_field_name.get(name)
    if meta is None:
        return None
    if not meta.map_meta:
        return _field_of(meta, schema.cls_by_field[name])
    key, value = meta.map_meta
    entry = (_field_of(key, str), _field_of(value, schema.cls_by_field[f"{name}.value"]))
    return _field_of(meta, None)._replace(of_map=entry)


def _field_of(meta: Any, kind: Any) -> _Field:
    kind = meta.unwrap() if meta.unwrap else kind
    is_well_known = meta.proto_type == "message" and (bool(meta.unwrap) or _reads_json_itself(kind))
    return _Field(
        meta.number, meta.proto_type, kind, bool(meta.repeated), is_well_known, meta.group, of_map=None
    )


def _reads_json_itself(kind: Any) -> bool:
    return "from_dict" in vars(kind) and kind.__name__ != "Any"


def _message(kind: Any, value: Any, path: str) -> bytes:
    if not isinstance(value, dict):
        raise EncodeError(f"{path}: expected an object")
    if kind.__name__ == "Any":
        return _any(value, path)
    parts, oneofs = list[bytes](), dict[str, str]()
    for name, item in value.items():
        field = _field(kind, name)
        if field is None:
            raise EncodeError(f"{path}.{name}: {kind.__name__} has no such field")
        if field.oneof and (other := oneofs.setdefault(field.oneof, name)) != name:
            raise EncodeError(f"{path}.{name}: cannot be given beside {other}")
        parts.append(_written(field, item, f"{path}.{name}"))
    return b"".join(parts)


def _any(value: Json, path: str) -> bytes:
    type_url = value.get("@type")
    if not isinstance(type_url, str):
        raise EncodeError(f"{path}: expected an @type")
    rest = {name: item for name, item in value.items() if name != "@type"}
    body = _message(_class_of(type_url), rest, f"{path}({type_url.rpartition('.')[2]})")
    return _delimited(1, type_url.encode()) + _delimited(2, body)


def _written(field: _Field, value: Any, path: str) -> bytes:
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


def _entry(of_map: tuple[_Field, _Field], key: str, value: Any, path: str) -> bytes:
    return _single(of_map[0], key, path) + _single(of_map[1], value, f"{path}[{key}]")


def _single(field: _Field, value: Any, path: str) -> bytes:
    if field.type == "message" and not field.is_well_known:
        return _delimited(field.number, _message(field.kind, value, path))
    try:
        if field.is_well_known:
            return _delimited(field.number, _well_known(field.kind, value))
        return _scalar(field, value)
    except _MISFITS as error:
        what = field.kind.__name__ if field.type in ("message", "enum") else field.type
        raise EncodeError(f"{path}: {value!r} is no {what}") from error


def _well_known(kind: Any, value: Any) -> bytes:
    """The class knows how; few numbers and durations go in, again and again."""
    if isinstance(value, dict | list):
        return bytes(kind.from_dict(value))
    return _well_known_scalar(kind, value)


@lru_cache(_SCALARS_KEPT, typed=True)
def _well_known_scalar(kind: Any, value: Any) -> bytes:
    return bytes(kind.from_dict(value))


def _scalar(field: _Field, value: Any) -> bytes:
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
            return _tag(field.number, _VARINT) + _varint(_enum_number(field.kind, value))
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
def _enum_number(kind: Any, name: str) -> int:
    renamed = kind.betterproto_renamed_proto_names_to_value().get(name)
    return int(kind.from_string(name) if renamed is None else renamed)


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
