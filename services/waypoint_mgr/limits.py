"""How many requests a service takes at each Envoy of its waypoint, by an annotation of the Service. Pure.

Neither Gateway API nor Istio has words for it (but for Envoy's own, in an EnvoyFilter).
"""

from __future__ import annotations

import re
from typing import Final

from pykmesh.manifests.objects import Service
from services.waypoint_mgr.envoy import Json, Port, named, typed

RATE_LIMIT: Final = "pykmesh.io/rate-limit"
"""100/s, 6000/m or 100000/h: of all clients together, at each port and Envoy. More is answered with 429."""
_LIMIT: Final = re.compile(r"([1-9][0-9]{0,8})/([smh])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600}


def rate_limit(service: Service | None, at: Port) -> list[Json]:
    """At most one filter, which is asked after policies are; none for what cannot be read (`misread`)."""
    found = _LIMIT.fullmatch(_said(service))
    if found is None:
        return []
    count, seconds = int(found[1]), _SECONDS[found[2]]
    always = {"defaultValue": {"numerator": 100, "denominator": "HUNDRED"}}
    config = typed("filters.http.local_ratelimit.v3.LocalRateLimit") | {
        "statPrefix": f"{at.stat_name}.",
        "tokenBucket": {"maxTokens": count, "tokensPerFill": count, "fillInterval": f"{seconds}s"},
        "filterEnabled": always,
        "filterEnforced": always,
    }
    return [named("envoy.filters.http.local_ratelimit", config)]


def misread(name: str, service: Service | None) -> list[str]:
    said = _said(service)
    if not said or _LIMIT.fullmatch(said):
        return []
    return [f"{name}: {RATE_LIMIT} is {said!r}: like 100/s, 6000/m or 100000/h"]


def _said(service: Service | None) -> str:
    return service.metadata.annotations.get(RATE_LIMIT, "") if service else ""
