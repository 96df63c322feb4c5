"""One trace shows a push: the control plane's response, the batch, the map write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.collector import Collector, collecting
from tests.mesh.manifests import host, pod, service, text
from tests.mesh.node import Node, until

ENDPOINTS = "pykmesh.entries.endpoints"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


def test_one_trace_from_the_response_to_the_map_write(collector: Collector, tmp_path: Path) -> None:
    node = Node(tmp_path, subnet=3)
    web = service("web", "10.96.0.9", app="web", ports={80: 80})
    wanted = {"xds_client response", "xds_client publish", "map_writer apply"}

    def whole(endpoints: int) -> bool:
        """A trace with all three, in which so many endpoints were written."""
        by_trace: dict[bytes, list[Span]] = {}
        for span in collector.spans:
            by_trace.setdefault(span.trace_id, []).append(span)
        return any(
            wanted == {span.name for span in spans}
            and endpoints in [a.value.int_value for s in spans for a in s.attributes if a.key == ENDPOINTS]
            for spans in by_trace.values()
        )

    try:
        node.write("web", text(web, pod("w", "10.9.9.9", app="web")))
        node.start("--otlp-endpoint", f"http://127.0.0.1:{collector.server_address[1]}")
        node.until_endpoints(host("web"), {"10.9.9.9:80"})
        pods = [pod(f"w{n}", f"10.9.9.{n}", app="web") for n in (1, 2)]
        node.write("web", text(web, pod("w", "10.9.9.9", app="web"), *pods))
        until(lambda: whole(2), "one trace of a change")
    finally:
        node.end()
