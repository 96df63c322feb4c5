"""The spec of Gateway API's HTTPRoute (v1), with the rules that its CRD checks.

What stands beside another field (a filter of one type with the settings of another) is checked here as well,
so that who reads a route need not. Fields that exist are read even where nothing honours them yet: only so
can they be named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Final

import msgspec

from pykmesh.manifests.names import Name, PortNumber

GATEWAY_GROUP: Final = "gateway.networking.k8s.io"
CORE_GROUPS: Final = ("", "core")
ISTIO_GROUP: Final = "networking.istio.io"

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
Hostname = Annotated[str, msgspec.Meta(pattern=rf"^(\*\.)?{_LABEL}(\.{_LABEL})*\Z", max_length=253)]
PreciseHostname = Annotated[str, msgspec.Meta(pattern=rf"^{_LABEL}(\.{_LABEL})*\Z", max_length=253)]
HeaderName = Annotated[
    str, msgspec.Meta(pattern=r"^[A-Za-z0-9!#$%&'*+\-.^_`|~]+\Z", min_length=1, max_length=256)
]
HeaderValue = Annotated[
    str, msgspec.Meta(pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]+\Z", min_length=1, max_length=4096)
]
QueryParamName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Duration = Annotated[str, msgspec.Meta(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}\Z")]
"""GEP-2257, such as 1h30m or 500ms."""
Path = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x20\x7f]*\Z", max_length=1024)]

_UNIT_MS: Final = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_NOT_IN_PATHS: Final = ("//", "/./", "/../", "%2f", "%2F", "#")
_PATH_CHARACTERS: Final = re.compile(r"(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})+")
_PATH_ENDS_REFUSED: Final = ("/..", "/.")


_GROUPS: Final = {"Gateway": (GATEWAY_GROUP,), "Service": CORE_GROUPS, "ServiceEntry": (ISTIO_GROUP,)}


def whole_kind(group: str, kind: str) -> str:
    """Such as `example.com/Service`; `Service` alone is that of Kubernetes."""
    return kind if group in _GROUPS.get(kind, ()) else f"{group}/{kind}"


def duration_ms(text: str) -> int:
    """Of a Duration."""
    return sum(int(count) * _UNIT_MS[unit] for count, unit in re.findall(r"([0-9]+)(ms|h|m|s)", text))


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False):
    """How all parts are read."""


class ParentRef(_Part, frozen=True, kw_only=True):
    group: str = GATEWAY_GROUP
    kind: str = "Gateway"
    namespace: str = ""
    name: Name
    section_name: str = ""
    port: PortNumber | None = None

    @property
    def whole_kind(self) -> str:
        """With its group, unless that is the one which the kind has."""
        return whole_kind(self.group, self.kind)


class PathMatchType(Enum):
    EXACT = "Exact"
    PATH_PREFIX = "PathPrefix"
    REGULAR_EXPRESSION = "RegularExpression"


class ValueMatchType(Enum):
    EXACT = "Exact"
    REGULAR_EXPRESSION = "RegularExpression"


class HTTPMethod(Enum):
    GET = "GET"
    HEAD = "HEAD"
    POST = "POST"
    PUT = "PUT"
    DELETE = "DELETE"
    CONNECT = "CONNECT"
    OPTIONS = "OPTIONS"
    TRACE = "TRACE"
    PATCH = "PATCH"


class PathMatch(_Part, frozen=True, kw_only=True):
    type: PathMatchType = PathMatchType.PATH_PREFIX
    value: Path = "/"

    def __post_init__(self) -> None:
        if self.type is PathMatchType.REGULAR_EXPRESSION:
            return
        if not self.value.startswith("/"):
            raise ValueError(f"value must be an absolute path: {self.value!r}")
        refused = [text for text in _NOT_IN_PATHS if text in self.value]
        refused += [text for text in _PATH_ENDS_REFUSED if self.value.endswith(text)]
        if refused:
            raise ValueError(f"value must not contain {refused[0]!r}: {self.value!r}")
        if not _PATH_CHARACTERS.fullmatch(self.value):
            raise ValueError(f"value must be of the characters of a path: {self.value!r}")


class HeaderMatch(_Part, frozen=True, kw_only=True):
    type: ValueMatchType = ValueMatchType.EXACT
    name: HeaderName
    value: HeaderValue


class QueryParamMatch(_Part, frozen=True, kw_only=True):
    type: ValueMatchType = ValueMatchType.EXACT
    name: QueryParamName
    value: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class RouteMatch(_Part, frozen=True, kw_only=True):
    path: PathMatch = PathMatch()
    headers: tuple[HeaderMatch, ...] = ()
    query_params: tuple[QueryParamMatch, ...] = ()
    method: HTTPMethod | None = None


class Header(_Part, frozen=True, kw_only=True):
    name: HeaderName
    value: HeaderValue


class HeaderModifier(_Part, frozen=True, kw_only=True):
    set: Annotated[tuple[Header, ...], msgspec.Meta(max_length=16)] = ()
    add: Annotated[tuple[Header, ...], msgspec.Meta(max_length=16)] = ()
    remove: Annotated[tuple[HeaderName, ...], msgspec.Meta(max_length=16)] = ()


class PathModifierType(Enum):
    REPLACE_FULL_PATH = "ReplaceFullPath"
    REPLACE_PREFIX_MATCH = "ReplacePrefixMatch"


class PathModifier(_Part, frozen=True, kw_only=True):
    type: PathModifierType
    replace_full_path: Path | None = None
    replace_prefix_match: Path | None = None

    def __post_init__(self) -> None:
        is_full = self.type is PathModifierType.REPLACE_FULL_PATH
        wanted, other = self.replace_full_path, self.replace_prefix_match
        if not is_full:
            wanted, other = other, wanted
        if wanted is None or other is not None:
            name = "replaceFullPath" if is_full else "replacePrefixMatch"
            raise ValueError(f"type {self.type.value} goes with {name}, alone")

    @property
    def value(self) -> str:
        return self.replace_full_path or self.replace_prefix_match or ""


class RequestRedirect(_Part, frozen=True, kw_only=True):
    scheme: str | None = None
    hostname: PreciseHostname | None = None
    path: PathModifier | None = None
    port: PortNumber | None = None
    status_code: int = 302

    def __post_init__(self) -> None:
        if self.scheme not in (None, "http", "https"):
            raise ValueError(f"scheme must be http or https: {self.scheme!r}")
        if self.status_code not in (301, 302, 303, 307, 308):
            raise ValueError(f"statusCode must be 301, 302, 303, 307 or 308: {self.status_code}")


class URLRewrite(_Part, frozen=True, kw_only=True):
    hostname: PreciseHostname | None = None
    path: PathModifier | None = None


class BackendObjectRef(_Part, frozen=True, kw_only=True):
    group: str = ""
    kind: str = "Service"
    namespace: str = ""
    name: Name
    port: PortNumber | None = None

    def __post_init__(self) -> None:
        if (self.is_service or self.is_hostname) and self.port is None:
            raise ValueError(f"port must be given for a {self.kind}")

    @property
    def is_service(self) -> bool:
        return self.kind == "Service" and self.group in CORE_GROUPS

    @property
    def is_hostname(self) -> bool:
        """Istio's: of any service of the mesh, such as a ServiceEntry's."""
        return self.kind == "Hostname" and self.group == ISTIO_GROUP


class Fraction(_Part, frozen=True, kw_only=True):
    numerator: Annotated[int, msgspec.Meta(ge=0)]
    denominator: Annotated[int, msgspec.Meta(ge=1)] = 100

    def __post_init__(self) -> None:
        if self.numerator > self.denominator:
            raise ValueError("numerator must be at most denominator")


class RequestMirror(_Part, frozen=True, kw_only=True):
    backend_ref: BackendObjectRef
    percent: Annotated[int, msgspec.Meta(ge=0, le=100)] | None = None
    fraction: Fraction | None = None

    def __post_init__(self) -> None:
        if self.percent is not None and self.fraction is not None:
            raise ValueError("only one of percent and fraction may be given")

    @property
    def per_million(self) -> int:
        """How many of a million requests are mirrored."""
        if self.fraction:
            return self.fraction.numerator * 1_000_000 // self.fraction.denominator
        return 1_000_000 if self.percent is None else self.percent * 10_000


_Origin = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^(\*|https?://((\*\.)?([a-zA-Z0-9-]+\.)*[a-zA-Z0-9-]+|\*)(:[0-9]{1,5})?)\Z", max_length=253
    ),
]
_Method = Annotated[
    str, msgspec.Meta(pattern=r"^(GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|\*)\Z")
]


class CORSFilter(_Part, frozen=True, kw_only=True):
    """A `*` stands alone."""

    allow_origins: Annotated[tuple[_Origin, ...], msgspec.Meta(max_length=64)] = ()
    allow_methods: Annotated[tuple[_Method, ...], msgspec.Meta(max_length=9)] = ()
    allow_headers: Annotated[tuple[HeaderName, ...], msgspec.Meta(max_length=64)] = ()
    expose_headers: Annotated[tuple[HeaderName, ...], msgspec.Meta(max_length=64)] = ()
    allow_credentials: bool = False
    max_age: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] = 5
    """In seconds."""

    def __post_init__(self) -> None:
        for name in ("allow_origins", "allow_methods", "allow_headers"):
            said = getattr(self, name)
            if "*" in said and len(said) > 1:
                raise ValueError(f"{name}: * stands alone")


class FilterType(Enum):
    """The value is also the name of the field with the filter's settings, but for its first letters."""

    REQUEST_HEADER_MODIFIER = "RequestHeaderModifier"
    RESPONSE_HEADER_MODIFIER = "ResponseHeaderModifier"
    REQUEST_MIRROR = "RequestMirror"
    REQUEST_REDIRECT = "RequestRedirect"
    URL_REWRITE = "URLRewrite"
    EXTENSION_REF = "ExtensionRef"
    CORS = "CORS"
    EXTERNAL_AUTH = "ExternalAuth"


_SETTINGS_OF: Final = {
    FilterType.REQUEST_HEADER_MODIFIER: "request_header_modifier",
    FilterType.RESPONSE_HEADER_MODIFIER: "response_header_modifier",
    FilterType.REQUEST_MIRROR: "request_mirror",
    FilterType.REQUEST_REDIRECT: "request_redirect",
    FilterType.URL_REWRITE: "url_rewrite",
    FilterType.EXTENSION_REF: "extension_ref",
    FilterType.CORS: "cors",
    FilterType.EXTERNAL_AUTH: "external_auth",
}
_REPEATABLE: Final = (FilterType.REQUEST_MIRROR, FilterType.EXTENSION_REF)


class RouteFilter(_Part, frozen=True, kw_only=True):
    """Exactly the settings that belong to the type are there."""

    type: FilterType
    request_header_modifier: HeaderModifier | None = None
    response_header_modifier: HeaderModifier | None = None
    request_mirror: RequestMirror | None = None
    request_redirect: RequestRedirect | None = None
    url_rewrite: URLRewrite | None = None
    extension_ref: dict[str, Any] | None = None
    cors: CORSFilter | None = None
    external_auth: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for kind, field in _SETTINGS_OF.items():
            if (getattr(self, field) is not None) != (kind is self.type):
                raise ValueError(f"type {self.type.value} goes with its own settings, alone")


Filters = tuple[RouteFilter, ...]


def _check_filters(filters: Filters) -> None:
    types = [item.type for item in filters]
    for kind in set(types) - set(_REPEATABLE):
        if types.count(kind) > 1:
            raise ValueError(f"filter {kind.value} cannot be repeated")
    if FilterType.REQUEST_REDIRECT in types and FilterType.URL_REWRITE in types:
        raise ValueError("RequestRedirect and URLRewrite cannot be used together")


class BackendRef(BackendObjectRef, frozen=True, kw_only=True):
    weight: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 1
    filters: Filters = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_filters(self.filters)


class Timeouts(_Part, frozen=True, kw_only=True):
    """A duration of 0 is none."""

    request: Duration | None = None
    backend_request: Duration | None = None

    def __post_init__(self) -> None:
        request_ms = duration_ms(self.request or "0s")
        if request_ms and duration_ms(self.backend_request or "0s") > request_ms:
            raise ValueError("backendRequest must not be longer than request")


class Retry(_Part, frozen=True, kw_only=True):
    codes: tuple[Annotated[int, msgspec.Meta(ge=400, le=599)], ...] = ()
    attempts: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    backoff: Duration | None = None


class RouteRule(_Part, frozen=True, kw_only=True):
    name: str = ""
    matches: tuple[RouteMatch, ...] = (RouteMatch(),)
    filters: Filters = ()
    backend_refs: Annotated[tuple[BackendRef, ...], msgspec.Meta(max_length=16)] = ()
    timeouts: Timeouts = Timeouts()
    retry: Retry | None = None
    session_persistence: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_filters(self.filters)
        redirects = any(item.type is FilterType.REQUEST_REDIRECT for item in self.filters)
        if redirects and self.backend_refs:
            raise ValueError("RequestRedirect must not be used together with backendRefs")
        if any(_replaces_prefix(item) for item in self.filters) and not self._has_one_prefix:
            raise ValueError("replacePrefixMatch needs exactly one match, of type PathPrefix")

    @property
    def _has_one_prefix(self) -> bool:
        return len(self.matches) <= 1 and all(
            match.path.type is PathMatchType.PATH_PREFIX for match in self.matches
        )


def _replaces_prefix(item: RouteFilter) -> bool:
    changed = item.url_rewrite or item.request_redirect
    return bool(changed and changed.path and changed.path.type is PathModifierType.REPLACE_PREFIX_MATCH)


class HTTPRouteSpec(_Part, frozen=True, kw_only=True):
    parent_refs: tuple[ParentRef, ...] = ()
    hostnames: tuple[Hostname, ...] = ()
    rules: tuple[RouteRule, ...] = (RouteRule(),)

    @property
    def backends(self) -> Iterator[BackendObjectRef]:
        """Everything that requests, or copies of them, may be sent to."""
        for rule in self.rules:
            yield from rule.backend_refs
            for item in (*rule.filters, *(item for ref in rule.backend_refs for item in ref.filters)):
                if item.request_mirror:
                    yield item.request_mirror.backend_ref
