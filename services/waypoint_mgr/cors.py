"""Which pages of other origins may read answers: Envoy's filter for it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from pykmesh.manifests.http_route import CORSFilter
from services.waypoint_mgr.envoy import Json, typed

NAME: Final = "envoy.filters.http.cors"
FILTER: Final = {"name": NAME, "typedConfig": typed("filters.http.cors.v3.Cors")}
"""Of the chain: it does what a route says by its own configuration."""
FORBIDDEN: Final = 403
_ANY: Final = "*"
_ANY_PATTERN: Final = ".*"
_LABELS: Final = "[^/:]+"


def policy(
    origins: Iterable[Json],
    methods: Sequence[str],
    headers: Sequence[str],
    exposed: Sequence[str],
    max_age_s: int | None,
    *,
    credentials: bool | None,
    forwards_others: bool,
) -> Json:
    """A route's own configuration. `origins`: Envoy's StringMatchers. `forwards_others`: preflights, too."""
    config = typed("filters.http.cors.v3.CorsPolicy") | {
        "allowOriginStringMatch": [*origins],
        "allowMethods": ",".join(methods),
        "allowHeaders": ",".join(headers),
        "exposeHeaders": ",".join(exposed),
        "forwardNotMatchingPreflights": forwards_others,
    }
    if max_age_s is not None:
        config["maxAge"] = str(max_age_s)
    if credentials is not None:
        config["allowCredentials"] = credentials
    return config


def of_filter(found: CORSFilter) -> Json:
    """Gateway API's. For a `*` Envoy tells the method and the headers that were asked for.

    Of headers to expose there is no `*` beside credentials: browsers take it for a name.
    """
    exposed = [name for name in found.expose_headers if not (name == _ANY and found.allow_credentials)]
    return policy(
        [{"safeRegex": {"regex": _pattern(origin)}} for origin in found.allow_origins],
        found.allow_methods,
        found.allow_headers,
        exposed,
        found.max_age,
        credentials=found.allow_credentials or None,
        forwards_others=True,
    )


def refusal(found: CORSFilter, match: Json) -> Json | None:
    """A route for what of `match` is a preflight of another origin, to answer it here. None: all may ask.

    Envoy itself would tell such a page which methods and headers there are.
    """
    patterns = [_pattern(origin) for origin in found.allow_origins]
    if _ANY_PATTERN in patterns:
        return None
    asks = [
        {"name": ":method", "stringMatch": {"exact": "OPTIONS"}},
        {"name": "access-control-request-method", "presentMatch": True},
        {"name": "origin", "presentMatch": True},
    ]
    if patterns:
        its_own = {"safeRegex": {"regex": "|".join(patterns)}}
        asks.append({"name": "origin", "stringMatch": its_own, "invertMatch": True})
    said = match.get("headers", [])
    return {"match": match | {"headers": [*said, *asks]}, "directResponse": {"status": FORBIDDEN}}


def _pattern(origin: str) -> str:
    """A `*` stands for any number of labels; a port that is the scheme's own is not said by clients."""
    if origin == _ANY:
        return _ANY_PATTERN
    origin = re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", origin.lower())
    return _LABELS.join(map(re.escape, origin.split(_ANY)))
