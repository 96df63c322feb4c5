"""One trace shows a push: the control plane's response, the batch, the map write."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.mesh.manifests import host, pod, service, text
from tests.mesh.node import Node, until


class Collector(ThreadingHTTPServer):
    """Keeps the spans that come."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_one_trace_from_the_response_to_the_map_write(collector: Collector, tmp_path: Path) -> None:
    node = Node(tmp_path, subnet=3)
    try:
        node.start("--otlp-endpoint", f"http://127.0.0.1:{collector.server_address[1]}")
        node.write(
            "web",
            text(service("web", "10.96.0.9", app="web", ports={80: 80}), pod("w", "10.9.9.9", app="web")),
        )
        node.until_endpoints(host("web"), {"10.9.9.9:80"})
        wanted = {"xds_client response", "xds_client publish", "map_writer apply"}

        def whole() -> bool:
            by_trace: dict[bytes, set[str]] = {}
            for span in collector.spans:
                by_trace.setdefault(span.trace_id, set()).add(span.name)
            return wanted in by_trace.values()

        until(whole, "one trace with all three spans")
        applied = [s for s in collector.spans if s.name == "map_writer apply" and s.parent_span_id]
        keys = {attribute.key for span in applied for attribute in span.attributes}
        assert "pykmesh.entries.endpoints" in keys
    finally:
        node.end()
