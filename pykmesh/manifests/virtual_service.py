"""The spec of Istio's VirtualService (networking.istio.io/v1), with the rules that Istio checks.

Fields that exist are read even where nothing honours them: only so can they be named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final

import msgspec

from pykmesh.manifests.durations import GoDuration, PositiveDuration
from pykmesh.manifests.http_route import HeaderName
from pykmesh.manifests.names import PRINTED, PortNumber

Status = Annotated[int, msgspec.Meta(ge=200, le=599)]
Share = Annotated[float, msgspec.Meta(ge=0, le=100)]
_WholeShare = Annotated[int, msgspec.Meta(ge=0, le=100)]
_Any = dict[str, Any]


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False):
    """How all parts are read."""


_Printed = Annotated[str, msgspec.Meta(pattern=rf"^{PRINTED}*\Z", max_length=4096)]
"""What may stand in a request's head."""
_Some = Annotated[_Printed, msgspec.Meta(min_length=1)]
_ParamName = Annotated[str, msgspec.Meta(pattern=rf"^{PRINTED}+\Z", min_length=1, max_length=256)]
_DESTINATIONS_MAX: Final = 1000
"""The sum of their weights must be less than 2^32."""
_CHANGES_MAX: Final = 256
"""Of headers in one place: Envoy takes a thousand of a route's in all."""


class StringMatch(_Part, frozen=True, kw_only=True):
    """Of a header or parameter, with nothing said: that it is there."""

    exact: _Printed | None = None
    prefix: _Printed | None = None
    regex: _Some | None = None

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.exact, self.prefix, self.regex)) > 1:
            raise ValueError("only one of exact, prefix and regex may be given")

    @property
    def is_empty(self) -> bool:
        return self == StringMatch()


class HTTPMatch(_Part, frozen=True, kw_only=True):
    name: str = ""
    uri: StringMatch | None = None
    scheme: StringMatch | None = None
    method: StringMatch | None = None
    authority: StringMatch | None = None
    headers: dict[HeaderName, StringMatch] = {}
    without_headers: dict[HeaderName, StringMatch] = {}
    query_params: dict[_ParamName, StringMatch] = {}
    ignore_uri_case: bool = False
    port: PortNumber | None = None
    source_labels: dict[str, str] = {}
    source_namespace: str = ""
    gateways: tuple[str, ...] = ()
    stat_prefix: str = ""

    @property
    def texts(self) -> Iterator[tuple[str, StringMatch]]:
        """All that a text of the request is compared with, by what it is called there."""
        for name in ("uri", "scheme", "method", "authority"):
            if (found := getattr(self, name)) is not None:
                yield name, found
        for name, of in (
            ("headers", self.headers),
            ("withoutHeaders", self.without_headers),
            ("queryParams", self.query_params),
        ):
            yield from ((f"{name}[{key}]", found) for key, found in of.items())

    def __post_init__(self) -> None:
        for name in ("uri", "scheme", "method", "authority"):
            if getattr(self, name) == StringMatch():
                raise ValueError(f"{name} needs one of exact, prefix and regex")
        for name, found in self.texts:
            if name != "uri" and found.prefix == "":
                raise ValueError(f"{name}: the prefix is empty")


class PortSelector(_Part, frozen=True, kw_only=True):
    number: PortNumber


class Destination(_Part, frozen=True, kw_only=True):
    host: Annotated[str, msgspec.Meta(min_length=1)]
    subset: str = ""
    port: PortSelector | None = None


AUTHORITY = ":authority"
_SetName = Annotated[
    str,
    msgspec.Meta(pattern=rf"^(?:{AUTHORITY}|[A-Za-z0-9!#$%&'*+\-.^_`|~]+)\Z", min_length=1, max_length=256),
]
"""A header's, or what Envoy calls the host."""


class HeaderOperations(_Part, frozen=True, kw_only=True):
    set: Annotated[dict[_SetName, _Printed], msgspec.Meta(max_length=_CHANGES_MAX)] = {}
    add: Annotated[dict[HeaderName, _Printed], msgspec.Meta(max_length=_CHANGES_MAX)] = {}
    remove: Annotated[tuple[HeaderName, ...], msgspec.Meta(max_length=_CHANGES_MAX)] = ()


class Headers(_Part, frozen=True, kw_only=True):
    request: HeaderOperations = HeaderOperations()
    response: HeaderOperations = HeaderOperations()

    def __post_init__(self) -> None:
        if AUTHORITY in self.response.set:
            raise ValueError(f"a response has no {AUTHORITY}")


class RouteDestination(_Part, frozen=True, kw_only=True):
    destination: Destination
    weight: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    headers: Headers = Headers()


class Redirect(_Part, frozen=True, kw_only=True):
    uri: _Printed = ""
    authority: _Printed = ""
    port: PortNumber | None = None
    derive_port: str = ""
    scheme: _Printed = ""
    prefix_rewrite: _Printed = ""
    redirect_code: int = 301

    def __post_init__(self) -> None:
        if self.uri and self.prefix_rewrite:
            raise ValueError("only one of uri and prefixRewrite may be given")
        if self.redirect_code not in (301, 302, 303, 307, 308):
            raise ValueError(f"redirectCode must be 301, 302, 303, 307 or 308: {self.redirect_code}")


BODY_BYTES: Final = 4096


class Body(_Part, frozen=True, kw_only=True):
    string: Annotated[str, msgspec.Meta(pattern=r"^[^\ud800-\udfff]*\Z")] | None = None
    bytes: str | None = None

    def __post_init__(self) -> None:
        if self.string is not None and len(self.string.encode()) > BODY_BYTES:
            raise ValueError(f"a body of more than {BODY_BYTES} bytes")


class DirectResponse(_Part, frozen=True, kw_only=True):
    status: Status
    body: Body | None = None


class RegexRewrite(_Part, frozen=True, kw_only=True):
    match: _Some
    rewrite: _Printed = ""


class Rewrite(_Part, frozen=True, kw_only=True):
    uri: _Printed = ""
    authority: _Printed = ""
    uri_regex_rewrite: RegexRewrite | None = None

    def __post_init__(self) -> None:
        if self.uri and self.uri_regex_rewrite:
            raise ValueError("only one of uri and uriRegexRewrite may be given")


class Retries(_Part, frozen=True, kw_only=True):
    attempts: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    per_try_timeout: GoDuration | None = None
    retry_on: _Printed = ""
    retry_remote_localities: bool | None = None
    retry_ignore_previous_hosts: bool | None = None
    backoff: PositiveDuration | None = None


class Percent(_Part, frozen=True, kw_only=True):
    value: Share = 0.0


class Delay(_Part, frozen=True, kw_only=True):
    fixed_delay: PositiveDuration | None = None
    exponential_delay: GoDuration | None = None
    percentage: Percent | None = None
    percent: _WholeShare | None = None


class Abort(_Part, frozen=True, kw_only=True):
    http_status: Status | None = None
    grpc_status: str | None = None
    http2_error: str | None = None
    percentage: Percent | None = None


class Fault(_Part, frozen=True, kw_only=True):
    delay: Delay | None = None
    abort: Abort | None = None


class Mirror(_Part, frozen=True, kw_only=True):
    destination: Destination
    percentage: Percent | None = None


class CorsPolicy(_Part, frozen=True, kw_only=True):
    allow_origins: tuple[StringMatch, ...] = ()
    allow_origin: tuple[_Printed, ...] = ()
    allow_methods: tuple[_Printed, ...] = ()
    allow_headers: tuple[_Printed, ...] = ()
    expose_headers: tuple[_Printed, ...] = ()
    max_age: GoDuration | None = None
    allow_credentials: bool | None = None
    unmatched_preflights: str = ""

    def __post_init__(self) -> None:
        if any(each.prefix == "" for each in self.allow_origins):
            raise ValueError("allowOrigins: the prefix is empty")


class Delegate(_Part, frozen=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    namespace: str = ""


class HTTPRoute(_Part, frozen=True, kw_only=True):
    name: str = ""
    match: tuple[HTTPMatch, ...] = ()
    route: Annotated[tuple[RouteDestination, ...], msgspec.Meta(max_length=_DESTINATIONS_MAX)] = ()
    redirect: Redirect | None = None
    direct_response: DirectResponse | None = None
    delegate: Delegate | None = None
    rewrite: Rewrite | None = None
    timeout: GoDuration | None = None
    retries: Retries | None = None
    fault: Fault | None = None
    mirror: Destination | None = None
    mirrors: tuple[Mirror, ...] = ()
    mirror_percentage: Percent | None = None
    mirror_percent: _WholeShare | None = None
    mirror_percent_of_old: _WholeShare | None = msgspec.field(name="mirror_percent", default=None)
    cors_policy: CorsPolicy | None = None
    headers: Headers = Headers()

    def __post_init__(self) -> None:
        if sum(map(bool, (self.route, self.redirect, self.direct_response, self.delegate))) != 1:
            raise ValueError("one of route, redirect, directResponse and delegate must be given")
        if self.redirect and self.rewrite:
            raise ValueError("only one of redirect and rewrite may be given")
        if self.mirror and self.mirrors:
            raise ValueError("only one of mirror and mirrors may be given")
        if len(self.route) > 1 and not sum(one.weight for one in self.route):
            raise ValueError("the weights of several destinations must not all be 0")

    @property
    def destinations(self) -> Iterator[Destination]:
        """Everything that requests, or copies of them, may be sent to."""
        yield from (one.destination for one in self.route)
        yield from (one.destination for one in self.mirrors)
        if self.mirror:
            yield self.mirror


class L4Match(_Part, frozen=True, kw_only=True):
    destination_subnets: tuple[str, ...] = ()
    port: PortNumber | None = None
    source_labels: dict[str, str] = {}
    source_namespace: str = ""
    source_subnet: str = ""
    gateways: tuple[str, ...] = ()


class TCPRoute(_Part, frozen=True, kw_only=True):
    match: tuple[L4Match, ...] = ()
    route: Annotated[tuple[RouteDestination, ...], msgspec.Meta(min_length=1, max_length=_DESTINATIONS_MAX)]

    def __post_init__(self) -> None:
        if len(self.route) > 1 and not sum(one.weight for one in self.route):
            raise ValueError("the weights of several destinations must not all be 0")
        if any(one.headers != Headers() for one in self.route):
            raise ValueError("connections have no headers")


class VirtualServiceSpec(_Part, frozen=True, kw_only=True):
    hosts: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    http: tuple[HTTPRoute, ...] = ()
    tcp: tuple[TCPRoute, ...] = ()
    tls: tuple[_Any, ...] = ()
    export_to: tuple[str, ...] = ()

    @property
    def destinations(self) -> Iterator[Destination]:
        """Everything that something may be sent to."""
        for http in self.http:
            yield from http.destinations
        for tcp in self.tcp:
            yield from (one.destination for one in tcp.route)
