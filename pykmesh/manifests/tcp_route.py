"""The spec of Gateway API's TCPRoute (v1alpha2), and the HTTPRoute whose backends it has."""

from __future__ import annotations

from typing import Annotated

import msgspec

from pykmesh.manifests.http_route import BackendRef, HTTPRouteSpec, ParentRef, RouteRule


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False):
    """How all parts are read."""


class TCPRule(_Part, frozen=True, kw_only=True):
    name: str = ""
    backend_refs: Annotated[tuple[BackendRef, ...], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        if any(ref.filters for ref in self.backend_refs):
            raise ValueError("backendRefs of a TCPRoute have no filters")


class TCPRouteSpec(_Part, frozen=True, kw_only=True):
    """One rule: there is nothing by which connections would choose among several."""

    parent_refs: tuple[ParentRef, ...] = ()
    rules: Annotated[tuple[TCPRule, ...], msgspec.Meta(min_length=1, max_length=1)]

    @property
    def as_http(self) -> HTTPRouteSpec:
        rules = tuple(RouteRule(name=rule.name, backend_refs=rule.backend_refs) for rule in self.rules)
        return HTTPRouteSpec(parent_refs=self.parent_refs, rules=rules)
