"""Connections to a service with a waypoint: where they go, what the waypoint is told, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from pykmesh.contracts.enrollment import Action, ask_for_cgroup
from pykmesh.contracts.handoff import NO_SERVICE_SECRET, NOBODY, Identity, told_address
from pykmesh.demo.pods import Pod
from pykmesh.kernel import pins
from pykmesh.kernel.layout import HandoffPrefix, Reason
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import HANDOFF_KEY, HANDOFF_VALUE, IDENTITY_VALUE, ip_from_text
from tests.mesh.manifests import Object, host, pod, service, text
from tests.mesh.node import Node, python, serve, service_secret_of, until

VIP4, VIP6 = "10.96.0.10", "fd96::10"
PORT = 15400
HEAR = """
import socket
with socket.create_connection(({address!r}, {port}), 5, ("", {own_port})) as s:
    s.settimeout(5)
    print(s.recv(100).decode(), s.getpeername()[0], s.getpeername()[1], sep="|")
"""
CONNECT = """
import socket
try:
    socket.create_connection(("10.96.0.10", 80), 5)
except OSError as error:
    print(type(error).__name__)
"""
SEND = """
import socket
s = socket.socket({family}, socket.SOCK_DGRAM)
try:
    {act}
except OSError as error:
    print(type(error).__name__)
"""


class Mesh(NamedTuple):
    node: Node
    client: Pod
    web: Pod
    waypoint: Pod
    listener: subprocess.Popen[str]


def waypoint_service(*instances: Pod, families: tuple[str, ...] = ("IPv4", "IPv6")) -> list[Object]:
    """The waypoint's own service and its instances, as waypoint_mgr writes them."""
    name = "wp"
    found: list[Object] = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": name,
                "namespace": "shop",
                "labels": {"gateway.networking.k8s.io/gateway-name": name},
            },
            "spec": {
                "ipFamilyPolicy": "PreferDualStack",
                "ports": [{"name": "handoff", "port": 15019}],
            },
        }
    ]
    for instance in instances:
        for family in families:
            address = instance.address4 if family == "IPv4" else instance.address6
            found.append(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": f"{name}-{instance.name}-{family.lower()}",
                        "namespace": "shop",
                        "labels": {"kubernetes.io/service-name": name},
                    },
                    "addressType": family,
                    "endpoints": [{"addresses": [address]}],
                    "ports": [{"name": "handoff", "port": PORT}],
                }
            )
    return found


def web(*, waypoint: str | None) -> Object:
    found = service("web", VIP4, VIP6, app="web", ports={80: 8080})
    if waypoint:
        found["metadata"]["labels"] = {"istio.io/use-waypoint": waypoint}
    return found


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with served(Node(tmp_path_factory.mktemp("handoff"), subnet=9)) as found:
        yield found


@contextmanager
def served(node: Node, *options: str) -> Iterator[Mesh]:
    try:
        with node.network as network:
            pods = [network.add(name, 10 + n) for n, name in enumerate(("c", "web", "wp"))]
            found = Mesh(node, *pods, listen(pods[-1]))
            serve(found.web, "--http", "8080")
            node.write("pods", text(*map(client_pod, (found.client, found.web))))
            node.write("waypoint", text(*waypoint_service(found.waypoint)))
            node.write("web", text(web(waypoint="wp")))
            node.start(*options)
            node.enroll(found.client)
            ask_for_cgroup(node.instance.enroll_socket, Action.ENROLL_WAYPOINT, found.waypoint.cgroup, None)
            yield found
    finally:
        node.end()


def listen(waypoint: Pod) -> subprocess.Popen[str]:
    """One that accepts and says what it is told."""
    command = (sys.executable, "-m", "tests.mesh.waypoint_server", str(PORT))
    listener = waypoint.spawn(*command, stdout=subprocess.PIPE, text=True)
    assert listener.stdout is not None
    assert listener.stdout.readline() == "ready\n"
    return listener


@pytest.fixture
def handed_over(mesh: Mesh) -> Mesh:
    mesh.node.write("waypoint", text(*waypoint_service(mesh.waypoint)))
    mesh.node.write("web", text(web(waypoint="wp")))
    until_handed_over(mesh)
    return mesh


def until_handed_over(mesh: Mesh) -> None:
    expected = {f"{address}:{PORT}" for address in (mesh.waypoint.address4, mesh.waypoint.address6)}
    mesh.node.until_endpoints(host("web"), expected)
    until(lambda: client_of(mesh) != NOBODY, "the client to be known")


def client_of(mesh: Mesh) -> Identity:
    """Who the mesh's only enrolled pod is, as the programs read it."""
    with PinnedMap(pins.maps_dir(mesh.node.pin_dir), "identities") as identities:
        values = [value for _, value in identities.items()]
    return Identity(*IDENTITY_VALUE.unpack(values[0])[1:]) if values else NOBODY


def told(mesh: Mesh, vip: str) -> str:
    client = client_of(mesh)
    assert client != NOBODY
    return told_address(ip_from_text(vip), service_secret_of(mesh.node), client)


def hear(mesh: Mesh, address: str = VIP4) -> str:
    """What the waypoint says that it was told."""
    return python(mesh.client, HEAR.format(address=address, port=80, own_port=0)).partition(" ")[0]


@pytest.mark.parametrize(
    ("asked", "vip"),
    [(VIP4, VIP4), (VIP6, VIP6), (f"::ffff:{VIP4}", VIP4)],
    ids=["IPv4", "IPv6", "IPv4-mapped"],
)
def test_the_waypoint_is_told_what_was_asked_for_and_who_asks_before_a_byte_is_sent(
    handed_over: Mesh, asked: str, vip: str
) -> None:
    heard = python(handed_over.client, HEAR.format(address=asked, port=80, own_port=0))
    assert heard == f"{told(handed_over, vip)} 80|{asked}|80"


def test_who_asks_follows_what_is_said_of_the_pod_at_its_address(handed_over: Mesh) -> None:
    node, client = handed_over.node, handed_over.client
    known, nobody = told(handed_over, VIP4), told_address(ip_from_text(VIP4), NO_SERVICE_SECRET)
    other = pod("other", str(client.address4), app="other")
    other["spec"]["serviceAccountName"] = "other"

    def say(*pods: Object, expected: Callable[[str], bool]) -> None:
        node.write("pods", text(*pods, client_pod(handed_over.web)))
        until(lambda: expected(hear(handed_over)), f"{len(pods)} pods")

    say(other, expected=lambda heard: heard not in (known, nobody))
    say(other, client_pod(client), expected=nobody.__eq__)
    say(expected=nobody.__eq__)
    say(client_pod(client), expected=known.__eq__)


def client_pod(client: Pod) -> Object:
    return pod(client.name, str(client.address4), str(client.address6), app=client.name)


def test_who_a_pod_is_outlives_the_writer_of_it(handed_over: Mesh) -> None:
    before = client_of(handed_over)
    handed_over.node.kill("map_writer")
    handed_over.node.until_ready()
    assert client_of(handed_over) == before != NOBODY


def test_an_ipv6_service_reaches_a_waypoint_of_ipv4_alone_and_is_told_as_such(handed_over: Mesh) -> None:
    node = handed_over.node
    node.write("waypoint", text(*waypoint_service(handed_over.waypoint, families=("IPv4",))))
    node.until_endpoints(host("web"), {f"{handed_over.waypoint.address4}:{PORT}"})
    heard = python(handed_over.client, HEAR.format(address=VIP6, port=80, own_port=0))
    assert heard == f"{told(handed_over, VIP6)} 80|{VIP6}|80"


def test_who_connects_to_the_waypoint_by_himself_is_no_client_of_a_service(handed_over: Mesh) -> None:
    address = handed_over.waypoint.address4
    before = refusals(handed_over.node)["handoff_unknown"]
    heard = python(handed_over.client, HEAR.format(address=address, port=PORT, own_port=0))
    assert heard == f"nothing|{address}|{PORT}"
    assert refusals(handed_over.node)["handoff_unknown"] == before + 1


def test_what_is_noted_of_a_connection_that_came_to_nothing_is_nobody_elses(handed_over: Mesh) -> None:
    """Who uses its addresses and ports again is not told: he might be somebody else."""
    maps_dir = pins.maps_dir(handed_over.node.pin_dir)
    a_free_one = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"
    client_port = int(python(handed_over.client, a_free_one))
    with PinnedMap(maps_dir, "handoffs") as handoffs:
        word = int.from_bytes(ip_from_text(VIP4)[12:], "little")
        ends = (HandoffPrefix.IPV4.to_bytes(2, "big"), (80).to_bytes(2, "big"))
        note = HANDOFF_VALUE.pack(word, 12345, *ends, b"nsnsn", b"acact")
        addresses = map(ip_from_text, (str(handed_over.client.address4), str(handed_over.waypoint.address4)))
        ends = (number.to_bytes(2, "big") for number in (client_port, PORT))
        handoffs.put(HANDOFF_KEY.pack(*addresses, *ends), note)
    again = f"""
import socket
with socket.create_connection(("{handed_over.waypoint.address4}", {PORT}), 5, ("", {client_port})) as s:
    print(s.recv(100).decode())
"""
    assert python(handed_over.client, again) == "nothing"


def test_a_thousand_connections_are_all_told_right(handed_over: Mesh) -> None:
    code = f"""
import socket
wrong = 0
for _ in range(1000):
    with socket.create_connection(("{VIP4}", 80), 5) as s:
        wrong += s.recv(100) != b"{told(handed_over, VIP4)} 80"
print(wrong)
"""
    assert python(handed_over.client, code) == "0"


@pytest.mark.parametrize("act", ['s.connect(("10.96.0.10", 80))', 's.sendto(b"x", ("10.96.0.10", 80))'])
def test_datagrams_are_refused(handed_over: Mesh, act: str) -> None:
    before = refusals(handed_over.node)["waypoint_unsupported"]
    said = python(handed_over.client, SEND.format(family="socket.AF_INET", act=act))
    assert said == "ConnectionRefusedError"
    assert refusals(handed_over.node)["waypoint_unsupported"] == before + 1


def test_without_an_instance_or_a_waypoint_it_is_refused_and_never_bypassed(handed_over: Mesh) -> None:
    node = handed_over.node
    for name, objects in ("waypoint", waypoint_service()), ("web", [web(waypoint="nobody")]):
        node.write(name, text(*objects))
        until(lambda: not node.endpoints(host("web")), "no way to the service")
        before = refusals(node)["waypoint_unavailable"]
        assert python(handed_over.client, CONNECT) == "ConnectionRefusedError"
        assert refusals(node)["waypoint_unavailable"] == before + 1


def test_a_service_loses_its_waypoint_and_gets_it_back(handed_over: Mesh) -> None:
    node = handed_over.node
    node.write("web", text(web(waypoint=None)))
    own = handed_over.web
    node.until_endpoints(host("web"), {f"{own.address4}:8080", f"{own.address6}:8080"})
    said = handed_over.client.run("curl", "-gsS", "--max-time", "5", f"http://{VIP4}/")
    assert said.stdout == "web\n"
    node.write("web", text(web(waypoint="wp")))
    until(lambda: handed_over.waypoint.address4 in str(node.endpoints(host("web"))), "the waypoint again")
    assert hear(handed_over) == told(handed_over, VIP4)


MANY_AT_ONCE = f"""
import socket, sys
clients = [socket.create_connection(("{VIP4}", 80), 5) for _ in range(100)]
print("connected", flush=True)
sys.stdin.readline()
for client in clients:
    print(client.recv(100).decode())
"""


def test_with_more_on_their_way_than_there_is_room_for_the_oldest_is_known_as_nobody(tmp_path: Path) -> None:
    """It is told nothing, so that an Envoy closes it, and it is counted; no other is taken for it."""
    with served(Node(tmp_path, subnet=9), "--set", "handoffs_max=16") as mesh:
        until_handed_over(mesh)
        os.killpg(mesh.listener.pid, signal.SIGSTOP)
        many = mesh.client.spawn(
            sys.executable, "-c", MANY_AT_ONCE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert many.stdout is not None
        assert many.stdout.readline() == "connected\n"
        os.killpg(mesh.listener.pid, signal.SIGCONT)
        heard = many.communicate("now\n", timeout=20)[0].splitlines()
        assert len(heard) == 100
        assert set(heard) == {f"{told(mesh, VIP4)} 80", "nothing"}
        assert refusals(mesh.node)["handoff_unknown"] == heard.count("nothing") >= 100 - 16


def refusals(node: Node) -> dict[str, int]:
    """Decisions by reason, as the kernel counts them."""
    with PinnedMap(pins.maps_dir(node.pin_dir), "counters") as counters:
        return {Reason(index).label: count for index, count in enumerate(counters.counter_sums())}


RESTED_PORT = 9999
COOKIES = """
import pathlib
pathlib.Path("/proc/sys/net/ipv4/tcp_syncookies").write_text("{mode}")
names, values = [line.split() for line in open("/proc/net/netstat") if line.startswith("TcpExt:")]
print(dict(zip(names, values))["SyncookiesRecv"])
"""


@pytest.mark.parametrize(
    ("address", "own_port"), [(VIP4, RESTED_PORT), (VIP6, RESTED_PORT - 1)], ids=["IPv4", "IPv6"]
)
def test_what_begins_with_a_syn_cookie_is_told_as_any_other(
    handed_over: Mesh, address: str, own_port: int
) -> None:
    """From a port that no client had: one whose last connection still rests begins without a cookie."""
    before = int(python(handed_over.waypoint, COOKIES.format(mode=2)))
    try:
        heard = python(handed_over.client, HEAR.format(address=address, port=80, own_port=own_port))
    finally:
        after = int(python(handed_over.waypoint, COOKIES.format(mode=1)))
    assert after > before
    assert heard == f"{told(handed_over, address)} 80|{address}|80"
