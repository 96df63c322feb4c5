"""Whom the metrics and flows name, for connections of enrolled pods."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.mesh.conftest import VIP4, Mesh
from tests.mesh.node import python, until

REFUSED = """
import socket
s = socket.socket(socket.AF_INET, socket.{kind}); s.settimeout(1)
print(s.connect_ex(({address!r}, {port})))
"""


@pytest.fixture(scope="module")
def both_ends(mesh: Mesh) -> Mesh:
    """The mesh, with its endpoints enrolled too."""
    for endpoint in mesh.web:
        mesh.node.enroll(endpoint)
    return mesh


def series(mesh: Mesh, name: str, **labels: str) -> list[dict[str, str]]:
    """The labels of a metric's series that have these among theirs."""
    port = mesh.node.status()["processes"]["telemetry"]["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [s for family in families for s in family.samples if s.name == name]
    return [s.labels for s in samples if labels.items() <= s.labels.items()]


def test_who_accepts_a_connection_names_the_service_that_it_belongs_to(both_ends: Mesh) -> None:
    both_ends.client.run("curl", "-sS", "--max-time", "5", f"http://{VIP4}/")
    accepted = {"reporter": "destination", "source_workload": "client"}
    (found, *_) = until(
        lambda: series(both_ends, "istio_tcp_connections_closed_total", **accepted), "a connection counted"
    )
    assert found["destination_service"] == "web.shop.svc.cluster.local"
    assert (found["destination_service_name"], found["destination_service_namespace"]) == ("web", "shop")


def test_a_port_that_the_service_does_not_have_is_refused_under_the_services_name(mesh: Mesh) -> None:
    for port, kind in ((81, "SOCK_STREAM"), (82, "SOCK_DGRAM")):
        python(mesh.client, REFUSED.format(kind=kind, address=VIP4, port=port))
    refused = until(
        lambda: series(
            mesh,
            "istio_tcp_connections_failed_total",
            reporter="source",
            source_workload="client",
            response_flags="CONNECT",
        ),
        "a refusal counted",
    )
    assert {found["destination_service"] for found in refused} == {"web.shop.svc.cluster.local"}
    told = mesh.node.cli("observe", "--verdict", "refused", "--last", "2").stdout
    assert "-> web.shop:81  TCP refused no_port\n" in told
    assert "-> web.shop:82  UDP refused no_port\n" in told
