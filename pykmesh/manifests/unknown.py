"""Fields of a spec that its type does not have: misspelt ones, or of a newer API. Pure.

Passed over in silence, each would be a rule that its author believes to hold. Asked of the kinds whose types
have every field that there is, also those that nothing honours.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from msgspec import inspect

from pykmesh.manifests.objects import (
    WAYPOINT_CLASSES,
    AuthorizationPolicy,
    BackendTLSPolicy,
    DestinationRule,
    Gateway,
    GRPCRoute,
    HTTPRoute,
    Object,
    RequestAuthentication,
    TCPRoute,
    VirtualService,
)

WHOLE: Final[tuple[type[Object], ...]] = (
    HTTPRoute, GRPCRoute, TCPRoute, VirtualService, DestinationRule, AuthorizationPolicy,
    RequestAuthentication, BackendTLSPolicy, Gateway,
)  # fmt: skip


def unknown_fields(plain: Any, kind: type[Object]) -> list[str]:
    """Of a manifest that is read as this kind: their paths, such as `.spec.rules[0].filter`."""
    if kind not in WHOLE or not isinstance(plain, dict):
        return []
    if kind is Gateway and not _is_waypoint(plain.get("spec")):
        return []  # somebody else's
    return list(_unknown(plain.get("spec"), spec_of(kind), ".spec"))


def _is_waypoint(spec: Any) -> bool:
    return isinstance(spec, dict) and spec.get("gatewayClassName") in WAYPOINT_CLASSES


@cache
def spec_of(kind: type[Object]) -> inspect.Type:
    """What a kind's spec is read as."""
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)  # noqa: S101  (a kind is one)
    return next(field.type for field in described.fields if field.name == "spec")


def _unknown(plain: Any, of: inspect.Type, path: str) -> Iterator[str]:
    match of:
        case inspect.Metadata():
            yield from _unknown(plain, of.type, path)
        case inspect.UnionType():
            for each in of.types:
                yield from _unknown(plain, each, path)  # None, and one other
        case inspect.StructType() if isinstance(plain, dict):
            fields = {field.encode_name: field.type for field in of.fields}
            for name, value in plain.items():
                if name in fields:
                    yield from _unknown(value, fields[name], f"{path}.{name}")
                else:
                    yield f"{path}.{name}"
        case inspect.VarTupleType() if isinstance(plain, list):
            for number, value in enumerate(plain):
                yield from _unknown(value, of.item_type, f"{path}[{number}]")
        case inspect.DictType() if isinstance(plain, dict):
            for name, value in plain.items():
                yield from _unknown(value, of.value_type, f"{path}.{name}")
