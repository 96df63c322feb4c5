"""One trace from the client by way of the waypoint to the endpoint."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from services.waypoint_mgr.spans import PERCENT, spans_of
from tests.collector import Collector, collecting

from .backends import Backend, ask
from .test_instance import canary
from .world import DEADLINE_S, ads_server, at, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans(collector: Collector, count: int) -> None:
    end = time.monotonic() + DEADLINE_S
    while len(collector.spans) < count:
        assert time.monotonic() < end, "no span"
        time.sleep(0.05)


async def test_a_clients_trace_goes_on_and_has_a_span_of_the_waypoint(
    folder: Path, backends: dict[str, Backend]
) -> None:
    with collecting() as collector:
        async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
            world = canary(backends, envoy.port)
            endpoint = f"http://127.0.0.1:{collector.server_address[1]}"
            world.spans, _ = spans_of({PERCENT: "0"}, endpoint)
            status = await envoy.apply(world.configuration())
            assert not status.refusals
            await envoy.ready()

            def told(flags: str) -> str:
                headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
                answer = ask(at("127.0.1.1"), envoy.port, "/", "GET", headers)
                return str(answer.told["headers"]["traceparent"])

            _, trace, span, flags = (await anyio.to_thread.run_sync(told, "01")).split("-")
            await anyio.to_thread.run_sync(spans, collector, 1)
            assert (trace, flags) == (TRACE, "01")
            (found,) = collector.spans
            assert (found.trace_id.hex(), found.parent_span_id.hex()) == (TRACE, PARENT)
            assert found.span_id.hex() == span != PARENT
            assert (await anyio.to_thread.run_sync(told, "00")).split("-")[1] == TRACE
    assert len(collector.spans) == 1, "the client's decision counts"


@pytest.mark.parametrize(
    ("percent", "endpoint", "misread"),
    [
        ("", "http://otel:4318/", []),
        ("2.5", "http://otel:4318", []),
        ("all", "http://otel:4318", ["a number from 0 to 100"]),
        ("101", "http://otel", ["a number from 0 to 100"]),
        ("", "https://otel:4318", ["by http:// alone"]),
        ("", "otel:4318", ["by http:// alone"]),
        ("", "http://otel:port", ["by http:// alone"]),
        ("all", "", []),
    ],
)
def test_what_cannot_be_honoured_is_told(percent: str, endpoint: str, misread: list[str]) -> None:
    found, said = spans_of({PERCENT: percent} if percent else {}, endpoint)
    assert len(said) == len(misread)
    assert all(part in line for part, line in zip(misread, said, strict=True))
    if endpoint.startswith("http://otel:4318"):
        assert found is not None
        assert (found.host, found.port, found.path) == ("otel", 4318, "/v1/traces")
        assert found.percent == (2.5 if percent == "2.5" else 1)
