"""The spec of Gateway API's GRPCRoute (v1), and the HTTPRoute that does the same.

A call is a POST to /SERVICE/METHOD.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import msgspec

from pykmesh.manifests.http_route import (
    BackendRef,
    Filters,
    FilterType,
    HeaderMatch,
    Hostname,
    HTTPRouteSpec,
    ParentRef,
    PathMatch,
    PathMatchType,
    RouteMatch,
    RouteRule,
    ValueMatchType,
)

_SERVICE: Final = re.compile(r"\.?[A-Za-z_][A-Za-z_0-9]*(\.[A-Za-z_][A-Za-z_0-9]*)*")
_METHOD: Final = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_ANY: Final = "[^/]+"
ANY_SERVICE: Final = f"/(?:{_ANY})/"
"""What the path of a match begins with that names a method alone."""
_FILTERS: Final = frozenset(
    {
        FilterType.REQUEST_HEADER_MODIFIER,
        FilterType.RESPONSE_HEADER_MODIFIER,
        FilterType.REQUEST_MIRROR,
        FilterType.EXTENSION_REF,
    }
)
_Name = Annotated[str, msgspec.Meta(max_length=1024)]


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False):
    """How all parts are read."""


class MethodMatch(_Part, frozen=True, kw_only=True):
    type: ValueMatchType = ValueMatchType.EXACT
    service: _Name = ""
    method: _Name = ""

    def __post_init__(self) -> None:
        if not self.service and not self.method:
            raise ValueError("one or both of service and method must be given")
        if self.type is not ValueMatchType.EXACT:
            return
        for what, text, pattern in (("service", self.service, _SERVICE), ("method", self.method, _METHOD)):
            if text and not pattern.fullmatch(text):
                raise ValueError(f"{what} must be a name of protobuf's: {text!r}")

    @property
    def path(self) -> PathMatch:
        if self.type is ValueMatchType.EXACT and self.service:
            kind = PathMatchType.EXACT if self.method else PathMatchType.PATH_PREFIX
            return PathMatch(type=kind, value=f"/{self.service}" + (f"/{self.method}" if self.method else ""))
        service = f"/(?:{self.service})/" if self.service else ANY_SERVICE
        pattern = f"{service}(?:{self.method or _ANY})"
        return PathMatch(type=PathMatchType.REGULAR_EXPRESSION, value=pattern)


class GRPCMatch(_Part, frozen=True, kw_only=True):
    method: MethodMatch | None = None
    headers: tuple[HeaderMatch, ...] = ()

    @property
    def as_http(self) -> RouteMatch:
        return RouteMatch(path=self.method.path if self.method else PathMatch(), headers=self.headers)


class GRPCRule(_Part, frozen=True, kw_only=True):
    name: str = ""
    matches: tuple[GRPCMatch, ...] = ()
    filters: Filters = ()
    backend_refs: Annotated[tuple[BackendRef, ...], msgspec.Meta(max_length=16)] = ()
    session_persistence: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for item in (*self.filters, *(item for ref in self.backend_refs for item in ref.filters)):
            if item.type not in _FILTERS:
                raise ValueError(f"filter {item.type.value} is none of a GRPCRoute")

    @property
    def as_http(self) -> RouteRule:
        return RouteRule(
            name=self.name,
            matches=tuple(match.as_http for match in self.matches) or (RouteMatch(),),
            filters=self.filters,
            backend_refs=self.backend_refs,
            session_persistence=self.session_persistence,
        )


class GRPCRouteSpec(_Part, frozen=True, kw_only=True):
    parent_refs: tuple[ParentRef, ...] = ()
    hostnames: tuple[Hostname, ...] = ()
    rules: tuple[GRPCRule, ...] = (GRPCRule(),)

    @property
    def as_http(self) -> HTTPRouteSpec:
        return HTTPRouteSpec(
            parent_refs=self.parent_refs,
            hostnames=self.hostnames,
            rules=tuple(rule.as_http for rule in self.rules),
        )
