"""Tenants with waypoints of their own: for a service, for a namespace, and one that namespaces share.

What happens to one tenant's waypoint, by its configuration, its load or its death, is nobody else's business.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pykmesh.kernel.layout import Reason
from tests.mesh.manifests import Object, pod, service, text
from tests.mesh.node import Node, finish, probe, python, serve, until
from tests.mesh.waypoints import Mesh

# namespace -> (address of its service, the waypoint that it names: name and namespace)
TENANTS = {
    "one": ("10.96.1.1", ("own", "one")),
    "two": ("10.96.1.2", ("whole", "two")),
    "three-a": ("10.96.1.3", ("shared", "three")),
    "three-b": ("10.96.1.4", ("shared", "three")),
    "stranger": ("10.96.1.5", ("shared", "three")),
}
SERVED = ("one", "two", "three-a", "three-b")
GET = """
import json, socket
try:
    with socket.create_connection(({address!r}, 80), 5) as s:
        s.sendall(b"GET / HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n")
        head, _, body = s.makefile("rb").read().partition(b"\\r\\n\\r\\n")
    print(json.dumps([int(head.split()[1]), body.decode().strip()]))
except OSError as error:
    print(json.dumps(type(error).__name__))
"""
LOAD = """
import socket, sys, threading
def work():
    while True:
        try:
            with socket.create_connection((sys.argv[1], 80), 2) as s:
                s.sendall(b"GET / HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n")
                while s.recv(4096): pass
        except OSError:
            pass
for _ in range(16): threading.Thread(target=work, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


def gateway(name: str, namespace: str, **spec: Any) -> Object:
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"gatewayClassName": "pykmesh-waypoint", **spec},
    }


def shared() -> Object:
    """Let in: the namespaces of the tenant "three"."""
    chosen = {"from": "Selector", "selector": {"matchLabels": {"tenant": "three"}}}
    listener = {"name": "mesh", "port": 15008, "protocol": "HBONE", "allowedRoutes": {"namespaces": chosen}}
    return gateway("shared", "three", listeners=[listener])


def namespace(name: str) -> Object:
    waypoint, where = TENANTS[name][1]
    labels = {"tenant": name.partition("-")[0]}
    if name != "one":  # whose service says it itself
        labels |= {"istio.io/use-waypoint": waypoint, "istio.io/use-waypoint-namespace": where}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def web(name: str) -> Object:
    found = service("web", TENANTS[name][0], app="web", ports={80: 8080})
    found["metadata"]["namespace"] = name
    found["metadata"]["labels"] = {"istio.io/use-waypoint": "own"} if name == "one" else {}
    found["spec"]["ports"][0]["name"] = "http"
    return found


def failing_route(name: str) -> Object:
    """Of a tenant that has got its configuration wrong: every request is answered with 500."""
    backend = {"name": "nobody", "port": 80}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "web", "namespace": name},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "web"}],
            "rules": [{"backendRefs": [backend]}],
        },
    }


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    node = Node(tmp_path_factory.mktemp("wt"), subnet=15)
    try:
        with node.network as network:
            client, waypoint = network.add("client", 10), network.add("waypoint", 11)
            known = [pod("client", str(client.address4), app="client")]
            for number, name in enumerate(TENANTS):
                each = network.add(name, 20 + number)
                serve(each, "--http", "8080")
                found = pod("web", str(each.address4), app="web")
                found["metadata"]["namespace"] = name
                known.append(found)
            node.write("pods", text(*known))
            node.write("namespaces", text(*map(namespace, TENANTS)))
            node.write("gateways", text(gateway("own", "one"), gateway("whole", "two"), shared()))
            node.write("web", text(*map(web, TENANTS)))
            node.write("route", "# none yet\n")
            address = ("--waypoint-address", str(waypoint.address4), "--waypoint-netns", str(waypoint.netns))
            node.start(*address)
            node.enroll(client)
            found_mesh = Mesh(node, client, waypoint)
            for name in SERVED:
                until(lambda name=name: get(found_mesh, name) == (200, name), f"{name} to be served")
            yield found_mesh
    finally:
        node.end()


@pytest.fixture
def calm(mesh: Mesh) -> Mesh:
    mesh.node.write("route", "# none\n")
    for name in SERVED:
        until(lambda name=name: get(mesh, name) == (200, name), f"{name} to be served")
    return mesh


def get(mesh: Mesh, tenant: str) -> Any:
    """Status and body; an error's name where there is no answer."""
    found = json.loads(python(mesh.client, GET.format(address=TENANTS[tenant][0])))
    return found if isinstance(found, str) else tuple(found)


def waypoints(mesh: Mesh) -> dict[str, Any]:
    found = mesh.node.status()["processes"]["waypoint_mgr"]["waypoints"]
    return {one["name"]: one for one in found}


def own(mesh: Mesh) -> Any:
    """The one instance of the first tenant's."""
    return waypoints(mesh)["one/own"]["instances"][0]


def counted(mesh: Mesh, tenants: tuple[str, ...], meanwhile: Any) -> None:
    """No request of these tenants fails while something happens."""
    probers = {name: probe(mesh.client, TENANTS[name][0], 80) for name in tenants}
    meanwhile()
    for name, prober in probers.items():
        found = finish(prober)
        assert found["connections"] > 20, name
        assert found["failed"] == 0, (name, found["errors"])


def test_each_goes_by_way_of_its_own(calm: Mesh) -> None:
    found = waypoints(calm)
    services = {name: [s.partition("/")[0] for s in one["services"]] for name, one in found.items()}
    assert services == {
        "one/own": ["one"],
        "two/whole": ["two"],
        "three/shared": ["three-a", "three-b"],
    }
    assert len({one["scaling"]["front"] for one in found.values()}) == 3
    assert len({one["instances"][0]["pid"] for one in found.values()}) == 3


def test_who_is_not_let_in_is_refused_and_told(calm: Mesh) -> None:
    assert get(calm, "stranger") == "ConnectionRefusedError"
    explained = calm.node.cli("explain", "-", f"{TENANTS['stranger'][0]}:80", check=False)
    assert explained.stdout.splitlines()[-1] == f"refused: {Reason.WAYPOINT_UNAVAILABLE.label}"
    told = calm.node.cli("waypoint", "status", "three/shared", check=False)
    assert told.returncode == 1
    assert (
        "namespace stranger asks for it, and no listener lets it in (allowedRoutes): refused" in told.stdout
    )
    assert calm.node.cli("waypoint", "status", "one/own").returncode == 0


def test_the_death_of_one_tenants_waypoint_is_felt_by_no_other(calm: Mesh) -> None:
    def kill() -> None:
        for _ in range(3):
            victim = own(calm)
            os.kill(victim["pid"], signal.SIGKILL)
            until(
                lambda v=victim: waypoints(calm)["one/own"]["instances"][0]["restarts"] > v["restarts"],
                "ended",
            )
            until(lambda: waypoints(calm)["one/own"]["instances"][0]["ready"], "back")

    counted(calm, ("two", "three-a"), kill)


def test_the_load_of_one_tenant_reaches_no_other(calm: Mesh) -> None:
    """And makes its own waypoint larger, not theirs."""
    command = (sys.executable, "-S", "-c", LOAD, TENANTS["two"][0])
    load = calm.client.spawn(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert load.stdout is not None
    assert load.stdout.readline() == "ready\n"

    def overload() -> None:
        until(lambda: waypoints(calm)["two/whole"]["scaling"]["connections"], "load")
        time.sleep(3)

    try:
        counted(calm, ("one", "three-b"), overload)
    finally:
        load.kill()
        load.communicate()
    assert waypoints(calm)["one/own"]["scaling"]["size"] == 1


def test_what_one_tenant_configures_is_its_own_business(calm: Mesh) -> None:
    def misconfigure() -> None:
        calm.node.write("route", text(failing_route("three-a")))
        until(lambda: get(calm, "three-a")[0] == 500, "the tenant's own answer")

    counted(calm, ("one", "two", "three-b"), misconfigure)


def test_a_broken_file_of_one_tenant_keeps_nobody_back_also_when_all_is_read_anew(calm: Mesh) -> None:
    node = calm.node
    node.write("three", text(failing_route("three-a")))
    until(lambda: get(calm, "three-a")[0] == 500, "the tenant's own route")
    node.write("three", "{")
    node.kill("waypoint_mgr")
    node.until_ready()
    node.write("route", text(failing_route("two")))
    until(lambda: get(calm, "two")[0] == 500, "a route that another wrote later")
    assert get(calm, "three-a")[0] == 500, "as it last was"
    node.write("three", "# none\n")
    until(lambda: get(calm, "three-a") == (200, "three-a"), "the file to be read")


def test_what_no_envoy_takes_of_a_guest_leaves_the_other_guests_guarded(calm: Mesh) -> None:
    """A key whose point is on no curve."""
    key = {"kty": "EC", "crv": "P-256", "alg": "ES256", "x": "AQAB", "y": "AQAB"}

    def target(name: str, kind: str, spec: dict[str, Any]) -> Object:
        to_web = {"group": "", "kind": "Service", "name": "web"}
        metadata = {"name": "guard", "namespace": name}
        spec = {"targetRefs": [to_web], **spec}
        return {"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec}

    def told() -> list[str]:
        return [one["message"] for one in waypoints(calm)["three/shared"]["authentications"]]

    rule = {"issuer": "i", "jwks": json.dumps({"keys": [key]})}
    deny = target("three-b", "AuthorizationPolicy", {"action": "DENY", "rules": [{}]})
    wrong = target("three-a", "RequestAuthentication", {"jwtRules": [rule]})
    calm.node.write("three", text(wrong))
    until(lambda: any("no Envoy takes it" in one for one in told()), "it to be found")
    calm.node.write("guard", text(deny))
    until(lambda: get(calm, "three-b")[0] == 403, "a policy that came later")
    assert get(calm, "three-a") == (200, "three-a"), "a request without a token"
    calm.node.write("three", "# none\n")
    until(lambda: told() == [], "all to be well again")
    assert get(calm, "three-b")[0] == 403
    calm.node.write("guard", "# none\n")
