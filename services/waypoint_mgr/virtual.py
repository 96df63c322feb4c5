"""VirtualServices as Envoy's routes: in the order in which they are written, the first match counts. Pure.

Which one is a service's: of those that name its host, and are of its namespace, the waypoint's or the root
namespace, the one that says the most, then one of its own namespace, then the oldest. A service
whose port has HTTPRoutes (for connections: TCPRoutes) goes by those. What cannot be honoured is never passed
over: a match that asks what is not known never matches, a destination that is none is answered with 503 (a
connection: closed); both are told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, Literal

import msgspec

from pykmesh.contracts.address import ROOT_NAMESPACE
from pykmesh.contracts.waypoints import is_workload
from pykmesh.manifests.durations import GoDuration
from pykmesh.manifests.http_route import (
    BackendObjectRef,
    BackendRef,
    Fraction,
    Header,
    HeaderModifier,
    RequestMirror,
    RouteFilter,
    RouteRule,
    Timeouts,
)
from pykmesh.manifests.http_route import FilterType as Filter
from pykmesh.manifests.objects import Gateway, ObjectRef, ref_of
from pykmesh.manifests.virtual_service import (
    AUTHORITY,
    CorsPolicy,
    Destination,
    Fault,
    HeaderOperations,
    Headers,
    HTTPMatch,
    HTTPRoute,
    Mirror,
    Percent,
    Redirect,
    Retries,
    Rewrite,
    RouteDestination,
    StringMatch,
    TCPRoute,
)
from services.waypoint_mgr import cors
from services.waypoint_mgr.attachments import (
    ACCEPTED,
    PARTIALLY_INVALID,
    RESOLVED_REFS,
    UNSUPPORTED_VALUE,
    Condition,
    Mesh,
)
from services.waypoint_mgr.delegates import Delegates, Part
from services.waypoint_mgr.destinations import Destinations
from services.waypoint_mgr.envoy import Json, Port, typed
from services.waypoint_mgr.regexes import error_in
from services.waypoint_mgr.rules import REDIRECT_CODES, Target, Unresolved, action_of, tcp_target
from services.waypoint_mgr.source import Virtual

FAULT: Final = "envoy.filters.http.fault"
FILTERS: Final[Mapping[str, Json]] = {
    cors.NAME: cors.FILTER,
    FAULT: {"name": FAULT, "typedConfig": typed("filters.http.fault.v3.HTTPFault")},
}
"""What routes need of their chain, in the order in which it is asked."""
RETRY_ON: Final = "connect-failure,refused-stream,unavailable,cancelled"
"""Istio's, where retries are asked for and not on what."""
_GROUP: Final = re.compile(r"\\([0-9])")
MILLION: Final = 1_000_000
_NOT_ASKED: Final = {
    "destination_subnets": "destinationSubnets",
    "source_labels": "sourceLabels",
    "source_namespace": "sourceNamespace",
    "source_subnet": "sourceSubnet",
}
_HEADERS: Final = {"scheme": ":scheme", "method": ":method", "authority": ":authority"}


class Routed(msgspec.Struct, frozen=True):
    """The routes of a port, the backends that they name, and the filters that they need."""

    routes: tuple[Json, ...]
    backends: frozenset[Port]
    filters: tuple[Json, ...]


class VirtualServices:
    """Those for what goes by way of a waypoint, and what is told of them."""

    def __init__(
        self, waypoint: Gateway, mesh: Mesh, found: Sequence[Virtual], destinations: Destinations
    ) -> None:
        self._waypoint = waypoint
        self._mesh = mesh
        self._destinations = destinations
        read = [(each, errors_in(each)) for each in found if each.is_for_mesh]
        self._found = [each for each, errors in read if not errors]
        self._broken = [(each, "; ".join(errors)) for each, errors in read if errors]
        self._delegates = Delegates(self._found, [each for each, _ in self._broken])
        self._used = list[Virtual]()
        self._told: dict[ObjectRef, dict[str, dict[str, None]]] = {}

    def of(self, at: Port, *, is_overridden: bool) -> Routed | None:
        """None where nothing of HTTP is said of the service, or of other ports alone (as Istio has it).

        `is_overridden`: its port has HTTPRoutes.
        """
        found = self._best(at, "http")
        if found is None:
            return None
        if is_overridden:
            self._tell(found, "left out", f"{at.service} port {at.port} has HTTPRoutes, which go before")
            return None
        self._used.append(found)
        self._tell(found, "left out")
        routes, backends, names = list[Json](), set[Port](), dict[str, None]()
        is_elsewhere = True
        for part in self._delegates.parts(found):
            one = _Route(part, at, self._mesh, self._destinations)
            routes += one.routes(f"{part.of.ref.namespace}/{part.of.ref.name}/{part.name}")
            backends |= one.backends
            names |= dict.fromkeys(one.filters)
            is_elsewhere &= one.is_elsewhere
            for kind, texts in (("left out", one.dropped), ("unresolved", one.unresolved)):
                self._tell(part.of, kind, *(f"http[{part.name}]: {text}" for text in texts))
        if is_elsewhere and not routes:
            return None
        filters = tuple(config for name, config in FILTERS.items() if name in names)
        return Routed(tuple(routes), frozenset(backends), filters)

    def tcp_of(self, at: Port, *, is_overridden: bool) -> Target | None:
        """None: to the service itself.

        `is_overridden`: its port has TCPRoutes.
        """
        found = self._best(at, "tcp")
        if found is None:
            return None
        if is_overridden:
            self._tell(found, "left out", f"{at.service} port {at.port} has TCPRoutes, which go before")
            return None
        self._tell(found, "left out")
        for index, route in enumerate(found.spec.tcp):
            if self._takes(found, index, route, at):
                refs = _hosts(route.route)
                rule = RouteRule(matches=(), backend_refs=refs)
                resolve = partial(_resolve, of=found, at=at, mesh=self._mesh, destinations=self._destinations)
                target = tcp_target(rule, resolve)
                texts = (f"tcp[{index}]: {one.message}" for one in target.unresolved)
                self._tell(found, "unresolved", *texts)
                return target
        return None

    def _takes(self, of: Virtual, index: int, route: TCPRoute, at: Port) -> bool:
        is_taken = not route.match
        for match in route.match:
            if unknown := [said for name, said in _NOT_ASKED.items() if getattr(match, name)]:
                self._tell(of, "left out", f"tcp[{index}]: match.{unknown[0]} (it never matches)")
            elif not match.gateways or "mesh" in match.gateways:
                is_taken |= match.port in (None, at.port)
        return is_taken

    def _tell(self, of: Virtual, kind: str, *texts: str) -> None:
        self._told.setdefault(of.ref, {}).setdefault(kind, {}).update(dict.fromkeys(texts))

    def _best(self, at: Port, what: Literal["http", "tcp"]) -> Virtual | None:
        """Workloads' own addresses are reached straight."""
        if is_workload(at.service):
            return None
        namespace, _, hostname = at.service.partition("/")
        found = [
            each
            for each in self._found
            if getattr(each.spec, what) and each.says_of(hostname) and self._counts_in(namespace, each)
        ]

        def order(each: Virtual) -> tuple[object, ...]:
            is_guests = each.ref.namespace != namespace
            return -each.says_of(hostname), is_guests, each.created, each.ref.namespace, each.ref.name

        return min(found, key=order, default=None)

    def _counts_in(self, namespace: str, of: Virtual) -> bool:
        """As for Istio's waypoints, nobody else says how a namespace's services are reached."""
        may_say = (namespace, self._waypoint.namespace, ROOT_NAMESPACE)
        return of.ref.namespace in may_say and of.is_seen_in(namespace)

    def _idle(self, of: Virtual) -> str:
        """Why nothing goes by one that names a service's host; "" of one that names none."""
        parts = (user.partition("/") for user in self._mesh.users if not is_workload(user))
        named = [namespace for namespace, _, host in parts if of.says_of(host) and of.is_seen_in(namespace)]
        if not named:
            return ""
        if not any(self._counts_in(namespace, of) for namespace in named):
            return "it is of another namespace than the service, and not of the waypoint's"
        said = [name for name in ("http", "tcp") if getattr(of.spec, name)]
        if not said:
            return "it routes neither requests nor connections"
        return f"no port goes by its {' or '.join(said)}: none carries that, or another one's goes before"

    def conditions(self) -> Iterator[Condition]:
        """Of those that are a service's, and those that are wrong."""
        parent = ref_of(self._waypoint)
        asked = {each.ref for first in self._used for each in self._delegates.wrong(first)}
        for each, message in self._broken:
            parts = (user.partition("/") for user in self._mesh.users)
            if each.ref in asked or any(
                each.says_of(host) and self._counts_in(ns, each) for ns, _, host in parts
            ):
                yield Condition(each.ref, parent, ACCEPTED, False, UNSUPPORTED_VALUE, message)
        specs = {each.ref: each.spec for each in self._found}
        for each in self._found:
            if each.ref not in self._told and (said := self._idle(each)):
                self._tell(each, "left out", said)
        for ref, told in sorted(self._told.items()):
            yield Condition(ref, parent, ACCEPTED, True, ACCEPTED)
            unresolved = "; ".join(told.get("unresolved", ()))
            reason = "BackendNotFound" if unresolved else RESOLVED_REFS
            yield Condition(ref, parent, RESOLVED_REFS, not unresolved, reason, unresolved)
            left_out = [*(["tls"] if specs[ref].tls else []), *told.get("left out", ())]
            if left_out:
                message = f"not honoured: {'; '.join(left_out)}"
                yield Condition(ref, parent, PARTIALLY_INVALID, True, UNSUPPORTED_VALUE, message)


def errors_in(found: Virtual) -> list[str]:
    """Regular expressions that do not compile."""
    errors = []
    for index, route in enumerate(found.spec.http):
        texts = [(name, one.regex) for match in route.match for name, one in match.texts]
        if route.rewrite and route.rewrite.uri_regex_rewrite:
            texts.append(("rewrite.uriRegexRewrite", route.rewrite.uri_regex_rewrite.match))
        if route.cors_policy:
            texts += [("corsPolicy.allowOrigins", one.regex) for one in route.cors_policy.allow_origins]
        if route.rewrite and (rewrite := route.rewrite.uri_regex_rewrite) and not error_in(rewrite.match):
            groups = max(map(int, _GROUP.findall(rewrite.rewrite)), default=0)
            if groups > re.compile(rewrite.match).groups:
                errors.append(f"http[{index}].rewrite.uriRegexRewrite: there is no group {groups}")
        errors += [
            f"http[{index}].{name}: {error}" for name, text in texts if text and (error := error_in(text))
        ]
    return errors


class _Route:
    """One of its routes."""

    def __init__(self, part: Part, at: Port, mesh: Mesh, destinations: Destinations) -> None:
        self._part = part
        self._route: HTTPRoute = part.route
        self._at = at
        self._resolve = partial(_resolve, of=part.of, at=at, mesh=mesh, destinations=destinations)
        self.backends: frozenset[Port] = frozenset()
        self.filters: list[str] = []
        self.dropped: list[str] = [part.dropped] if part.dropped else []
        self.unresolved: list[str] = [part.lost] if part.lost else []
        self.is_elsewhere = False
        """It has no match but for other ports or gateways."""

    def routes(self, name: str) -> Iterator[Json]:
        """One for each of its matches."""
        if self._part.dropped:
            return
        action = self._action()
        matches = self._route.match or (HTTPMatch(),)
        self.is_elsewhere = not any(map(self._is_for_here, matches))
        for match in matches:
            if not self._can_match(match):
                continue
            fields = {"name": name, "match": _match(match)} | action
            if "route" in action and self._route.rewrite:
                fields["route"] = action["route"] | _rewritten(self._route.rewrite, match)
            yield fields

    def _can_match(self, match: HTTPMatch) -> bool:
        asked = {"sourceLabels": match.source_labels, "sourceNamespace": match.source_namespace}
        if match.stat_prefix:
            self.dropped.append("match.statPrefix")
        if unknown := [name for name, said in asked.items() if said]:
            self.dropped.append(f"match.{unknown[0]} (it never matches)")
            return False
        return self._is_for_here(match)

    def _is_for_here(self, match: HTTPMatch) -> bool:
        return (not match.gateways or "mesh" in match.gateways) and match.port in (None, self._at.port)

    def _action(self) -> Json:
        route = self._route
        fields = self._filters()
        if self._part.lost:
            return fields | {"directResponse": {"status": 503}}
        if route.redirect:
            return fields | self._headers() | {"redirect": self._redirect(route.redirect)}
        if route.direct_response:
            body = route.direct_response.body
            if body and body.bytes is not None:
                self.dropped.append("directResponse.body.bytes")
            said: Json = {"status": route.direct_response.status}
            if body and body.string is not None:
                said["body"] = {"inlineString": body.string}
            return fields | self._headers() | {"directResponse": said}
        rule = RouteRule(
            matches=(),
            filters=(*_filters(route.headers), *self._mirrors()),
            backend_refs=_hosts(route.route),
            timeouts=Timeouts(request=_in_ms(route.timeout) if route.timeout else None),
        )
        action = action_of(rule, self._at, self._resolve)
        self.backends = action.backends
        self.unresolved += [one.message for one in action.unresolved]
        self.dropped += action.dropped
        found = dict(action.fields)
        if "route" in found:
            found["route"] = found["route"] | self._retries(found["route"]["retryPolicy"])
            found["route"]["clusterNotFoundResponseCode"] = "SERVICE_UNAVAILABLE"
        return fields | found

    def _headers(self) -> Json:
        """Of answers that no backend gives."""
        rule = RouteRule(matches=(), filters=tuple(_filters(self._route.headers)))
        action = action_of(rule, self._at, self._resolve)
        self.dropped += action.dropped
        return {key: value for key, value in action.fields.items() if key.startswith("response")}

    def _mirrors(self) -> Iterator[RouteFilter]:
        route = self._route
        mirrors: tuple[Mirror, ...] = route.mirrors
        if route.mirror:
            whole = route.mirror_percent_of_old if route.mirror_percent is None else route.mirror_percent
            percent = Percent(value=float(whole)) if whole is not None else None
            mirrors = (Mirror(destination=route.mirror, percentage=route.mirror_percentage or percent),)
        for mirror in mirrors:
            share = Fraction(numerator=_of_million(mirror.percentage), denominator=MILLION)
            settings = RequestMirror(backend_ref=_host(mirror.destination), fraction=share)
            yield RouteFilter(type=Filter.REQUEST_MIRROR, request_mirror=settings)

    def _retries(self, policy: Json) -> Json:
        retries: Retries | None = self._route.retries
        if retries is None:
            return {}
        if not retries.attempts:
            return {"retryPolicy": {}}
        on = [one.strip() for one in (retries.retry_on or RETRY_ON).split(",") if one.strip()]
        codes = [int(one) for one in on if one.isdecimal() and 100 <= int(one) <= 599]
        words = [one for one in on if not one.isdecimal()]
        changed: Json = {"numRetries": retries.attempts}
        changed["retryOn"] = ",".join([*words, *(["retriable-status-codes"] if codes else [])])
        changed["retriableStatusCodes"] = codes
        if retries.per_try_timeout:
            changed["perTryTimeout"] = retries.per_try_timeout.as_proto
        if retries.backoff:
            changed["retryBackOff"] = {"baseInterval": retries.backoff.as_proto}
        if retries.retry_ignore_previous_hosts is False:
            self.dropped.append("retries.retryIgnorePreviousHosts")
        if retries.retry_remote_localities is not None:
            self.dropped.append("retries.retryRemoteLocalities")
        return {"retryPolicy": policy | changed}

    def _redirect(self, redirect: Redirect) -> Json:
        fields: Json = {"responseCode": REDIRECT_CODES[redirect.redirect_code]}
        if redirect.uri:
            fields["pathRedirect"] = redirect.uri
        if redirect.prefix_rewrite:
            fields["prefixRewrite"] = redirect.prefix_rewrite
        if redirect.authority:
            fields["hostRedirect"] = redirect.authority
        if redirect.scheme:
            fields["schemeRedirect"] = redirect.scheme
        if redirect.port:
            fields["portRedirect"] = redirect.port
        elif redirect.derive_port == "FROM_REQUEST_PORT":
            fields["portRedirect"] = self._at.port
        return fields

    def _filters(self) -> Json:
        configs: Json = {}
        if self._route.fault:
            configs[FAULT] = self._fault(self._route.fault)
        if self._route.cors_policy:
            configs[cors.NAME] = self._cors(self._route.cors_policy)
        self.filters += configs
        return {"typedPerFilterConfig": configs} if configs else {}

    def _fault(self, fault: Fault) -> Json:
        config = typed("filters.http.fault.v3.HTTPFault")
        if fault.delay and fault.delay.fixed_delay:
            share = fault.delay.percentage
            if share is None and fault.delay.percent is not None:
                share = Percent(value=float(fault.delay.percent))
            config["delay"] = {
                "fixedDelay": fault.delay.fixed_delay.as_proto,
                "percentage": _share(share or Percent()),
            }
        elif fault.delay:
            self.dropped.append("fault.delay other than fixedDelay")
        if fault.abort and fault.abort.http_status:
            config["abort"] = {
                "httpStatus": fault.abort.http_status,
                "percentage": _share(fault.abort.percentage or Percent()),
            }
        elif fault.abort:
            self.dropped.append("fault.abort other than httpStatus")
        return config

    def _cors(self, policy: CorsPolicy) -> Json:
        origins = [*policy.allow_origins, *(StringMatch(exact=each) for each in policy.allow_origin)]
        return cors.policy(
            [_text_match(each) for each in origins if not each.is_empty],
            policy.allow_methods,
            policy.allow_headers,
            policy.expose_headers,
            None if policy.max_age is None else int(policy.max_age.seconds),
            credentials=policy.allow_credentials,
            forwards_others=policy.unmatched_preflights != "IGNORE",
        )


def _resolve(
    ref: BackendObjectRef, of: Virtual, at: Port, mesh: Mesh, destinations: Destinations
) -> Port | Unresolved:
    host = of.whole(ref.name)
    found = mesh.at_host(host, of.ref.namespace, ref.port, at.port)
    if found is None:
        return Unresolved("BackendNotFound", f"there is no host {host} with port {ref.port or at.port}")
    subset = ref.subset if isinstance(ref, _Host) else ""
    found = msgspec.structs.replace(found, subset=subset)
    if subset and not destinations.has_subset(found):
        return Unresolved("BackendNotFound", f"{host} has no subset {subset} by its version")
    return found


def _rewritten(rewrite: Rewrite, match: HTTPMatch) -> Json:
    """How a path is rewritten depends on how it matched."""
    fields: Json = {"hostRewriteLiteral": rewrite.authority} if rewrite.authority else {}
    if rewrite.uri_regex_rewrite:
        pattern, text = rewrite.uri_regex_rewrite.match, rewrite.uri_regex_rewrite.rewrite
        fields["regexRewrite"] = {"pattern": {"regex": pattern}, "substitution": text}
    elif rewrite.uri and match.uri and match.uri.regex is not None:
        text = rewrite.uri.replace("\\", "\\\\")
        fields["regexRewrite"] = {"pattern": {"regex": "^.*$"}, "substitution": text}
    elif rewrite.uri:
        fields["prefixRewrite"] = rewrite.uri
    return fields


def _match(match: HTTPMatch) -> Json:
    found = _path(match.uri) | ({"caseSensitive": False} if match.ignore_uri_case else {})
    headers = [
        {"name": _HEADERS[name], "stringMatch": _text_match(said)}
        for name, said in match.texts
        if name in _HEADERS
    ]
    headers += [_header(name, said) for name, said in match.headers.items()]
    headers += [_without(name, said) for name, said in match.without_headers.items()]
    params = [
        {"name": name, **({"presentMatch": True} if said.is_empty else {"stringMatch": _text_match(said)})}
        for name, said in match.query_params.items()
    ]
    return found | {"headers": headers, "queryParameters": params}


def _path(uri: StringMatch | None) -> Json:
    """A prefix ends anywhere: Istio's, not Gateway API's."""
    if uri is None:
        return {"prefix": "/"}
    if uri.exact is not None:
        return {"path": uri.exact}
    if uri.regex is not None:
        return {"safeRegex": {"regex": uri.regex}}
    return {"prefix": uri.prefix}


def _header(name: str, said: StringMatch) -> Json:
    asked: Json = {"presentMatch": True} if said.is_empty else {"stringMatch": _text_match(said)}
    return {"name": name.lower(), **asked}


def _without(name: str, said: StringMatch) -> Json:
    """A header that is not there has no such text."""
    empty = {} if said.is_empty else {"treatMissingHeaderAsEmpty": True}
    return _header(name, said) | {"invertMatch": True} | empty


def _text_match(said: StringMatch) -> Json:
    if said.regex is not None:
        return {"safeRegex": {"regex": said.regex}}
    return {"prefix": said.prefix} if said.prefix is not None else {"exact": said.exact or ""}


class _Host(BackendRef, frozen=True, kw_only=True):
    """A destination, by the name of its host."""

    subset: str = ""

    def __post_init__(self) -> None:
        """It may say no port."""


def _hosts(said: Sequence[RouteDestination]) -> tuple[_Host, ...]:
    """One alone has all, whatever its weight."""
    return tuple(_host(one.destination, one.weight if len(said) > 1 else 1, one.headers) for one in said)


def _host(destination: Destination, weight: int = 1, headers: Headers | None = None) -> _Host:
    port = destination.port.number if destination.port else None
    filters = tuple(_filters(headers)) if headers else ()
    return _Host(name=destination.host, subset=destination.subset, port=port, weight=weight, filters=filters)


def _filters(headers: Headers) -> Iterator[RouteFilter]:
    if headers.request != HeaderOperations():
        yield RouteFilter(
            type=Filter.REQUEST_HEADER_MODIFIER, request_header_modifier=_modifier(headers.request)
        )
    if headers.response != HeaderOperations():
        yield RouteFilter(
            type=Filter.RESPONSE_HEADER_MODIFIER, response_header_modifier=_modifier(headers.response)
        )


def _modifier(operations: HeaderOperations) -> HeaderModifier:
    return HeaderModifier(
        set=tuple(_headers(operations.set)), add=tuple(_headers(operations.add)), remove=operations.remove
    )


def _headers(said: Mapping[str, str]) -> Iterable[Header]:
    names = {AUTHORITY: "Host"}
    return (Header(name=names.get(name, name), value=value) for name, value in said.items())


def _of_million(share: Percent | None) -> int:
    return MILLION if share is None else round(share.value * MILLION / 100)


def _share(share: Percent) -> Json:
    return {"numerator": _of_million(share), "denominator": "MILLION"}


def _in_ms(duration: GoDuration) -> str:
    """As Gateway API has it."""
    return f"{round(duration.seconds * 1000)}ms"
