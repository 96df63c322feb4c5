"""Rules of an HTTPRoute as Envoy's routes: what matches, in which order, and what is done then.

What cannot be honoured is never passed over: a filter that could change who may do what makes its requests
fail (500), as Gateway API wants it, and is told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import msgspec

from pykmesh.manifests.grpc_route import ANY_SERVICE
from pykmesh.manifests.http_route import (
    BackendObjectRef,
    BackendRef,
    Header,
    HeaderMatch,
    HeaderModifier,
    HTTPMethod,
    PathMatch,
    PathMatchType,
    PathModifier,
    PathModifierType,
    QueryParamMatch,
    RequestMirror,
    RequestRedirect,
    Retry,
    RouteFilter,
    RouteMatch,
    RouteRule,
    Timeouts,
    URLRewrite,
    ValueMatchType,
    duration_ms,
)
from services.waypoint_mgr import cors
from services.waypoint_mgr.envoy import NO_TIMEOUT, Json, Port
from services.waypoint_mgr.header_names import why_not
from services.waypoint_mgr.protocols import AppProtocol
from services.waypoint_mgr.regexes import error_in

RETRIES: Final = 2
RETRY_ON: Final = "connect-failure,refused-stream,reset-before-request"
"""Only what no endpoint has begun to serve: trying again does nothing twice."""
UNRESOLVED: Final = "unresolved"
"""A cluster that there never is: what is sent there is answered with 500."""

_NOT_FOUND: Final = {500: "INTERNAL_SERVER_ERROR", 503: "SERVICE_UNAVAILABLE"}
"""What Envoy calls the status for a cluster that is not there."""
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Unresolved(msgspec.Struct, frozen=True):
    """Why a backend is none; the reason is one of Gateway API's for ResolvedRefs."""

    reason: str
    message: str


Resolve = Callable[[BackendObjectRef], Port | Unresolved]


class Action(msgspec.Struct, frozen=True):
    """What is done with a request: the fields of an Envoy route beside its match."""

    fields: Json
    backends: frozenset[Port] = frozenset()
    unresolved: tuple[Unresolved, ...] = ()
    dropped: tuple[str, ...] = ()
    """What of the rule is not honoured."""


class Rank(NamedTuple):
    """Sorts what takes precedence first, by Gateway API's rules for matches.

    Regular expressions are not ordered there: they come between exact paths and prefixes, so that
    a prefix that catches all can stand beside them.
    """

    path_type: int
    path_length: int
    has_no_method: bool
    headers: int
    query_params: int


def straight_to(at: Port) -> Json:
    """The route of a service without rules: to its own endpoints."""
    return {"name": "default", "match": {"prefix": "/"}, "route": _forward(at.cluster, Timeouts(), None)}


def rank(match: RouteMatch) -> Rank:
    order = (PathMatchType.EXACT, PathMatchType.REGULAR_EXPRESSION, PathMatchType.PATH_PREFIX)
    path_type, length = match.path.type, len(match.path.value.rstrip("/"))
    if path_type is PathMatchType.REGULAR_EXPRESSION and match.path.value.startswith(ANY_SERVICE):
        # A method alone of a GRPCRoute: any service that is named goes before.
        path_type, length = PathMatchType.PATH_PREFIX, 1
    return Rank(
        order.index(path_type),
        -length,
        match.method is None,
        -len(match.headers),
        -len(match.query_params),
    )


def match_fields(match: RouteMatch) -> Json:
    headers = [_string_match(item.name.lower(), item.type, item.value) for item in match.headers]
    if match.method:
        headers.append(_string_match(":method", ValueMatchType.EXACT, match.method.value))
    params = [_string_match(item.name, item.type, item.value) for item in match.query_params]
    return _path_match(match.path) | {
        "headers": _first_of_name(headers),
        "queryParameters": _first_of_name(params),
    }


def errors_in(rule: RouteRule) -> list[str]:
    """Regular expressions that do not compile."""
    texts = [m.path.value for m in rule.matches if m.path.type is PathMatchType.REGULAR_EXPRESSION]
    for match in rule.matches:
        values: tuple[HeaderMatch | QueryParamMatch, ...] = (*match.headers, *match.query_params)
        texts += [item.value for item in values if item.type is ValueMatchType.REGULAR_EXPRESSION]
    return [error for error in map(error_in, texts) if error]


def _path_match(path: PathMatch) -> Json:
    match path.type:
        case PathMatchType.EXACT:
            return {"path": path.value}
        case PathMatchType.REGULAR_EXPRESSION:
            return {"safeRegex": {"regex": path.value}}
        case PathMatchType.PATH_PREFIX:
            prefix = path.value.rstrip("/")
            return {"pathSeparatedPrefix": prefix} if prefix else {"prefix": "/"}


def _string_match(name: str, kind: ValueMatchType, value: str) -> Json:
    is_exact = kind is ValueMatchType.EXACT
    return {"name": name, "stringMatch": {"exact": value} if is_exact else {"safeRegex": {"regex": value}}}


def _first_of_name(matches: Iterable[Json]) -> list[Json]:
    """Of several for one name the first counts."""
    by_name: dict[str, Json] = {}
    for match in matches:
        by_name.setdefault(match["name"], match)
    return list(by_name.values())


def action_of(rule: RouteRule, at: Port, resolve: Resolve, carries: AppProtocol = AppProtocol.HTTP) -> Action:
    """`at`: where the request was sent to. What cannot be done is answered with 500, of gRPC with 503."""
    return _Builder(rule, at, resolve, 503 if carries is AppProtocol.HTTP2 else 500).build()


class Target(NamedTuple):
    """Where connections go: a cluster or a split; and the backends that are named."""

    to: str | list[Json]
    backends: frozenset[Port] = frozenset()
    unresolved: tuple[Unresolved, ...] = ()


def tcp_target(rule: RouteRule, resolve: Resolve) -> Target:
    """Those for what is no backend are closed."""
    builder = _Builder(rule, Port("", 0), resolve, 500)
    to = builder.target() or UNRESOLVED
    return Target(to, builder.found, builder.unresolved)


class _Builder:
    """Collects what comes up while a rule is put into Envoy's words."""

    def __init__(self, rule: RouteRule, at: Port, resolve: Resolve, failure: int) -> None:
        self._rule = rule
        self._at = at
        self._resolve = resolve
        self._failure = failure
        self._backends: set[Port] = set()
        self._unresolved: list[Unresolved] = []
        self._dropped: list[str] = []

    @property
    def found(self) -> frozenset[Port]:
        return frozenset(self._backends)

    @property
    def unresolved(self) -> tuple[Unresolved, ...]:
        return tuple(self._unresolved)

    def build(self) -> Action:
        fields = self._fields()
        if self._rule.session_persistence is not None:
            self._dropped.append("sessionPersistence")
        if any(match.method is HTTPMethod.CONNECT for match in self._rule.matches):
            self._dropped.append("method CONNECT")
        return Action(fields, self.found, self.unresolved, tuple(self._dropped))

    def _fields(self) -> Json:
        fields: Json = {}
        forward: Json = {}
        mirrors: list[Json] = []
        redirect: Json | None = None
        failed = False
        for item in self._rule.filters:
            if item.request_header_modifier:
                forward |= _host_set_by(item.request_header_modifier)
                fields |= self._request_headers(item.request_header_modifier)
            elif item.response_header_modifier:
                fields |= self._modified("response", item.response_header_modifier)
            elif item.request_redirect:
                redirect = _redirect(item.request_redirect, self._prefix, self._at)
            elif item.url_rewrite:
                forward |= _rewrite(item.url_rewrite, self._prefix)
            elif item.request_mirror:
                mirrors += self._mirror(item.request_mirror)
            elif item.cors:
                fields["typedPerFilterConfig"] = {cors.NAME: cors.of_filter(item.cors)}
            else:
                self._drop(f"filter {item.type.value}")
                failed = True
        if failed:
            return fields | _answer(self._failure)
        if redirect is not None:
            if fields.pop("typedPerFilterConfig", None):
                self._dropped.append("filter CORS beside RequestRedirect")
            return fields | {"redirect": redirect}
        target = self.target()
        if target is None:
            return fields | _answer(self._failure)
        sent = _forward(target, self._rule.timeouts, self._rule.retry)
        sent["clusterNotFoundResponseCode"] = _NOT_FOUND[self._failure]
        return fields | {"route": sent | forward | {"requestMirrorPolicies": mirrors}}

    @property
    def _prefix(self) -> str:
        return self._rule.matches[0].path.value.rstrip("/") if self._rule.matches else ""

    def _request_headers(self, modifier: HeaderModifier) -> Json:
        """Envoy keeps the Host header out of these; to set it is to rewrite the host."""
        lost = [header.name for header in modifier.add if _is_host(header.name)]
        lost += [name for name in modifier.remove if _is_host(name)]
        self._dropped += [f"RequestHeaderModifier: adding to or removing {name}" for name in lost]
        return self._modified("request", modifier)

    def _modified(self, kind: str, modifier: HeaderModifier) -> Json:
        """Without Host, which no response has."""
        own = [*(header.name for header in (*modifier.set, *modifier.add)), *modifier.remove]
        self._dropped += [
            f"{kind.capitalize()}HeaderModifier: {name}, {why}" for name in own if (why := why_not(name))
        ]
        changed = [each for each in _headers(modifier) if not why_not(each["header"]["key"])]
        removed = [name for name in modifier.remove if not (_is_host(name) or why_not(name))]
        return {f"{kind}HeadersToAdd": changed, f"{kind}HeadersToRemove": removed}

    def _mirror(self, mirror: RequestMirror) -> list[Json]:
        found = self._resolved(mirror.backend_ref)
        if found is None:
            return []
        share = {"numerator": mirror.per_million, "denominator": "MILLION"}
        return [{"cluster": found.cluster, "runtimeFraction": {"defaultValue": share}}]

    def target(self) -> str | list[Json] | None:
        """A cluster or a split; None if every weight is 0."""
        shares = [self._share(ref) for ref in self._rule.backend_refs]
        shares = [share for share in shares if share["weight"]]
        if len(shares) == 1 and shares[0].keys() == {"name", "weight"}:
            return str(shares[0]["name"])
        return shares or None

    def _share(self, ref: BackendRef) -> Json:
        found = self._resolved(ref)
        share: Json = {"name": found.cluster if found else UNRESOLVED, "weight": ref.weight}
        for item in ref.filters:
            share |= self._share_filter(item)
        return share

    def _share_filter(self, item: RouteFilter) -> Json:
        if item.request_header_modifier:
            found = self._request_headers(item.request_header_modifier)
            host = _host_set_by(item.request_header_modifier)
            return found | host
        if item.response_header_modifier:
            return self._modified("response", item.response_header_modifier)
        self._drop(f"backendRefs: filter {item.type.value}")
        return {"name": UNRESOLVED}

    def _drop(self, what: str) -> None:
        """What cannot be passed over."""
        self._dropped.append(f"{what} (its requests are answered with {self._failure})")

    def _resolved(self, ref: BackendObjectRef) -> Port | None:
        found = self._resolve(ref)
        if isinstance(found, Unresolved):
            self._unresolved.append(found)
            return None
        self._backends.add(found)
        return found


def _answer(status: int) -> Json:
    return {"directResponse": {"status": status}}


def _forward(target: str | list[Json], timeouts: Timeouts, retry: Retry | None) -> Json:
    to: Json = {"cluster": target} if isinstance(target, str) else {"weightedClusters": {"clusters": target}}
    return to | {
        "timeout": _seconds(timeouts.request) if timeouts.request else NO_TIMEOUT,
        "retryPolicy": _retry_policy(timeouts, retry),
    }


def _retry_policy(timeouts: Timeouts, retry: Retry | None) -> Json:
    """Without a word of the route only what is safe is tried again; with one, connection errors too."""
    policy: Json = {"retryOn": RETRY_ON, "numRetries": RETRIES}
    policy["retryHostPredicate"] = [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typedConfig": {
                "@type": "type.googleapis.com/"
                "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
            },
        }
    ]
    policy["hostSelectionRetryMaxAttempts"] = 5
    if timeouts.backend_request and duration_ms(timeouts.backend_request):
        policy["perTryTimeout"] = _seconds(timeouts.backend_request)
    if retry is None:
        return policy
    policy["retryOn"] = f"{RETRY_ON},reset,retriable-status-codes"
    policy["retriableStatusCodes"] = list(retry.codes)
    if retry.attempts is not None:
        policy["numRetries"] = retry.attempts
    if retry.backoff and duration_ms(retry.backoff):
        base_ms = duration_ms(retry.backoff)
        policy["retryBackOff"] = {"baseInterval": f"{base_ms / 1000}s", "maxInterval": f"{base_ms / 100}s"}
    return policy


def _seconds(duration: str) -> str:
    return f"{duration_ms(duration) / 1000}s"


def _is_host(name: str) -> bool:
    return name.lower() == "host"


def _host_set_by(modifier: HeaderModifier) -> Json:
    hosts = [header.value for header in modifier.set if _is_host(header.name)]
    return {"hostRewriteLiteral": hosts[0]} if hosts else {}


def _headers(modifier: HeaderModifier) -> list[Json]:
    changed = [_header(header, "OVERWRITE_IF_EXISTS_OR_ADD") for header in _first_by_name(modifier.set)]
    return changed + [_header(header, "APPEND_IF_EXISTS_OR_ADD") for header in _first_by_name(modifier.add)]


def _first_by_name(headers: Iterable[Header]) -> list[Header]:
    by_name: dict[str, Header] = {}
    for header in headers:
        if not _is_host(header.name):
            by_name.setdefault(header.name.lower(), header)
    return list(by_name.values())


def _header(header: Header, action: str) -> Json:
    """A `%` would begin one of Envoy's variables."""
    said = {"key": header.name, "value": header.value.replace("%", "%%")}
    return {"header": said, "appendAction": action}


def _redirect(redirect: RequestRedirect, prefix: str, at: Port) -> Json:
    """Without a port, the scheme's, else the one that the request was sent to."""
    scheme = redirect.scheme or "http"
    port = redirect.port or (_DEFAULT_PORTS[scheme] if redirect.scheme else at.port)
    # Where the scheme is another one Envoy takes the default port of the one before away itself.
    is_taken = bool(redirect.scheme) and at.port in _DEFAULT_PORTS.values()
    keeps_port = redirect.hostname is None and at.port != port and not is_taken
    fields: Json = {"responseCode": REDIRECT_CODES[redirect.status_code]}
    if redirect.scheme:
        fields["schemeRedirect"] = redirect.scheme
    if redirect.hostname:
        fields["hostRedirect"] = redirect.hostname
    if port != _DEFAULT_PORTS[scheme] or keeps_port:
        fields["portRedirect"] = port
    return fields | _path_change(redirect.path, prefix, full="pathRedirect")


REDIRECT_CODES: Final = {
    301: "MOVED_PERMANENTLY",
    302: "FOUND",
    303: "SEE_OTHER",
    307: "TEMPORARY_REDIRECT",
    308: "PERMANENT_REDIRECT",
}


def _rewrite(rewrite: URLRewrite, prefix: str) -> Json:
    host = {"hostRewriteLiteral": rewrite.hostname} if rewrite.hostname else {}
    return host | _path_change(rewrite.path, prefix, full=None)


def _path_change(change: PathModifier | None, prefix: str, full: str | None) -> Json:
    """`full`: the field that says a whole path, where Envoy has one."""
    if change is None:
        return {}
    value = f"/{change.value.removeprefix('/')}"
    if change.type is PathModifierType.REPLACE_FULL_PATH:
        return {full: value} if full else _regex_rewrite("^.*$", value)
    new = value.rstrip("/")
    if new and prefix:
        return {"prefixRewrite": new}
    # What is left behind the prefix has its slash, or needs one.
    return _regex_rewrite(f"^{re.escape(prefix)}/?", f"{new}/")


def _regex_rewrite(pattern: str, text: str) -> Json:
    substitution = text.replace("\\", "\\\\")
    return {"regexRewrite": {"pattern": {"regex": pattern}, "substitution": substitution}}
