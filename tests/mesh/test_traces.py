"""One trace shows a push: the control plane's response, the batch, the map write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.collector import Collector, collecting
from tests.mesh.manifests import host, pod, service, text
from tests.mesh.node import Node, until


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


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

        def keys() -> set[str]:
            applied = [s for s in collector.spans if s.name == "map_writer apply" and s.parent_span_id]
            return {attribute.key for span in applied for attribute in span.attributes}

        until(lambda: "pykmesh.entries.endpoints" in keys(), "what was written")
    finally:
        node.end()
