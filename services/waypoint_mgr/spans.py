"""Where the Envoys' spans go, and how many: the mesh's OTLP endpoint, by an annotation of the Gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

import msgspec

from services.waypoint_mgr.envoy import Json, named, socket_address, typed

PERCENT: Final = "pykmesh.io/trace-percent"
PERCENT_BY_DEFAULT: Final = 1.0
"""As Istio's."""
CLUSTER: Final = "otlp"
_TIMEOUT: Final = "5s"
_SAMPLERS: Final = "tracers.opentelemetry.samplers.v3"


class Spans(msgspec.Struct, frozen=True):
    """`percent`: of the requests for which nobody has decided; a client's decision goes on."""

    host: str
    port: int
    path: str
    percent: float = PERCENT_BY_DEFAULT

    def tracing(self, service: str) -> Json:
        """What a chain says of it. `service`: what the waypoint is called in traces."""
        uri = {"uri": f"http://{self.host}:{self.port}{self.path}", "cluster": CLUSTER, "timeout": _TIMEOUT}
        share = {"numerator": round(self.percent * 10_000), "denominator": "MILLION"}
        ratio = typed(f"{_SAMPLERS}.TraceIdRatioBasedSamplerConfig") | {"samplingPercentage": share}
        wrapped = named("envoy.tracers.opentelemetry.samplers.trace_id_ratio_based", ratio)
        parents = typed(f"{_SAMPLERS}.ParentBasedSamplerConfig") | {"wrappedSampler": wrapped}
        config = {
            "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
            "httpService": {"httpUri": uri},
            "serviceName": service,
            "sampler": named("envoy.tracers.opentelemetry.samplers.parent_based", parents),
        }
        return {"provider": named("envoy.tracers.opentelemetry", config)}

    @property
    def cluster(self) -> Json:
        endpoint = {"endpoint": {"address": socket_address(self.host, self.port)}}
        return {
            "name": CLUSTER,
            "type": "STRICT_DNS",
            "connectTimeout": _TIMEOUT,
            "loadAssignment": {"clusterName": CLUSTER, "endpoints": [{"lbEndpoints": [endpoint]}]},
        }


def spans_of(annotations: Mapping[str, str], otlp_endpoint: str) -> tuple[Spans | None, list[str]]:
    """Also returns what is not honoured, a line each."""
    if not otlp_endpoint:
        return None, []
    misread = []
    percent, text = PERCENT_BY_DEFAULT, annotations.get(PERCENT, "")
    if text:
        try:
            percent = float(text)
            if not 0 <= percent <= 100:
                raise ValueError(text)
        except ValueError:
            misread.append(f"{PERCENT} is {text!r}: a number from 0 to 100; {PERCENT_BY_DEFAULT:g} is used")
            percent = PERCENT_BY_DEFAULT
    try:
        url = urlsplit(otlp_endpoint)
        port = url.port or 80
        if url.scheme != "http" or not url.hostname:
            raise ValueError(otlp_endpoint)
    except ValueError:
        return None, [*misread, f"the OTLP endpoint is {otlp_endpoint!r}: Envoys send spans by http:// alone"]
    return Spans(url.hostname, port, f"{url.path.rstrip('/')}/v1/traces", percent), misread
