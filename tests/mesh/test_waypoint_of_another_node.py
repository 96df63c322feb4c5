"""A waypoint that serves pods of another node: what their SYN says, and who is believed."""

from __future__ import annotations

import contextlib
import secrets
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from pykmesh.contracts.handoff import Identity, told_address
from pykmesh.kernel import pins
from pykmesh.kernel.layout import HandoffPrefix
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import HANDOFF_SECRET, IDENTITY_VALUE, V4_PREFIX, ip_from_text
from tests.mesh.manifests import Object, pod, text
from tests.mesh.node import Node, python, service_secret_of, until
from tests.mesh.test_handoff import COOKIES, RESTED_PORT
from tests.mesh.waypoints import SHOP4, SHOP6, Mesh, ask, until_handed_over, waypoint_mesh

FIRST = bytes(4)
CANARY = "x-canary: yes"


class Nodes(NamedTuple):
    """Each as a pod of it sees the mesh: of the node that has the waypoint, and of the one that has none."""

    near: Mesh
    far: Mesh


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    key = tmp_path_factory.mktemp("key") / "mesh.key"
    key.write_text(secrets.token_hex(32))
    option = ("--mesh-key-file", str(key))
    with waypoint_mesh(tmp_path_factory.mktemp("wn"), 29, *option) as near:
        client = near.node.network.add("far", 30)
        found = pod("far", str(client.address4), str(client.address6), app="far")
        found["spec"]["serviceAccountName"] = "far"
        near.node.write("far", text(found))
        address = f"127.0.0.1:{near.node.instance.ports.xds}"
        node = Node(tmp_path_factory.mktemp("wf"), "--xds-address", address)
        try:
            node.start("--node-name", "far", *option)
            node.enroll(client)
            far = Mesh(node, client, near.waypoint)
            until_handed_over(far)
            until(lambda: identity(node), "the client to be known")
            yield Nodes(near, far)
        finally:
            node.end()


def identity(node: Node) -> Identity | None:
    """Of the node's only enrolled pod."""
    with PinnedMap(pins.maps_dir(node.pin_dir), "identities") as identities:
        return next((Identity(*IDENTITY_VALUE.unpack(value)[1:]) for _, value in identities.items()), None)


def are_answered(mesh: Mesh) -> bool:
    return ask(mesh, 3, CANARY) == {(200, "v2"): 3}


def is_closed(mesh: Mesh, own_port: int = 0) -> bool:
    """A connection is taken, and ends without an answer."""
    try:
        return ask(mesh, 1, CANARY, own_port=own_port) == {(0, ""): 1}
    except AssertionError as error:
        return "ConnectionResetError" in str(error)


@contextlib.contextmanager
def secret(mesh: Mesh, value: bytes) -> Iterator[bytes]:
    """The node's own one is put back."""
    with PinnedMap(pins.maps_dir(mesh.node.pin_dir), "handoff_secrets") as held:
        before = held.get(FIRST)
        assert before
        held.put(FIRST, value)
        try:
            yield before
        finally:
            held.put(FIRST, before)


@pytest.mark.parametrize("address", [SHOP4, SHOP6, f"::ffff:{SHOP4}"], ids=["IPv4", "IPv6", "IPv4-mapped"])
def test_it_serves_them_as_its_own(nodes: Nodes, address: str) -> None:
    for mesh in nodes:
        assert ask(mesh, 20, CANARY, address=address) == {(200, "v2"): 20}


def test_no_connection_of_many_is_told_wrong(nodes: Nodes) -> None:
    assert ask(nodes.far, 500, CANARY) == {(200, "v2"): 500}


def policy(account: str) -> Object:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "who", "namespace": "shop"},
        "spec": {
            "targetRefs": [{"group": "", "kind": "Service", "name": "shop"}],
            "action": "ALLOW",
            "rules": [{"from": [{"source": {"serviceAccounts": [account]}}]}],
        },
    }


def test_policies_know_who_they_are(nodes: Nodes) -> None:
    ok, forbidden = {(200, "v2"): 1}, {(403, "RBAC: access denied"): 1}
    try:
        for account, far, near in (("far", ok, forbidden), ("default", forbidden, ok)):
            nodes.near.node.write("policy", text(policy(account)))
            until(lambda far=far: ask(nodes.far, 1, CANARY) == far, f"{account} to be allowed, for far")
            until(lambda near=near: ask(nodes.near, 1, CANARY) == near, f"{account} to be allowed, for near")
    finally:
        nodes.near.node.write("policy", "# none\n")
    until(lambda: are_answered(nodes.far), "no policy")


@pytest.mark.parametrize("of", ["near", "far"])
@pytest.mark.parametrize("key", [bytes(16), b"another one's ke"], ids=["none", "another"])
def test_without_the_same_key_nobody_is_believed(nodes: Nodes, of: str, key: bytes) -> None:
    with secret(getattr(nodes, of), HANDOFF_SECRET.pack(key, int(any(key)))):
        assert is_closed(nodes.far)
        assert are_answered(nodes.near)
    assert are_answered(nodes.far)


def test_what_begins_with_a_syn_cookie_is_closed(nodes: Nodes) -> None:
    """The SYN is nowhere to be read then."""
    python(nodes.near.waypoint, COOKIES.format(mode=2))
    try:
        assert is_closed(nodes.far, RESTED_PORT)
        assert are_answered(nodes.near)
    finally:
        python(nodes.near.waypoint, COOKIES.format(mode=1))
    assert are_answered(nodes.far)


SYN = """
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
s.settimeout(10)
print("ready", flush=True)
while True:
    packet, (_, protocol, way, *_) = s.recvfrom(2048)
    if way != socket.PACKET_OUTGOING or protocol != 0x800 or packet[9] != socket.IPPROTO_TCP:
        continue
    if packet[(packet[0] & 15) * 4 + 13] & 0x12 == 2:
        print(packet.hex())
        break
"""


class Syn(NamedTuple):
    source: bytes
    destination: bytes
    tcp: bytes

    @property
    def option(self) -> bytes:
        options = self.tcp[20 : (self.tcp[12] >> 4) * 4]
        while options:
            if options[0] == 253:
                return options[: options[1]]
            options = options[1 if options[0] == 1 else options[1] :]
        return b""


def syn_of(mesh: Mesh, act: Callable[[], Any]) -> Syn:
    """The first one that leaves the client, by IPv4."""
    with mesh.client.spawn(sys.executable, "-c", SYN, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout
        assert listener.stdout.readline() == "ready\n"
        act()
        packet = bytes.fromhex(listener.stdout.readline())
    return Syn(V4_PREFIX + packet[12:16], V4_PREFIX + packet[16:20], packet[(packet[0] & 15) * 4 :])


def siphash(data: bytes, key: bytes) -> int:
    """SipHash-2-4 of the paper."""
    mask = 2**64 - 1
    k0, k1 = struct.unpack("<QQ", key)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotate(word: int, bits: int) -> int:
        return (word << bits | word >> (64 - bits)) & mask

    def rounds(number: int) -> None:
        for _ in range(number):
            for a, b, c, d, low, high in ((0, 1, 2, 3, 13, 16), (2, 1, 0, 3, 17, 21)):
                v[a] = (v[a] + v[b]) & mask
                v[b] = rotate(v[b], low) ^ v[a]
                v[a] = rotate(v[a], 32)
                v[c] = (v[c] + v[d]) & mask
                v[d] = rotate(v[d], high) ^ v[c]

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) % 256])
    for (word,) in struct.iter_unpack("<Q", padded):
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def test_the_hash_is_that_of_the_paper() -> None:
    """Its appendix A."""
    assert siphash(bytes(range(15)), bytes(range(16))) == 0xA129CA6149BE45E5


@pytest.mark.parametrize(
    ("vip", "prefix"), [(SHOP4, HandoffPrefix.IPV4), (SHOP6, HandoffPrefix.IPV6)], ids=["IPv4", "IPv6"]
)
def test_the_syn_says_what_was_asked_for_and_who_asks_to_whoever_has_the_key(
    nodes: Nodes, vip: str, prefix: HandoffPrefix
) -> None:
    """Read by other code than that which reads it in the kernel."""
    syn = syn_of(nodes.far, lambda: ask(nodes.far, 1, CANARY, address=vip))
    with PinnedMap(pins.maps_dir(nodes.far.node.pin_dir), "handoff_secrets") as held:
        key, _ = HANDOFF_SECRET.unpack(held.get(FIRST) or b"")
    kind, length, magic = struct.unpack_from(">BBH", syn.option)
    assert (kind, length, magic) == (253, 20, prefix)
    sequence = int.from_bytes(syn.tcp[4:8], "big")
    left, right = struct.unpack_from("<QQ", syn.option, 4)
    for number in reversed(range(4)):
        ends = syn.source + syn.destination + syn.tcp[:4] + bytes(4)
        asked = struct.pack("<QIHH", left, sequence, int.from_bytes(syn.option[2:4], "little"), number)
        left, right = right ^ siphash(ends + asked, key), left
    claim = struct.pack("<QQ", left, right)
    who = identity(nodes.far.node)
    assert who
    assert claim[4:6] == (80).to_bytes(2, "big")
    told = ip_from_text(told_address(ip_from_text(vip), service_secret_of(nodes.far.node), who))
    assert claim[:4] + claim[6:] == told[2:]


def test_a_connection_within_the_node_says_nothing(nodes: Nodes) -> None:
    syn = syn_of(nodes.near, lambda: ask(nodes.near, 1, CANARY))
    assert syn.option == b""
