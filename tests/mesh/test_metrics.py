"""Whom the metrics and flows name, for connections of enrolled pods."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.mesh.conftest import VIP4, Mesh, web_manifests
from tests.mesh.manifests import pod, text
from tests.mesh.node import Node, python, until

REST_S = 2.5
"""More than the second between two drains."""
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


HOLD = """
import socket, sys
held = [socket.create_connection(({address!r}, 80), 5) for _ in range({count})]
print("open", flush=True)
sys.stdin.readline()
"""


def samples(mesh: Mesh, name: str, **labels: str) -> list[Sample]:
    """Those of a metric that have these labels among theirs."""
    port = mesh.node.status()["processes"]["telemetry"]["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found = [s for family in families for s in family.samples if s.name == name]
    return [s for s in found if labels.items() <= s.labels.items()]


def series(mesh: Mesh, name: str, **labels: str) -> list[dict[str, str]]:
    return [sample.labels for sample in samples(mesh, name, **labels)]


def count(mesh: Mesh, what: str, reporter: str) -> float:
    """The sum over the client's connections to the service."""
    labels = {"reporter": reporter, "source_workload": "client", "destination_service_name": "web"}
    return sum(found.value for found in samples(mesh, f"istio_tcp_connections_{what}_total", **labels))


def at_rest(mesh: Mesh, reporter: str) -> float:
    """How many were opened, once all of them are counted, and closed."""

    def steady() -> list[float]:
        found = [count(mesh, what, reporter) for what in ("opened", "closed", "opened")]
        time.sleep(REST_S)
        return found if set(found) == {count(mesh, "opened", reporter)} else []

    return until(steady, "earlier connections counted")[0]


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


def test_what_closes_after_telemetry_was_killed_is_opened_too(both_ends: Mesh) -> None:
    node, held = both_ends.node, 7
    before = {reporter: at_rest(both_ends, reporter) for reporter in ("source", "destination")}
    client = both_ends.client.spawn(
        sys.executable,
        "-c",
        HOLD.format(address=VIP4, count=held),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "open\n"
    for reporter, sum_before in before.items():
        until(lambda r=reporter, b=sum_before: count(both_ends, "opened", r) == b + held, "opens counted")
    node.kill("telemetry")
    node.until_ready()
    assert count(both_ends, "opened", "source") == 0
    client.communicate("\n", timeout=10)
    for reporter in before:
        until(lambda r=reporter: count(both_ends, "closed", r) == held, "closes counted")
        assert count(both_ends, "opened", reporter) == held
    both_ends.client.run("curl", "-sS", "--max-time", "5", f"http://{VIP4}/")
    for what in ("closed", "opened"):
        until(lambda w=what: count(both_ends, w, "source") == held + 1, f"one more {what}")


def test_an_address_that_passes_to_another_pod_keeps_the_name_that_it_had_then(mesh: Mesh) -> None:
    node, first = mesh.node, mesh.web[0]
    answered = {"reporter": "source", "source_workload": "client", "destination_workload": "web-1"}
    known = pod("after", str(first.address4), str(first.address6), app="web")

    def asked(address: str | None, times: int) -> None:
        for _ in range(times):
            mesh.client.run("curl", "-sS", "--max-time", "5", f"http://{address}:8080/")

    def shown() -> list[str]:
        lines = node.cli("observe", "--last", "20", "-o", "json").stdout.splitlines()
        flows = [flow for flow in map(json.loads, lines) if flow["direction"] == "outbound"]
        return [flow["destination"]["workload"] for flow in flows]

    asked(first.address4, 3)
    until(lambda: shown()[-3:] == ["web-1"] * 3, "the first shown")
    until(lambda: at_rest(mesh, "source"), "the first counted")
    before = sum(s.value for s in samples(mesh, "istio_tcp_connections_closed_total", **answered))
    try:
        node.write("web", web_manifests(mesh.web[1]) + "---\n" + text(known))
        until(lambda: _is_known(node, "after"), "the other pod")
        asked(first.address4, 3)
        until(lambda: shown()[-6:] == ["web-1"] * 3 + ["after"] * 3, "each by the name of its time")
        after = {**answered, "destination_workload": "after"}
        until(
            lambda: sum(s.value for s in samples(mesh, "istio_tcp_connections_closed_total", **after)) == 3,
            "the others counted",
        )
        assert sum(s.value for s in samples(mesh, "istio_tcp_connections_closed_total", **answered)) == before
    finally:
        node.write("web", web_manifests(*mesh.web))


def _is_known(node: Node, name: str) -> bool:
    return any(name in entry["uid"] for entry in node.json("get", "workloads")["workloads"])
