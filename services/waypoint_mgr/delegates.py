"""VirtualServices that give requests on to others, which have no hosts of their own. Pure.

By Istio's rules: a request has to match both, what the second says goes before what the first says, and
nobody gives on what he was given. Two matches that ask for different things of the same part of a request
make none together, and a route of the second of which a match fits none of the first's is left out. Stricter
than Istio, which passes such a route over: what is given on to nobody is answered with 503.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from pykmesh.manifests.virtual_service import (
    Delegate,
    Destination,
    Headers,
    HTTPMatch,
    HTTPRoute,
    StringMatch,
)
from services.waypoint_mgr.source import Virtual

_OF_THE_FIRST: Final = ("rewrite", "timeout", "retries", "fault", "cors_policy")
"""Where the second says nothing."""
_MIRRORS: Final = ("mirror", "mirrors", "mirror_percentage", "mirror_percent")
_TEXTS: Final = ("uri", "scheme", "method", "authority")
_NAMED: Final = ("headers", "query_params")
_EITHER: Final = ("source_labels", "source_namespace")


class Part(NamedTuple):
    """A route, whose it is, and what it is called there."""

    of: Virtual
    name: str
    route: HTTPRoute
    lost: str = ""
    """Why nobody has its requests."""
    dropped: str = ""


class _NeverError(Exception):
    """No request matches both."""


class Delegates:
    """Those without hosts, by their names; `broken`: those that are wrong."""

    def __init__(self, found: Sequence[Virtual], broken: Sequence[Virtual]) -> None:
        self._found = {(each.ref.namespace, each.ref.name): each for each in found if not each.spec.hosts}
        self._broken = {(each.ref.namespace, each.ref.name): each for each in broken if not each.spec.hosts}

    def parts(self, first: Virtual) -> Iterator[Part]:
        """The routes of a VirtualService, with those of others in the place of what is given on."""
        for index, route in enumerate(first.spec.http):
            name = route.name or str(index)
            if not route.delegate:
                yield Part(first, name, route)
                continue
            found, why = self._of(first, route.delegate)
            if found is None:
                yield Part(first, name, route, lost=why)
                continue
            given_on = _with_whole_mirrors(first, route)
            for below, second in enumerate(found.spec.http):
                yield _both(found, second.name or str(below), given_on, second)

    def wrong(self, first: Virtual) -> Iterator[Virtual]:
        """Of those that it gives requests on to."""
        for route in first.spec.http:
            if route.delegate:
                key = _key(first, route.delegate)
                if key in self._broken:
                    yield self._broken[key]

    def _of(self, first: Virtual, delegate: Delegate) -> tuple[Virtual | None, str]:
        key = _key(first, delegate)
        found = self._found.get(key)
        what = f"delegate {'/'.join(key)}"
        if found is None:
            return None, f"{what} is wrong" if key in self._broken else f"{what}: there is none without hosts"
        if not found.spec.http:
            return None, f"{what} has no http"
        if not found.is_seen_in(first.ref.namespace):
            return None, f"{what} is not exported to namespace {first.ref.namespace}"
        return found, ""


def _with_whole_mirrors(of: Virtual, route: HTTPRoute) -> HTTPRoute:
    """Hosts that mean the same in another namespace."""

    def whole(found: Destination) -> Destination:
        return msgspec.structs.replace(found, host=of.whole(found.host))

    return msgspec.structs.replace(
        route,
        mirror=route.mirror and whole(route.mirror),
        mirrors=tuple(
            msgspec.structs.replace(each, destination=whole(each.destination)) for each in route.mirrors
        ),
    )


def _key(first: Virtual, delegate: Delegate) -> tuple[str, str]:
    return delegate.namespace or first.ref.namespace, delegate.name


def _both(of: Virtual, name: str, first: HTTPRoute, second: HTTPRoute) -> Part:
    matches = _matches(first.match, second.match)
    if matches is None:
        why = "a match asks for other things than all of what gave it on (the route is left out)"
        return Part(of, name, second, dropped=why)
    if second.delegate:
        second = msgspec.structs.replace(second, match=matches)
        return Part(of, name, second, lost="what was given on is not given on again")
    changed: dict[str, object] = {
        field: getattr(first, field)
        for field in _OF_THE_FIRST
        if not getattr(second, field) and not (field == "rewrite" and second.redirect)
    }
    if not (second.mirror or second.mirrors):
        changed |= {field: getattr(first, field) for field in _MIRRORS}
    if second.headers == Headers():
        changed["headers"] = first.headers
    return Part(of, name, msgspec.structs.replace(second, match=matches, **changed))


def _matches(first: Sequence[HTTPMatch], second: Sequence[HTTPMatch]) -> tuple[HTTPMatch, ...] | None:
    """None where one of the second's fits none of the first's."""
    if not first or not second:
        return tuple(second or first)
    found: list[HTTPMatch] = []
    for other in second:
        before = len(found)
        for one in first:
            with contextlib.suppress(_NeverError):
                found.append(_match(one, other))
        if len(found) == before:
            return None
    return tuple(found)


def _match(first: HTTPMatch, second: HTTPMatch) -> HTTPMatch:
    if first.ignore_uri_case != second.ignore_uri_case:
        raise _NeverError
    if first.gateways and not set(second.gateways) <= set(first.gateways):
        raise _NeverError
    if None not in (first.port, second.port) and first.port != second.port:
        raise _NeverError
    changed: dict[str, object] = {name: _text(getattr(first, name), getattr(second, name)) for name in _TEXTS}
    changed |= {name: _texts(getattr(first, name), getattr(second, name), _text) for name in _NAMED}
    changed |= {name: getattr(second, name) or getattr(first, name) for name in (*_EITHER, "port")}
    changed["without_headers"] = _texts(first.without_headers, second.without_headers, _neither)
    changed["gateways"] = second.gateways or first.gateways
    return msgspec.structs.replace(second, **changed)


def _texts(
    first: Mapping[str, StringMatch],
    second: Mapping[str, StringMatch],
    both: Callable[[StringMatch, StringMatch], StringMatch | None],
) -> dict[str, StringMatch]:
    shared = {name: both(first[name], second[name]) or StringMatch() for name in first.keys() & second.keys()}
    return {**first, **second, **shared}


def _neither(first: StringMatch, second: StringMatch) -> StringMatch:
    """What must not match: of both the one that says less."""
    for wide, narrow in ((first, second), (second, first)):
        with contextlib.suppress(_NeverError):
            if _text(wide, narrow) == narrow:
                return wide
    raise _NeverError


def _text(first: StringMatch | None, second: StringMatch | None) -> StringMatch | None:
    """What is asked for by both: the second says the same, or more."""
    if first is None or second is None or first.is_empty:
        return second or first
    if second.is_empty or first == second:
        return first
    said = second.exact if second.exact is not None else second.prefix
    if first.prefix is None or said is None or not said.startswith(first.prefix):
        raise _NeverError
    return second
