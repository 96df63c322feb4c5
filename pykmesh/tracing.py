"""OpenTelemetry traces: one span for each batch, its context in the bus's message headers.

Without an endpoint there are none: OpenTelemetry's own that do nothing cost a tenth of a push.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import context, propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from pykmesh import __version__

EXPORT_TIMEOUT_S = 2
_Carried = Mapping[str, str]
_NOTHING = nullcontext(trace.INVALID_SPAN)
_tracer: trace.Tracer | None = None


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
    global _tracer  # noqa: PLW0603  (what a process exports to is set once, at its start)
    _tracer = provider.get_tracer("pykmesh", __version__)
    return provider


def span(name: str, causes: Sequence[_Carried] = ()) -> AbstractContextManager[trace.Span]:
    """The current one while it lasts. `causes`: of messages, the first is the parent, others are links."""
    return _NOTHING if _tracer is None else _span(_tracer, name, causes)


@contextmanager
def _span(tracer: trace.Tracer, name: str, causes: Sequence[_Carried]) -> Iterator[trace.Span]:
    parent, *others = [propagate.extract(dict(found)) for found in causes if found] or [context.get_current()]
    links = [trace.Link(trace.get_current_span(other).get_span_context()) for other in others]
    with tracer.start_as_current_span(name, context=parent, links=links) as found:
        yield found


def headers() -> dict[str, str]:
    """The current span's context, as a message carries it."""
    carrier: dict[str, str] = {}
    if _tracer is not None:
        propagate.inject(carrier)
    return carrier
