"""Who sees which service; where a client, a busy endpoint or a refused connection leads. Real connects."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pykmesh.demo.pods import Pod
from tests.mesh.manifests import Object, pod, service, text
from tests.mesh.node import Node, python, serve, until

VIP, VIP6 = "240.11.0.1", "fd11::1"
REFUSE_S = 2.0
# Connected datagram sockets: their peer's name is the service's, the kernel's table shows where they go.
PEERS = """
import json, socket, sys
found = []
for _ in range({count}):
    s = socket.socket({family}, socket.SOCK_DGRAM)
    s.connect(({address!r}, 80))
    table = "/proc/net/udp6" if s.family == socket.AF_INET6 else "/proc/net/udp"
    port = s.getsockname()[1]
    for line in open(table).read().splitlines()[1:]:
        local, remote = line.split()[1:3]
        if int(local.rpartition(":")[2], 16) == port:
            packed = bytes.fromhex(remote.partition(":")[0])
            words = b"".join(packed[n:n + 4][::-1] for n in range(0, len(packed), 4))
            found.append(socket.inet_ntop(s.family, words))
    s.close()
print(json.dumps(found))
"""
CONNECT = """
import collections, json, socket, time
found, refused = collections.Counter(), 0
for _ in range({count}):
    try:
        with socket.create_connection(({address!r}, 80), 5) as s:
            s.sendall(b"GET / HTTP/1.1\\r\\nConnection: close\\r\\n\\r\\n")
            found[s.makefile().read().split()[-1]] += 1
    except ConnectionRefusedError:
        refused += 1
print(json.dumps([found, refused]))
"""


class Clients(NamedTuple):
    node: Node
    shop: Pod
    bank: Pod
    stranger: Pod
    """Enrolled, and nobody that the control plane knows."""


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    node = Node(tmp_path_factory.mktemp("selection"), subnet=8)
    try:
        with node.network as network:
            found = Clients(node, *(network.add(name, 10 + n) for n, name in enumerate(("s", "b", "x"))))
            for each, namespace in ((found.shop, "shop"), (found.bank, "bank")):
                known = pod(each.name, str(each.address4), str(each.address6), app="client")
                known["metadata"]["namespace"] = namespace
                node.write(namespace, text(known))
            node.start("--set", f"passive_health_s={REFUSE_S}")
            for each in (found.shop, found.bank, found.stranger):
                node.enroll(each)
            yield found
    finally:
        node.end()


@pytest.fixture
def entries(clients: Clients) -> Iterator[Path]:
    yield clients.node.config / "entries.yaml"
    clients.node.write("entries", "# none\n")
    until(lambda: not clients.node.raw_endpoints(), "nothing left")


def test_of_services_at_one_address_each_namespace_sees_its_own(clients: Clients, entries: Path) -> None:
    """Others see the canonical one: the first that there was."""
    node = clients.node
    node.write("entries", text(entry("shop", "10.9.1.1"), entry("bank", "10.9.1.2")))
    node.until_endpoints("shop/choice.example", {"10.9.1.1:80"})
    node.until_endpoints("bank/choice.example", {"10.9.1.2:80"})
    assert entries.parent.exists()
    for address in (VIP, VIP6):
        assert peers(clients.shop, address) == {"10.9.1.1"}
        assert peers(clients.bank, address) == {"10.9.1.2"}
        assert peers(clients.stranger, address) <= {"10.9.1.1", "10.9.1.2"}
        for client in (clients.shop, clients.bank, clients.stranger):
            assert explained(node, client, address) == peers(client, address)
    node.write("entries", text(entry("bank", "10.9.1.2")))
    node.until_endpoints("shop/choice.example", set())
    for client in (clients.shop, clients.bank, clients.stranger):
        assert peers(client, VIP) == {"10.9.1.2"}


def test_a_hidden_service_is_seen_by_its_namespace_alone(clients: Clients, entries: Path) -> None:
    node, hidden = clients.node, {"pykmesh.io/visibility": "namespace"}
    assert entries.parent.exists()
    for address in (VIP, "240.11.4.0/24"):
        asked = address.replace("0/24", "9")
        node.write("entries", text(entry("shop", "10.9.2.1", annotations=hidden, address=address)))
        node.until_endpoints("shop/choice.example", {"10.9.2.1:80"})
        assert peers(clients.shop, asked) == {"10.9.2.1"}
        assert peers(clients.bank, asked) == {asked}, "as an address that nobody knows"
        assert peers(clients.stranger, asked) == {asked}
        assert explained(node, clients.shop, asked) == {"10.9.2.1"}
        assert explained(node, clients.bank, asked) == explained(node, clients.stranger, asked) == set()
        assert node.cli("diff").returncode == 0
        # A public one of another namespace beside it is seen by all others.
        both = (
            entry("shop", "10.9.2.1", annotations=hidden, address=address),
            entry("bank", "10.9.2.2", address=address),
        )
        node.write("entries", text(*both))
        node.until_endpoints("bank/choice.example", {"10.9.2.2:80"})
        assert peers(clients.shop, asked) == {"10.9.2.1"}
        assert peers(clients.bank, asked) == peers(clients.stranger, asked) == {"10.9.2.2"}
        node.write("entries", text(both[1]))
        node.until_endpoints("shop/choice.example", set())
        assert peers(clients.shop, asked) == {"10.9.2.2"}


def test_no_client_loses_its_service_while_another_namespace_gets_one_there(
    clients: Clients, entries: Path
) -> None:
    """Whoever connects meanwhile goes to the one or the other, never past the mesh."""
    node = clients.node
    assert entries.parent.exists()
    shop, bank = entry("shop", "10.9.3.1"), entry("bank", "10.9.3.2")
    node.write("entries", text(shop))
    node.until_endpoints("shop/choice.example", {"10.9.3.1:80"})
    for objects, bank_sees in (((shop, bank), "10.9.3.2"), ((shop,), "10.9.3.1")) * 3:
        node.write("entries", text(*objects))
        seen: set[str] = set()
        while bank_sees not in seen:
            seen = peers(clients.bank, VIP, 200)
            assert seen <= {"10.9.3.1", "10.9.3.2"}
        assert peers(clients.shop, VIP, 50) == {"10.9.3.1"}


def test_a_client_keeps_its_endpoint_while_the_service_has_it(clients: Clients, entries: Path) -> None:
    node, addresses = clients.node, [f"10.9.4.{n}" for n in range(1, 9)]
    assert entries.parent.exists()
    affine = service("affine", "10.96.11.1", app="affine", ports={80: 80})
    affine["spec"] |= {"sessionAffinity": "ClientIP"}
    affine["spec"] |= {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}}}
    node.write("entries", text(affine, *(pod(a.replace(".", "-"), a, app="affine") for a in addresses)))
    node.until_endpoints("shop/affine.shop.svc.cluster.local", {f"{a}:80" for a in addresses})
    kept = {each.name: peers(each, "10.96.11.1", 50) for each in (clients.shop, clients.bank)}
    assert all(len(found) == 1 for found in kept.values())
    # It stays when others go, also when that moves it to another slot.
    (own,) = kept["s"]
    node.write("entries", text(affine, pod("own", own, app="affine")))
    node.until_endpoints("shop/affine.shop.svc.cluster.local", {f"{own}:80"})
    assert peers(clients.shop, "10.96.11.1", 5) == {own}
    # Once it rests for longer than the timeout, it draws anew.
    node.write("entries", text(affine, *(pod(a.replace(".", "-"), a, app="affine") for a in addresses)))
    node.until_endpoints("shop/affine.shop.svc.cluster.local", {f"{a}:80" for a in addresses})
    drawn = [peers_after(clients.shop, "10.96.11.1", 1.1) for _ in range(12)]
    assert len(set(drawn)) > 1, "the chance of one endpoint twelve times is one in eight billion"


def test_of_two_endpoints_the_one_with_fewer_connections_is_taken(clients: Clients, entries: Path) -> None:
    """Twenty held connections to one of two: the draw of both, a half of all, goes to the other one."""
    node, network = clients.node, clients.node.network
    assert entries.parent.exists()
    web = [network.add(f"least-{n}", 40 + n) for n in (1, 2)]
    for endpoint in web:
        serve(endpoint, "--http", "80")
    addresses = [str(endpoint.address4) for endpoint in web]
    least = {"pykmesh.io/load-balancing": "least-connections"}
    node.write("entries", text(entry("shop", addresses[0], annotations=least)))
    node.until_endpoints("shop/choice.example", {f"{addresses[0]}:80"})
    held = clients.shop.spawn("python3", "-c", HOLD.format(address=VIP, count=20), **PIPES)
    assert held.stdout is not None
    assert held.stdout.readline() == "open\n"
    node.write("entries", text(entry("shop", *addresses, annotations=least)))
    node.until_endpoints("shop/choice.example", {f"{a}:80" for a in addresses})
    found, refused = connect(clients.shop, VIP, 400)
    assert refused == 0
    assert 240 < found["least-2"] < 360, "three quarters, give or take six standard deviations"
    held.communicate("\n", timeout=10)
    # None is open any more: both alike.
    until(lambda: abs(connect(clients.shop, VIP, 400)[0]["least-2"] - 200) < 60, "both alike")


def test_an_endpoint_that_refused_is_not_drawn_for_a_while(clients: Clients, entries: Path) -> None:
    node, network = clients.node, clients.node.network
    assert entries.parent.exists()
    up, down = network.add("up", 50), network.add("down", 51)
    serve(up, "--http", "80")
    others = [f"{down.address4}", *(str(network.add(f"down-{n}", 52 + n).address4) for n in range(4))]
    node.write("entries", text(entry("shop", str(up.address4), *others)))
    node.until_endpoints("shop/choice.example", {f"{a}:80" for a in (str(up.address4), *others)})
    began = time.monotonic()
    found, refused = connect(clients.shop, VIP, 300)
    spans = 1 + int((time.monotonic() - began) / REFUSE_S)
    # Each of the five once in each span, where about 250 were refused without it.
    assert 5 <= refused <= 5 * spans
    assert found == {"up": 300 - refused}
    node.write("entries", text(entry("shop", str(up.address4), str(down.address4))))
    node.until_endpoints("shop/choice.example", {f"{up.address4}:80", f"{down.address4}:80"})
    # It comes back when the time is over, and one that is all alone is never left out.
    serve(down, "--http", "80")
    until(lambda: "down" in connect(clients.shop, VIP, 50)[0], "down to be drawn again")
    node.write("entries", text(entry("shop", "10.9.9.9")))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.0/8", "0.0.0.0/0", "::/0"])
def test_a_pod_reaches_itself_whatever_somebody_says_of_loopback(
    clients: Clients, entries: Path, address: str
) -> None:
    node, endpoint = clients.node, "fd11::9" if ":" in address else "10.9.5.1"
    assert entries.parent.exists()
    node.write("entries", text(entry("bank", endpoint, address=address)))
    node.until_endpoints("bank/choice.example", {f"{endpoint}:80"})
    for own, asked in (("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("::1", "::1"), ("::1", "::")):
        assert peers(clients.shop, asked) == {own}
        assert explained(node, clients.shop, asked) == set()
    # An IPv6 range has nothing to do with IPv4.
    others = {"192.0.2.1": address == "0.0.0.0/0", "2001:db8::1": address == "::/0"}
    for asked, is_its in others.items():
        assert peers(clients.shop, asked) == {endpoint if is_its else asked}
        assert explained(node, clients.shop, asked) == ({endpoint} if is_its else set())


def test_a_client_sees_its_namespaces_services_also_when_somebody_claims_its_address(
    clients: Clients, entries: Path
) -> None:
    node, hidden = clients.node, {"pykmesh.io/visibility": "namespace"}
    assert entries.parent.exists()
    own = entry("shop", "10.9.6.1", annotations=hidden)
    claim = entry("bank", "10.9.6.2", address=str(clients.shop.address4))
    for objects in ((own,), (own, claim), (claim, own), (own,)):
        node.write("entries", text(*objects))
        node.until_endpoints("shop/choice.example", {"10.9.6.1:80"})
        node.until_endpoints("bank/choice.example", {"10.9.6.2:80"} if claim in objects else set())
        assert peers(clients.shop, VIP) == {"10.9.6.1"}
        assert explained(node, clients.shop, VIP) == {"10.9.6.1"}
        assert peers(clients.bank, VIP) == {VIP}
    node.write("entries", text(claim))
    node.until_endpoints("shop/choice.example", set())
    assert peers(clients.shop, VIP) == {VIP}


def test_a_workload_without_an_address_is_reached_by_its_host_name(clients: Clients, entries: Path) -> None:
    """The name is the hosts file's, as any name of the node may be."""
    node = clients.node
    assert entries.parent.exists()
    by_name = entry("shop", "localhost")
    by_name["spec"] |= {"resolution": "DNS"}
    nowhere = entry("bank", "nobody.invalid", address="240.11.0.7")
    nowhere["spec"] |= {"resolution": "DNS"}
    node.write("entries", text(by_name, nowhere))
    until(lambda: "127.0.0.1:80" in node.endpoints("shop/choice.example"), "localhost to be looked up")
    assert peers(clients.shop, VIP) <= {"127.0.0.1"}
    assert node.endpoints("bank/choice.example") == set()
    _, refused = connect(clients.shop, "240.11.0.7", 3)
    assert refused == 3


HOLD = """
import socket, sys
held = [socket.create_connection(({address!r}, 80), 5) for _ in range({count})]
print("open", flush=True)
sys.stdin.readline()
"""
PIPES: dict[str, Any] = {"stdin": -1, "stdout": -1, "text": True}


def peers(client: Pod, address: str, count: int = 20) -> set[str]:
    """The endpoints that connected sockets have; a v4-mapped one is shown as IPv4."""
    family = "socket.AF_INET6" if ":" in address else "socket.AF_INET"
    found = json.loads(python(client, PEERS.format(count=count, address=address, family=family), 60))
    assert len(found) == count
    return {each.removeprefix("::ffff:") for each in found}


def explained(node: Node, client: Pod, address: str) -> set[str]:
    """The endpoints that `pykmesh explain` says the client may get; none where it is left alone."""
    to = f"[{address}]:80" if ":" in address else f"{address}:80"
    found = node.json("explain", str(client.address4), to)
    assert found["outcome"] in ("connected", "left alone")
    return {each["endpoint"].rpartition(":")[0].strip("[]") for each in found["endpoints"]}


def peers_after(client: Pod, address: str, rest_s: float) -> str:
    (found,) = json.loads(
        python(
            client,
            f"import time; time.sleep({rest_s})\n"
            + PEERS.format(count=1, address=address, family="socket.AF_INET"),
            60,
        )
    )
    return str(found)


def connect(client: Pod, address: str, count: int) -> tuple[dict[str, int], int]:
    """How often each server answered, by its own name, and how many connections were refused."""
    found, refused = json.loads(python(client, CONNECT.format(count=count, address=address), 60))
    return dict.fromkeys(("least-1", "least-2"), 0) | found if "least" in str(found) else found, refused


def entry(
    namespace: str, *endpoints: str, annotations: dict[str, str] | None = None, address: str = ""
) -> Object:
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": "choice", "namespace": namespace, "annotations": annotations or {}},
        "spec": {
            "hosts": ["choice.example"],
            "addresses": [address] if address else [VIP, VIP6],
            "ports": [{"number": 80, "name": "tcp", "protocol": "TCP"}],
            "resolution": "STATIC",
            "endpoints": [{"address": address} for address in endpoints],
        },
    }
