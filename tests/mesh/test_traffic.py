"""What an unmodified application in an enrolled pod sees."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from tests.mesh.conftest import VIP4, VIP6, Mesh, web_manifests
from tests.mesh.manifests import host, pod, service, text
from tests.mesh.node import python, until

ASK = """
import socket
s = socket.socket(socket.{family}, socket.SOCK_STREAM); s.settimeout(5)
s.connect(({address!r}, {port}))
s.sendall(b"GET / HTTP/1.1\\r\\nconnection: close\\r\\n\\r\\n")
data = b""
while part := s.recv(4096): data += part
"""
PEER = "print(s.getpeername()[:2])"
MANY = """
import collections, socket
found = collections.Counter()
for _ in range({count}):
    s = socket.create_connection(({address!r}, {port}), 5)
    s.sendall(b"GET / HTTP/1.1\\r\\nconnection: close\\r\\n\\r\\n")
    data = b""
    while part := s.recv(4096): data += part
    s.close()
    found[data.split()[-1].decode()] += 1
print(sorted(found))
"""
ERRNO = """
import socket
s = socket.socket(socket.{family}, socket.SOCK_STREAM); s.settimeout(1)
print(s.connect_ex(({address!r}, {port})))
"""
FAMILIES = [("AF_INET", VIP4), ("AF_INET6", VIP6), ("AF_INET6", f"::ffff:{VIP4}")]


def test_curl_reaches_an_endpoint(mesh: Mesh) -> None:
    result = mesh.client.run("curl", "-sS", "--max-time", "5", f"http://{VIP4}/")
    assert result.stdout.strip() in {"web-1", "web-2"}, result.stderr


@pytest.mark.parametrize("address", [VIP4, VIP6])
def test_connections_go_to_every_endpoint(mesh: Mesh, address: str) -> None:
    assert python(mesh.client, MANY.format(address=address, port=80, count=40)) == "['web-1', 'web-2']"


@pytest.mark.parametrize(("family", "address"), FAMILIES)
def test_the_application_sees_the_service_as_its_peer(mesh: Mesh, family: str, address: str) -> None:
    code = ASK.format(family=family, address=address, port=80) + PEER
    assert python(mesh.client, code) == str((address, 80))


@pytest.mark.parametrize(("family", "address"), FAMILIES)
def test_a_port_that_the_service_does_not_have_is_refused_at_once(
    mesh: Mesh, family: str, address: str
) -> None:
    assert python(mesh.client, ERRNO.format(family=family, address=address, port=81)) == str(
        errno.ECONNREFUSED
    )


@pytest.mark.parametrize(("family", "address"), [("AF_INET", "10.96.0.99"), ("AF_INET6", "fd96::99")])
def test_a_service_without_endpoints_is_refused_at_once(mesh: Mesh, family: str, address: str) -> None:
    mesh.node.write("empty", text(service("empty", "10.96.0.99", "fd96::99", app="nobody", ports={80: 8080})))
    until(
        lambda: host("empty") in mesh.node.cli("get", "services", "--from", "bpf", "-o", "json").stdout,
        "in the maps",
    )
    assert python(mesh.client, ERRNO.format(family=family, address=address, port=80)) == str(
        errno.ECONNREFUSED
    )


def test_an_address_that_is_no_service_is_left_alone(mesh: Mesh) -> None:
    direct = str(mesh.web[0].address4)
    code = ASK.format(family="AF_INET", address=direct, port=8080) + PEER
    assert python(mesh.client, code) == str((direct, 8080))


def test_a_pod_that_is_not_enrolled_is_not_served(mesh: Mesh) -> None:
    assert python(mesh.stranger, ERRNO.format(family="AF_INET", address=VIP4, port=80)) != "0"


@pytest.mark.parametrize(("family", "address"), FAMILIES)
@pytest.mark.parametrize("connected", [True, False])
def test_datagrams_come_back_from_the_service(mesh: Mesh, family: str, address: str, connected: bool) -> None:
    send = (
        f"s.connect(({address!r}, 9090)); s.send(b'hello')"
        if connected
        else f"s.sendto(b'hello', ({address!r}, 9090))"
    )
    code = f"import socket\ns = socket.socket(socket.{family}, socket.SOCK_DGRAM); s.settimeout(5)\n{send}\n"
    code += "data, who = s.recvfrom(100)\nprint(data.split()[1].decode(), who[:2])"
    assert python(mesh.client, code) == f"hello {(address, 9090)}"


def test_a_datagram_socket_keeps_its_endpoint(mesh: Mesh) -> None:
    code = f"""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
found = set()
for _ in range(20):
    s.sendto(b"x", ({VIP4!r}, 9090)); found.add(s.recv(100).split()[0])
print(len(found))"""
    assert python(mesh.client, code) == "1"


STAY = """
import socket
sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(40)]
def ask():
    found = {{}}
    for n, s in enumerate(sockets):
        s.settimeout(0.2); s.sendto(b"x", ({address!r}, 7))
    for n, s in enumerate(sockets):
        try: found[n] = s.recv(100).split()[0]
        except TimeoutError: pass
    return found
before = ask()
print("asked", flush=True)
input()
after = ask()
print(len(before) > 9, len(set(before.values())), [n for n in before if before[n] != after.get(n)])
"""


def test_datagram_sockets_keep_their_endpoints_when_another_one_goes(mesh: Mesh) -> None:
    address, silent = "10.96.0.32", pod("a-silent-one", "10.9.9.9", app="stay")
    staying = [pod(f"stay-{n}", str(w.address4), app="stay") for n, w in enumerate(mesh.web)]
    kept = service("stay", address, app="stay", ports={7: 9090})
    endpoints = {f"{w.address4}:9090" for w in mesh.web}
    mesh.node.write("stay", text(kept, silent, *staying))
    mesh.node.until_endpoints(host("stay"), endpoints | {"10.9.9.9:9090"})
    client = mesh.client.spawn(
        sys.executable, "-c", STAY.format(address=address),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert client.stdout is not None
    assert client.stdout.readline() == "asked\n"
    mesh.node.write("stay", text(kept, *staying))
    mesh.node.until_endpoints(host("stay"), endpoints)
    assert client.communicate("\n", timeout=30)[0] == "True 2 []\n"


def test_a_datagram_of_a_family_that_no_endpoint_has_is_refused_and_shown_so(mesh: Mesh) -> None:
    four = pod("four", str(mesh.web[0].address4), app="four")
    mesh.node.write(
        "four", text(service("four", "10.96.0.33", "fd96::33", app="four", ports={7: 9090}), four)
    )
    mesh.node.until_endpoints(host("four"), {f"{mesh.web[0].address4}:9090"})
    code = "import socket\ns = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)\n"
    code += "try: s.sendto(b'x', ('fd96::33', 7))\nexcept OSError as e: print(e.errno)"
    assert python(mesh.client, code) == str(errno.ECONNREFUSED)
    told = mesh.node.cli("observe", "--verdict", "refused", "--last", "1").stdout
    assert "-> four.shop:7  UDP refused family" in told


def test_a_datagram_socket_may_speak_with_two_services(mesh: Mesh) -> None:
    other = "10.96.0.31"
    addresses = [str(w.address4) for w in mesh.web]
    mesh.node.write("echo", text(service("echo", other, app="web", ports={7: 9090})))
    mesh.node.until_endpoints(host("echo"), {f"{a}:9090" for a in addresses})
    code = f"""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
found = []
for to in [({VIP4!r}, 9090), ({other!r}, 7)] * 3:
    s.sendto(b"x", to); found.append(s.recvfrom(100)[1] == to)
print(found)"""
    assert python(mesh.client, code) == str([True] * 6)


def test_a_datagram_to_a_service_without_endpoints_is_refused(mesh: Mesh) -> None:
    mesh.node.write("empty", text(service("empty", "10.96.0.99", "fd96::99", app="nobody", ports={80: 8080})))
    until(
        lambda: host("empty") in mesh.node.cli("get", "services", "--from", "bpf", "-o", "json").stdout,
        "in the maps",
    )
    code = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    code += "try: s.sendto(b'x', ('10.96.0.99', 80))\nexcept OSError as e: print(e.errno)"
    assert python(mesh.client, code) == str(errno.ECONNREFUSED)


def test_a_headless_service_leaves_its_pods_addresses_alone(mesh: Mesh) -> None:
    mesh.node.write("headless", text(service("headless", "None", app="web", ports={80: 8080})))
    until(lambda: host("headless") in mesh.node.cli("get", "services", "-o", "json").stdout, "known")
    direct = str(mesh.web[1].address4)
    code = ASK.format(family="AF_INET", address=direct, port=8080) + PEER
    assert python(mesh.client, code) == str((direct, 8080))


def test_a_named_target_port_is_each_endpoints_own(mesh: Mesh) -> None:
    first, second = (str(w.address4) for w in mesh.web)
    mesh.node.write(
        "named",
        text(
            service("named", "10.96.0.40", app="named", ports={80: "http"}),
            pod("named-1", first, app="named", ports={"http": 8080}),
            pod("named-2", second, app="named", ports={"http": 8081}),
        ),
    )
    mesh.node.until_endpoints(host("named"), {f"{first}:8080", f"{second}:8081"})
    assert python(mesh.client, MANY.format(address="10.96.0.40", port=80, count=30)) == "['web-1', 'web-2']"


def test_an_endpoint_that_is_removed_gets_nothing_more(mesh: Mesh) -> None:
    everyone = {f"{w.address4}:8080" for w in mesh.web} | {f"{w.address6}:8080" for w in mesh.web}
    mesh.node.write("web", web_manifests(mesh.web[0]))
    try:
        mesh.node.until_endpoints(
            host("web"), {f"{mesh.web[0].address4}:8080", f"{mesh.web[0].address6}:8080"}, 80
        )
        assert python(mesh.client, MANY.format(address=VIP4, port=80, count=30)) == "['web-1']"
    finally:
        mesh.node.write("web", web_manifests(*mesh.web))
        mesh.node.until_endpoints(host("web"), everyone, 80)


def test_a_service_that_is_removed_is_an_address_like_any_other(mesh: Mesh) -> None:
    mesh.node.write("gone", text(service("gone", "10.96.0.50", app="web", ports={80: 8080})))
    mesh.node.until_endpoints(host("gone"), {f"{w.address4}:8080" for w in mesh.web})
    (mesh.node.config / "gone.yaml").unlink()
    mesh.node.until_endpoints(host("gone"), set())
    assert "10.96.0.50" not in mesh.node.cli("get", "services", "--from", "bpf", "-o", "json").stdout


def test_an_address_reused_in_one_push_serves_its_new_owner_only(mesh: Mesh) -> None:
    reused = str(mesh.web[0].address4)
    services = [service(n, f"10.96.0.{i}", app=n, ports={80: 8080}) for n, i in (("old", 61), ("new", 62))]
    mesh.node.write("reuse", text(*services, pod("owner-1", reused, app="old")))
    mesh.node.until_endpoints(host("old"), {f"{reused}:8080"})
    mesh.node.write("reuse", text(*services, pod("owner-2", reused, app="new")))
    mesh.node.until_endpoints(host("new"), {f"{reused}:8080"})
    assert mesh.node.endpoints(host("old")) == set()
    assert python(mesh.client, ERRNO.format(family="AF_INET", address="10.96.0.61", port=80)) == str(
        errno.ECONNREFUSED
    )


def test_a_service_whose_address_is_anothers_says_so(mesh: Mesh) -> None:
    first, second = (
        service(name, "10.96.0.55", app="web", ports={80: 8080}) for name in ("double-a", "double-b")
    )
    mesh.node.write("double", text(first, second))
    mesh.node.until_endpoints(host("double-a"), {f"{w.address4}:8080" for w in mesh.web})
    said = {e["name"]: e["refused"] for e in mesh.node.json("get", "services", "--from", "state")["services"]}
    assert said[host("double-a")] == ""
    assert said[host("double-b")] == f"10.96.0.55 is that of {host('double-a')}"


def test_an_unhealthy_endpoint_gets_nothing(mesh: Mesh) -> None:
    first, second = (str(w.address4) for w in mesh.web)
    mesh.node.write(
        "sick",
        text(
            service("sick", "10.96.0.70", app="sick", ports={80: 8080}),
            pod("sick-1", first, app="sick", ready=False),
            pod("sick-2", second, app="sick"),
        ),
    )
    mesh.node.until_endpoints(host("sick"), {f"{second}:8080"})
