"""A waypoint as users have one: a Gateway, a label, a route; real Envoy, real traffic of an enrolled pod."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

from pykmesh.kernel.cgroups import find_root
from tests.mesh.manifests import Object, host, pod, service, text
from tests.mesh.node import Node, finish, probe, python, until
from tests.mesh.waypoints import (
    CANARY,
    SHOP4,
    SHOP6,
    SPLIT,
    Mesh,
    ask,
    gateway,
    route,
    shop,
    status,
    until_handed_over,
    version,
    waypoint_mesh,
)
from tests.waypoint.test_tokens import ISSUER, jwks, token

BY_NONE = f"no waypoint, and no service that goes by way of one: service {host('alone')}"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with waypoint_mesh(tmp_path_factory.mktemp("wp"), 12) as found:
        yield found


@pytest.fixture
def routed(mesh: Mesh) -> Mesh:
    mesh.node.write("shop", text(shop()))
    mesh.node.write("route", text(route(CANARY, SPLIT)))
    until_handed_over(mesh)
    until(lambda: ask(mesh, 20, "x-canary: yes") == {(200, "v2"): 20}, "the route")
    return mesh


@pytest.mark.parametrize("address", [SHOP4, SHOP6, f"::ffff:{SHOP4}"])
def test_a_header_chooses_and_weights_split(routed: Mesh, address: str) -> None:
    assert ask(routed, 20, "x-canary: yes", address=address) == {(200, "v2"): 20}
    found = ask(routed, 200, address=address)
    assert found.total() == found[200, "v1"] + found[200, "v2"]
    assert 110 < found[200, "v1"] < 190


def test_a_port_that_is_no_http_goes_through_as_it_is(routed: Mesh) -> None:
    found = ask(routed, 20, port=90)
    assert set(found) <= {(200, "v1"), (200, "v2")}


def test_a_pod_that_listens_at_one_of_its_addresses_is_one_endpoint(routed: Mesh, tmp_path: Path) -> None:
    old = routed.node.network.add("old", 30)
    old.spawn(sys.executable, "-m", "http.server", "9100", "--bind", old.address4, "-d", str(tmp_path))
    found = service("old", "10.96.0.43", "fd96::43", app="old", ports={80: 9100, 90: 9100})
    found["spec"]["ports"][0]["name"] = "http"
    found["metadata"]["labels"] = {"istio.io/use-waypoint": "wp"}
    known = pod("old", old.address4, old.address6, app="old")
    routed.node.write("old", text(found, known))
    try:
        until(lambda: f"{routed.waypoint.address4}:" in str(routed.node.endpoints(host("old"))), "its way")
        until(lambda: {code for code, _ in ask(routed, address="10.96.0.43")} == {200}, "its endpoint")
        for address, port in itertools.product(("10.96.0.43", "fd96::43"), (80, 90)):
            answers = ask(routed, 20, address=address, port=port)
            assert {code for code, _ in answers} == {200}, (address, port)
    finally:
        (routed.node.config / "old.yaml").unlink()


def test_who_connects_to_the_waypoint_by_himself_is_closed(routed: Mesh) -> None:
    port = status(routed)["instances"][0]["port"]
    code = f"""
import socket
with socket.create_connection(({routed.waypoint.address4!r}, {port}), 5) as s:
    s.settimeout(5)
    try:
        s.sendall(b"GET / HTTP/1.1\\r\\nhost: shop\\r\\n\\r\\n")
        print(s.recv(100))
    except ConnectionError as error:
        print(b"")
"""
    assert python(routed.client, code) == "b''"


def test_a_service_gains_and_loses_its_waypoint_without_a_failed_request(routed: Mesh) -> None:
    node = routed.node
    prober = probe(routed.client, SHOP4, 80)
    for _ in range(3):
        node.write("shop", text(shop(waypoint=None)))
        until(lambda: all(e.endswith(":8080") for e in node.endpoints(host("shop"))), "past the waypoint")
        node.write("shop", text(shop()))
        until_handed_over(routed)
    counted = finish(prober)
    assert counted["connections"] > 0
    assert counted["failed"] == 0, counted["errors"]


def test_an_envoy_that_is_killed_is_started_again_and_nothing_passes_by_meanwhile(routed: Mesh) -> None:
    before = status(routed)["instances"][0]
    os.kill(before["pid"], signal.SIGKILL)
    until(lambda: status(routed)["instances"][0]["restarts"] == before["restarts"] + 1, "started again")
    until(lambda: status(routed)["instances"][0]["ready"], "ready again")
    until_handed_over(routed)
    until(lambda: ask(routed, 5, "x-canary: yes") == {(200, "v2"): 5}, "served again")


def test_a_manager_that_is_there_before_the_loader_takes_nothing_back(routed: Mesh) -> None:
    """As after a start of all: connections come in as they did before it."""
    node, door = routed.node, routed.node.instance.enroll_socket
    prober, away = probe(routed.client, SHOP4, 80), door.with_name("away.sock")
    door.rename(away)
    try:
        node.kill("waypoint_mgr")
        node.until_ready()
        until(lambda: (status(routed)["scaling"] or {}).get("error"), "the front not to be served")
        time.sleep(1)  # an announcement that is taken back is followed within a tenth of this
        until_handed_over(routed)
    finally:
        away.rename(door)
    until(lambda: not status(routed)["scaling"]["error"], "the front to be served")
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]


def test_what_envoy_refuses_though_it_seemed_right_holds_up_nothing_else(routed: Mesh) -> None:
    """A point that is on no curve."""
    key = {"kty": "EC", "crv": "P-256", "alg": "ES256", "x": "AQAB", "y": "AQAB"}
    rule = {"issuer": "i", "jwks": json.dumps({"keys": [key]})}
    target = {"group": "", "kind": "Service", "name": "shop"}
    metadata = {"name": "jwt", "namespace": "shop"}
    wrong = {
        "apiVersion": "security.istio.io/v1",
        "kind": "RequestAuthentication",
        "metadata": metadata,
        "spec": {"targetRefs": [target], "jwtRules": [rule]},
    }
    routed.node.write("jwt", text(wrong))

    def told() -> str:
        return next(
            (one["message"] for one in status(routed)["authentications"] if one["status"] == "False"), ""
        )

    until(lambda: "no Envoy takes it" in told(), "it to be found")
    routed.node.write("route", text(route({"backendRefs": [{"name": "v2", "port": 80}]})))
    until(lambda: ask(routed, 20) == {(200, "v2"): 20}, "a route that came later")
    assert status(routed)["reduced"] == ""
    routed.node.write("jwt", "# gone\n")
    until(lambda: status(routed)["authentications"] == [], "all to be well again")


class KeySet(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(jwks().encode())

    def log_message(self, *_: object) -> None:
        pass


def test_keys_are_fetched_from_where_the_issuer_has_them(routed: Mesh) -> None:
    """No token is good before they are there, and all that are when they are gone again."""
    header = f"authorization: Bearer {token()}"
    with ThreadingHTTPServer(("127.0.0.1", 0), KeySet, bind_and_activate=False) as issuer:
        issuer.server_bind()
        place = f"http://127.0.0.1:{issuer.server_port}/keys"
        authentication = {
            "apiVersion": "security.istio.io/v1",
            "kind": "RequestAuthentication",
            "metadata": {"name": "jwt", "namespace": "shop"},
            "spec": {
                "targetRefs": [{"group": "", "kind": "Service", "name": "shop"}],
                "jwtRules": [{"issuer": ISSUER, "jwksUri": place}],
            },
        }
        routed.node.write("jwt", text(authentication))
        try:
            until(
                lambda: "All connection attempts failed" in str(status(routed)["authentications"]), "it told"
            )
            assert {code for code, _ in ask(routed, 5, header)} == {401}
            issuer.server_activate()
            thread = Thread(target=issuer.serve_forever)
            thread.start()
            until(lambda: {code for code, _ in ask(routed, 5, header)} == {200}, "the token taken")
            issuer.shutdown()
            thread.join()
        finally:
            routed.node.write("jwt", "# gone\n")
    assert {code for code, _ in ask(routed, 5)} == {200}


@pytest.mark.parametrize("process", ["waypoint_mgr", "map_writer", "bpf_loader", "xds_client", "nats"])
def test_killing_the_meshs_own_processes_costs_no_request(routed: Mesh, process: str) -> None:
    pid = status(routed)["instances"][0]["pid"]
    prober = probe(routed.client, SHOP4, 80)
    routed.node.kill(process)
    routed.node.until_ready()
    counted = finish(prober)
    assert counted["connections"] > 0
    assert counted["failed"] == 0, counted["errors"]
    assert status(routed)["instances"][0]["pid"] == pid, "the Envoy is the same"


def test_a_route_that_is_wrong_keeps_the_last_good_one_and_is_told(routed: Mesh) -> None:
    wrong = {"matches": [{"path": {"type": "RegularExpression", "value": "("}}], **SPLIT}
    routed.node.write("route", text(route(wrong)))
    told = until(lambda: conditions(routed, "Accepted", "False"), "the route refused")
    assert told[0]["reason"] == "UnsupportedValue"
    assert ask(routed, 20, "x-canary: yes") == {(200, "v2"): 20}
    routed.node.kill("waypoint_mgr")
    routed.node.until_ready()
    until(lambda: conditions(routed, "Accepted", "False"), "the route refused again")
    assert ask(routed, 20, "x-canary: yes") == {(200, "v2"): 20}


def test_a_headless_service_is_told_to_go_without(routed: Mesh) -> None:
    """Its pods are asked at their own addresses: neither its waypoint nor its policies meet anybody."""
    alone = service("alone", "None", app="web", ports={80: 8080})
    alone["metadata"]["labels"] = {"istio.io/use-waypoint": "wp"}
    policy = allow("nobody", target="alone")
    policy["metadata"]["name"] = "nobody"
    routed.node.write("alone", text(alone, policy))
    try:
        until(lambda: host("alone") in status(routed)["services_unguarded"], "it to be told")
        assert host("alone") not in status(routed)["services"]
        said = waypoint_status(routed)
        assert f"service {host('alone')} asks for it and goes without" in said
        assert f"! AuthorizationPolicy shop/nobody is not enforced: {BY_NONE}" in said
    finally:
        routed.node.write("alone", "# gone\n")


def test_a_backend_that_does_not_exist_is_500_and_told(routed: Mesh) -> None:
    routed.node.write("route", text(route({"backendRefs": [{"name": "nobody", "port": 80}]})))
    told = until(lambda: conditions(routed, "ResolvedRefs", "False"), "the backend missed")
    assert told[0]["reason"] == "BackendNotFound"
    until(lambda: {code for code, _ in ask(routed)} == {500}, "answered with 500")


def test_a_waypoint_that_is_deleted_ends_its_envoy_and_refuses_until_it_is_back(routed: Mesh) -> None:
    node, manager = routed.node, routed.node.pid_of("waypoint_mgr")
    cgroup = find_root() / f"pykmesh-{node.name}-waypoints"
    node.write("gateway", "# none\n")
    until(lambda: not list(cgroup.glob("*/")), "the Envoy and its cgroup gone")
    assert not node.endpoints(host("shop")), "no way to the service, and none past the waypoint"
    node.write("gateway", text(gateway()))
    until_handed_over(routed)
    until(lambda: ask(routed, 5, "x-canary: yes") == {(200, "v2"): 5}, "served again")
    assert node.pid_of("waypoint_mgr") == manager, "it went on all the while"


def allow(*accounts: str, target: str = "shop") -> Object:
    """Who may ask the service anything; nobody else may."""
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "allow", "namespace": "shop"},
        "spec": {
            "targetRefs": [{"kind": "Service", "name": target}],
            "rules": [{"from": [{"source": {"serviceAccounts": list(accounts)}}]}],
        },
    }


def test_a_policy_says_who_may_ask_by_the_account_of_his_pod(routed: Mesh) -> None:
    node = routed.node
    try:
        node.write("policy", text(allow("other")))
        until(lambda: {code for code, _ in ask(routed)} == {403}, "everybody else refused")
        node.write("policy", text(allow("other", "default")))
        until(lambda: {code for code, _ in ask(routed)} == {200}, "the client let in")
        node.write("policy", text(allow("other")).replace("serviceAccounts", "serviceAccount"))
        until(lambda: "unknown field `serviceAccount`" in waypoint_status(routed), "the error told")
        assert {code for code, _ in ask(routed, 5)} == {200}, "what was good counts on"
        instances = [one["pid"] for one in status(routed)["instances"]]
        node.kill("waypoint_mgr")  # the next one has no good one to go on with
        until(lambda: "unknown field `serviceAccount`" in waypoint_status(routed), "the error told again")
        assert {code for code, _ in ask(routed, 5)} == {200}, "the Envoys go on with what they have"
        node.write("policy", text(allow("other")))
        until(lambda: {code for code, _ in ask(routed)} == {403}, "refused again")
        assert [one["pid"] for one in status(routed)["instances"]] == instances
        for process in ("map_writer", "waypoint_mgr"):
            node.kill(process)
            node.until_ready()
            assert {code for code, _ in ask(routed, 20)} == {403}, f"{process} came back"
    finally:
        node.write("policy", "# none\n")
    until(lambda: {code for code, _ in ask(routed)} == {200}, "no policy, no refusal")


def test_filters_are_told_the_clients_name_if_the_gateway_says_so(routed: Mesh) -> None:
    """As nobody but the waypoint can write it."""
    node, header = routed.node, "x-forwarded-client-cert"

    def allow_named(account: str) -> Object:
        said = allow(account)
        value = f"URI=spiffe://cluster.local/ns/shop/sa/{account}"
        said["spec"]["rules"] = [{"when": [{"key": f"request.headers[{header}]", "values": [value]}]}]
        return said

    claim = f"{header}: URI=spiffe://cluster.local/ns/shop/sa/other"
    try:
        node.write("policy", text(allow_named("default")))
        until(lambda: {code for code, _ in ask(routed)} == {403}, "nobody named")
        node.write("gateway", text(gateway(forward_client_identity="true")))
        until(lambda: {code for code, _ in ask(routed)} == {200}, "the client named")
        assert {code for code, _ in ask(routed, 5, claim)} == {200}
        node.write("policy", text(allow_named("other")))
        until(lambda: {code for code, _ in ask(routed)} == {403}, "another let in")
        assert {code for code, _ in ask(routed, 5, claim)} == {403}
    finally:
        node.write("gateway", text(gateway()))
        node.write("policy", "# none\n")
    until(lambda: {code for code, _ in ask(routed)} == {200}, "no policy, no refusal")


def test_a_service_entry_goes_by_way_of_its_waypoint_and_is_routed_to_a_host(routed: Mesh) -> None:
    node, address = routed.node, "10.96.0.61"
    (endpoint,) = node.endpoints(host("v2"))
    entry = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": "api", "namespace": "shop", "labels": {"istio.io/use-waypoint": "wp"}},
        "spec": {
            "hosts": ["api.example"],
            "addresses": [address],
            "ports": [{"number": 80, "name": "web", "protocol": "HTTP", "targetPort": 8080}],
            "resolution": "STATIC",
            "endpoints": [{"address": endpoint.rpartition(":")[0]}],
        },
    }
    istio = {"group": "networking.istio.io"}
    backend = {**istio, "kind": "Hostname", "name": "api.example", "port": 80}
    rules = [
        {"matches": [{"headers": [{"name": "x-canary", "value": "yes"}]}], "backendRefs": [backend]},
        {"backendRefs": [{"name": "v1", "port": 80}]},
    ]
    route_of_entry = {
        **route(),
        "metadata": {"name": "api", "namespace": "shop"},
        "spec": {"parentRefs": [{**istio, "kind": "ServiceEntry", "name": "api"}], "rules": rules},
    }

    def is_served() -> bool:
        with contextlib.suppress(AssertionError):  # Envoy may not know it yet, and closes
            return ask(routed, 3, address=address) == {(200, "v1"): 3}
        return False

    try:
        node.write("entry", text(entry, route_of_entry))
        until(lambda: node.endpoints("shop/api.example"), "a way to it")
        until(is_served, "the route")
        assert ask(routed, 5, "x-canary: yes", address=address) == {(200, "v2"): 5}
    finally:
        node.write("entry", "# none\n")


def test_a_policy_that_nobody_enforces_is_told_with_the_reason(routed: Mesh) -> None:
    node = routed.node
    try:
        node.write("policy", text(allow("other", target="v1")))
        until(lambda: "no service that goes by way of one" in waypoint_status(routed), "told")
        assert "! AuthorizationPolicy shop/allow is not enforced" in waypoint_status(routed)
        node.write("policy", text(allow("other")))
        until(lambda: "  policy AuthorizationPolicy shop/allow" in waypoint_status(routed), "enforced")
        assert "not enforced" not in waypoint_status(routed)
    finally:
        node.write("policy", "# none\n")


def requests(mesh: Mesh, **labels: str) -> float:
    """How many Prometheus is told of."""
    port = mesh.node.status()["processes"]["telemetry"]["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = (one for family in families for one in family.samples if one.name == "istio_requests_total")
    return sum(one.value for one in samples if labels.items() <= one.labels.items())


def test_requests_are_counted_with_who_asked_whom(routed: Mesh) -> None:
    elsewhere = {"type": "RequestRedirect", "requestRedirect": {"statusCode": 307, "hostname": "x.test"}}
    asked = {"matches": [{"headers": [{"name": "x-away", "value": "yes"}]}], "filters": [elsewhere]}
    routed.node.write("route", text(route(asked, CANARY, SPLIT)))
    until(lambda: ask(routed, 1, "x-away: yes") == {(307, ""): 1}, "the redirect")
    ask(routed, 30, "x-away: yes")
    who = {"reporter": "waypoint", "source_canonical_service": "client", "destination_service_name": "shop"}
    until(lambda: requests(routed, **who, response_code="307") >= 31, "all counted")
    assert requests(routed, **who, response_code="307", request_protocol="http") == 31
    assert requests(routed, **who, response_code="307", destination_workload="unknown") == 31
    assert requests(routed, **who, response_code="200", destination_canonical_service="web") >= 20


def waypoint_status(mesh: Mesh) -> str:
    return str(mesh.node.cli("waypoint", "status", check=False).stdout)


def conditions(mesh: Mesh, kind: str, value: str) -> list[Any]:
    return [c for c in status(mesh)["routes"] if c["type"] == kind and c["status"] == value]


def test_uninstall_ends_the_envoys(tmp_path: Path) -> None:
    node = Node(tmp_path, subnet=13)
    try:
        with node.network as network:
            waypoint = network.add("waypoint", 11)
            node.write("gateway", text(gateway()))
            node.start("--waypoint-address", str(waypoint.address4), "--waypoint-netns", str(waypoint.netns))
            mesh = Mesh(node, waypoint, waypoint)
            until(lambda: status(mesh)["instances"][0]["ready"], "an instance")
            pid = status(mesh)["instances"][0]["pid"]
            node.cli("down")
            cgroup = find_root() / f"pykmesh-{node.name}-waypoints"
            assert str(pid) in "".join(path.read_text() for path in cgroup.glob("*/cgroup.procs")).split()
            node.cli("uninstall")
            assert not cgroup.exists(), "its processes have ended"
            assert not list(node.run_dir.glob("*"))
    finally:
        node.end()


ENCRYPTED = """
import http.server, ssl, sys
class Say(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "9"); self.end_headers()
        self.wfile.write(b"encrypted")
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("0.0.0.0", 8443), Say)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(sys.argv[1])
server.socket = context.wrap_socket(server.socket, server_side=True)
print("ready", flush=True); server.serve_forever()
"""


def test_endpoints_are_spoken_to_in_tls_as_a_destination_rule_says(routed: Mesh, tmp_path: Path) -> None:
    """Whoever answers has the certificate; while the file of roots is not there nobody is asked."""
    node, authority = routed.node, trustme.CA()
    roots, own = tmp_path / "roots.pem", tmp_path / "own.pem"
    authority.issue_cert("secure.example").private_key_and_cert_chain_pem.write_to_path(own)
    server = node.network.pods["v1"].spawn(
        sys.executable, "-c", ENCRYPTED, str(own), stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    secure = version("v1", "10.96.0.43")
    secure["metadata"]["name"] = "secure"
    secure["spec"]["ports"][0]["targetPort"] = 8443
    rule = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": {"name": "secure", "namespace": "shop"},
        "spec": {
            "host": "secure",
            "trafficPolicy": {
                "tls": {"mode": "SIMPLE", "caCertificates": str(roots), "sni": "secure.example"}
            },
        },
    }
    try:
        node.write("secure", text(secure, rule))
        node.write("route", text(route({"backendRefs": [{"name": "secure", "port": 80}]})))
        until(lambda: str(roots) in json.dumps(status(routed)["destinations"]), "the missing file told")
        until(lambda: {code for code, _ in ask(routed)} == {503}, "nobody asked")
        authority.cert_pem.write_to_path(roots)
        until(lambda: ask(routed, 5) == {(200, "encrypted"): 5}, "answers in TLS")
        trustme.CA().cert_pem.write_to_path(roots)
        until(lambda: {code for code, _ in ask(routed)} == {503}, "another root, which it is not of")
    finally:
        server.kill()
        (node.config / "secure.yaml").unlink()
