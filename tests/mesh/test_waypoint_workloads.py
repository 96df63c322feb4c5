"""What is meant for a pod's own address goes by way of its waypoint: whatever port, and never past it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.mesh.manifests import Object, pod, text
from tests.mesh.node import finish, probe, python, serve, until
from tests.mesh.waypoints import Mesh, ask, gateway, status, waypoint_mesh

PASSING = 9191
CONNECT = """
import socket
try:
    socket.create_connection(({address!r}, {port}), 5)
except OSError as error:
    print(type(error).__name__)
"""
DENIED: Object = {
    "apiVersion": "security.istio.io/v1",
    "kind": "AuthorizationPolicy",
    "metadata": {"name": "no", "namespace": "shop"},
    "spec": {
        "targetRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "wp"}],
        "action": "DENY",
        "rules": [
            {
                "when": [{"key": "request.headers[x-no]", "values": ["no"]}],
                "to": [{"operation": {"ports": ["8080"]}}],
            },
            {"to": [{"operation": {"ports": ["9192"]}}]},
        ],
    },
}


class Pods(NamedTuple):
    mesh: Mesh
    address4: str
    address6: str


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    with waypoint_mesh(tmp_path_factory.mktemp("ww"), 19) as mesh:
        v1 = mesh.node.network.pods["v1"]
        for port in (PASSING, 9192, 90):
            serve(v1, "--http", str(port))
        own = pod("v1", str(v1.address4), str(v1.address6), app="web")
        own["metadata"]["labels"] |= {"version": "v1", "istio.io/use-waypoint": "wp"}
        client = pod("client", str(mesh.client.address4), str(mesh.client.address6), app="client")
        for_all = gateway()
        for_all["metadata"]["labels"] = {"istio.io/waypoint-for": "all"}
        mesh.node.write("gateway", text(for_all))
        of_host = pod("of-host", "10.244.77.7", app="of-host")
        of_host["spec"]["hostNetwork"] = True
        of_host["metadata"]["labels"]["istio.io/use-waypoint"] = "wp"
        mesh.node.write("pods", text(client, own, of_host))
        mesh.node.write("denied", text(DENIED))
        found = Pods(mesh, str(v1.address4), str(v1.address6))
        until(lambda: is_guarded(found), "the pod to go by way of it, and the policy enforced")
        yield found


def is_guarded(pods: Pods) -> bool:
    """A Gateway that was not for workloads a moment ago closes the first connections."""
    with contextlib.suppress(AssertionError):
        return code(pods, 8080, "x-no: no") == {403}
    return False


def code(pods: Pods, port: int, header: str = "") -> set[int]:
    return {status for status, _ in ask(pods.mesh, 1, header, address=pods.address4, port=port)}


def test_requests_at_a_services_port_are_asked_about(pods: Pods) -> None:
    for address in (pods.address4, pods.address6):
        assert ask(pods.mesh, 3, address=address, port=8080) == {(200, "v1"): 3}
        assert {code for code, _ in ask(pods.mesh, 1, "x-no: no", address=address, port=8080)} == {403}


@pytest.mark.parametrize("port", [PASSING, 90], ids=["of no chain", "of a service elsewhere"])
def test_any_other_port_is_passed_to_as_it_is(pods: Pods, port: int) -> None:
    for address in (pods.address4, pods.address6):
        assert ask(pods.mesh, 3, "x-no: no", address=address, port=port) == {(200, "v1"): 3}


def test_a_policy_about_a_port_of_no_service_is_enforced(pods: Pods) -> None:
    assert code(pods, 9192) == {0}


def test_the_service_is_not_concerned(pods: Pods) -> None:
    """Its own label says by way of what it goes."""
    assert ask(pods.mesh, 3, "x-no: no", address="10.96.0.41") == {(200, "v1"): 3}


def test_whose_address_is_not_his_own_is_told(pods: Pods) -> None:
    found = status(pods.mesh)
    assert [uid.rpartition("/")[2] for uid in found["workloads"]] == ["v1"]
    assert [uid.rpartition("/")[2] for uid in found["workloads_unguarded"]] == ["of-host"]
    assert (
        "of-host asks for it and goes without" in pods.mesh.node.cli("waypoint", "status", check=False).stdout
    )


def test_without_its_gateway_it_is_refused_and_not_let_past(pods: Pods) -> None:
    node = pods.mesh.node
    for_all = (node.config / "gateway.yaml").read_text()
    node.write("gateway", "# gone\n")
    refused = CONNECT.format(address=pods.address4, port=8080)
    until(lambda: python(pods.mesh.client, refused) == "ConnectionRefusedError", "refused")
    node.write("gateway", for_all)
    until(lambda: is_guarded(pods), "the Gateway to be back")
    until(lambda: len(status(pods.mesh)["instances"]) == 1, "the instance of before to be gone")


def test_without_an_instance_it_is_refused_and_not_let_past(pods: Pods) -> None:
    manager, (instance,) = pods.mesh.node.pid_of("waypoint_mgr"), status(pods.mesh)["instances"]
    os.kill(manager, signal.SIGSTOP)
    try:
        os.kill(instance["pid"], signal.SIGKILL)
        said = python(pods.mesh.client, CONNECT.format(address=pods.address4, port=8080))
        assert said in ("TimeoutError", "ConnectionRefusedError"), "it waits for one, which does not come"
    finally:
        os.kill(manager, signal.SIGCONT)
    until(lambda: code(pods, 8080) == {200}, "it served again")


ECHO = """
import socket
with socket.socket({family}, socket.SOCK_DGRAM) as s:
    s.bind(("", 9193))
    print("ready", flush=True)
    data, client = s.recvfrom(10)
    s.{act}
"""
SEND = """
import socket
with socket.socket({family}, socket.SOCK_DGRAM) as s:
    s.settimeout(5)
    s.{act}
    print(s.recvfrom(10)[0].decode())
"""


@pytest.mark.parametrize("answers", ['sendto(b"answer", client)', 'connect(client) or s.send(b"answer")'])
@pytest.mark.parametrize("which", ["address4", "address6"])
def test_datagrams_reach_the_pod_and_their_answers_come_back(pods: Pods, answers: str, which: str) -> None:
    """In both directions: the client of an enrolled server has the waypoint, and then the server."""
    family = "socket.AF_INET" if which == "address4" else "socket.AF_INET6"
    client, v1 = pods.mesh.client, pods.mesh.node.network.pods["v1"]
    for asking, asked in ((v1, client), (client, v1)):
        server = (sys.executable, "-c", ECHO.format(family=family, act=answers))
        with asked.spawn(*server, stdout=subprocess.PIPE, text=True) as echo:
            assert echo.stdout
            assert echo.stdout.readline() == "ready\n"
            act = f'sendto(b"x", ("{getattr(asked, which)}", 9193))'
            assert python(asking, SEND.format(family=family, act=act)) == "answer"


def test_explain_shows_the_way(pods: Pods) -> None:
    said = pods.mesh.node.cli("explain", str(pods.mesh.client.address4), f"{pods.address4}:{PASSING}").stdout
    assert "waypoint" in said
    assert str(pods.mesh.waypoint.address4) in said


def test_a_pod_gains_and_loses_its_waypoint_without_a_failed_request(pods: Pods) -> None:
    node = pods.mesh.node
    with_waypoint = (node.config / "pods.yaml").read_text()
    prober = probe(pods.mesh.client, pods.address4, 8080)
    for _ in range(3):
        node.write("pods", with_waypoint.replace("istio.io/use-waypoint: wp", "other: label"))
        until(lambda: not status(pods.mesh)["workloads"], "past the waypoint")
        node.write("pods", with_waypoint)
        until(lambda: code(pods, 8080, "x-no: no") == {403}, "by way of it again")
    counted = finish(prober)
    assert counted["connections"] > 0
    assert counted["failed"] == 0, counted["errors"]
