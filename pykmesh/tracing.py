"""OpenTelemetry traces: one span for each batch, its context in the bus's message headers.

Without an endpoint nothing is exported and spans cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opentelemetry import context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from pykmesh import __version__

EXPORT_TIMEOUT_S = 2
tracer = trace.get_tracer("pykmesh", __version__)


def configure(process: str, instance: str, endpoint: str) -> TracerProvider | None:
    """Exports over OTLP/HTTP when there is an endpoint; `shutdown()` of what it returns flushes."""
    if not endpoint:
        return None
    # Four megabytes that a process without an endpoint does not need.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

    names = {
        "service.name": f"pykmesh-{process}",
        "service.instance.id": instance,
        "service.version": __version__,
    }
    provider = TracerProvider(resource=Resource.create(names))
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    trace.set_tracer_provider(provider)
    return provider


def headers() -> dict[str, str]:
    """The current span's context, as a message carries it."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def parent(message_headers: Mapping[str, str]) -> Context:
    """The context that a message carries, for a span's parent."""
    if not message_headers:
        return context.get_current()
    return propagate.extract(dict(message_headers))


def links(messages: Iterable[Mapping[str, str]]) -> list[trace.Link]:
    """To the spans whose contexts messages carry: further causes of one."""
    found = (trace.get_current_span(parent(headers)).get_span_context() for headers in messages if headers)
    return [trace.Link(context) for context in found]
