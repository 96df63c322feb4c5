"""What waypoint_mgr says of the requests that its Envoys have served, in messages as those in `messages`.

Sums since the Envoy began, so that a message that is lost is made up for by the next one.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

BOUNDS: Final = (
    0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 600_000,
    1_800_000, 3_600_000,
)  # fmt: skip
"""Upper bounds of a histogram's buckets, in milliseconds or bytes: Envoy's and Istio's. One more has all."""

_BUCKETS: Final = len(BOUNDS) + 1
Count = Annotated[int, msgspec.Meta(ge=0)]


class _Part(msgspec.Struct, array_like=True, frozen=True):
    pass


class Histogram(_Part, frozen=True):
    """`buckets` are cumulative; the last has all."""

    buckets: Annotated[list[Count], msgspec.Meta(min_length=_BUCKETS, max_length=_BUCKETS)]
    total: Annotated[float, msgspec.Meta(ge=0)]


class RequestSeries(_Part, frozen=True):
    """Requests that are alike. `client` and `endpoint` are addresses; "" where there is none.

    `service` is `namespace/hostname`, `port` its own. `grpc_status` is "" for what is not gRPC.
    """

    client: str
    endpoint: str
    service: str
    port: str
    response_code: str
    response_flags: str
    grpc_status: str
    duration_ms: Histogram
    request_bytes: Histogram
    response_bytes: Histogram


class RequestSums(_Part, frozen=True):
    """Of one Envoy, or a part of it: what was found at one `look` comes in one message or several.

    `began_s`: when it began, in seconds since boot; with `instance` it names the Envoy.
    """

    version: int
    instance: str
    began_s: float
    look: int
    series: list[RequestSeries] = []
