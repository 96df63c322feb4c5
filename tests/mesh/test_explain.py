"""`pykmesh explain` against the programs: what it says becomes of a connection is what becomes of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from pykmesh.demo.pods import Pod
from pykmesh.kernel import pins
from pykmesh.kernel.layout import AddressKind, Reason
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ADDRESS_VALUE,
    ENDPOINT_KEY,
    ENDPOINT_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    ip_from_text,
    port_bytes,
)
from tests.mesh.manifests import host, pod, service, text
from tests.mesh.node import Node, python, until
from tests.mesh.test_choice import entry

# Connected datagram sockets: the same hooks as for TCP, and the kernel shows where each really goes.
CONNECT = """
import collections, json, socket
to, count, sockets, error = {to!r}, 400, [], None
family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
for _ in range(count):
    s = socket.socket(family, socket.SOCK_DGRAM)
    sockets.append(s)
    try: s.connect(tuple(to))
    except OSError as raised: error = raised.errno
found = collections.Counter()
for name in ("udp", "udp6"):
    for line in open("/proc/net/" + name).read().splitlines()[1:]:
        address, port = line.split()[2].split(":")
        raw = b"".join(bytes.fromhex(address[i:i + 8])[::-1] for i in range(0, len(address), 8))
        raw = raw[12:] if raw[:12] == bytes(10) + b"\\xff\\xff" else raw
        text = socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
        shown = "[%s]:%d" if ":" in text else "%s:%d"
        if int(port, 16): found[shown % (text, int(port, 16))] += 1
print(json.dumps(dict(error=error, peers=found)))
"""
SEND = """
import json, socket
to, error = {to!r}, None
family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
try: socket.socket(family, socket.SOCK_DGRAM).sendto(b"x", tuple(to))
except OSError as raised: error = raised.errno
print(json.dumps(error))
"""
WEB4, WEB6, EMPTY, LOW6 = "10.96.0.10", "fd96::10", "10.96.0.30", "fd96::40"
RANGE, HEAVY, PASSING = "240.20.0.0/16", "240.10.0.1", "10.96.0.60"


class Explained(NamedTuple):
    status: int
    said: dict[str, Any]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Pod, Pod]]:
    node = Node(tmp_path_factory.mktemp("explain"), subnet=11)
    try:
        with node.network as network:
            client, stranger = network.add("client", 10), network.add("stranger", 11)
            pods = [
                pod("web-1", "10.9.0.1", "fd09::1", app="web"),
                pod("web-2", "10.9.0.2", "fd09::2", app="web"),
                pod("web-3", "10.9.0.3", "fd09::3", app="web", ready=False),
                pod("client", str(client.address4), str(client.address6), app="client"),
                pod("stranger", str(stranger.address4), app="stranger"),
            ]
            passing = entry(name="passing", address=PASSING)
            passing["spec"]["resolution"] = "NONE"
            node.write(
                "all",
                text(
                    service("web", WEB4, WEB6, app="web", ports={80: 8080, 81: "named"}),
                    service("empty", EMPTY, app="nobody", ports={80: 80}),
                    entry({"address": "10.9.0.4"}, name="low", address=LOW6),
                    passing,
                    entry(*({"address": f"10.9.1.{n}", "weight": n} for n in (1, 2, 5))),
                    entry({"address": "10.9.2.1"}, name="range", address=RANGE),
                    *pods,
                ),
            )
            node.start()
            node.enroll(client)
            node.until_endpoints("shop/range.example", {"10.9.2.1:80"})
            node.until_endpoints(
                host("web"), {f"{a}:8080" for a in ("10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2")}
            )
            yield node, client, stranger
    finally:
        node.end()


def explained(node: Node, source: str, destination: str, *options: str) -> Explained:
    result = node.cli("explain", source, destination, *options, "-o", "json", check=False)
    assert result.returncode in (0, 1), result.stderr
    return Explained(result.returncode, json.loads(result.stdout))


def counted(node: Node) -> list[int]:
    with PinnedMap(pins.maps_dir(node.pin_dir), "counters") as counters:
        return counters.counter_sums()


def grown(before: list[int], after: list[int]) -> set[str]:
    return {Reason(index).label for index, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}


def assert_as_in_the_kernel(node: Node, client: Pod, address: str, port: int) -> dict[str, Any]:
    """What is said of a connect() is what four hundred of them get."""
    shown = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    status, said = explained(node, str(client.address4), shown)
    before = counted(node)
    kernel = json.loads(python(client, CONNECT.format(to=[address, port])))
    reasons = grown(before, counted(node))
    assert status == (said["outcome"] == "refused") == (kernel["error"] is not None), (said, kernel)
    if said["outcome"] == "refused":
        assert reasons == {said["reason"]}
    elif said["outcome"] == "connected":
        assert reasons == {"routed"}
        assert kernel["peers"].keys() == {each["endpoint"] for each in said["endpoints"]}
        for each in said["endpoints"]:
            assert abs(kernel["peers"][each["endpoint"]] / 4 - each["percent"]) < 17, (said, kernel)
    else:
        assert kernel["peers"].keys() == {shown}
        assert "routed" not in reasons
    return said


@pytest.mark.parametrize(
    ("address", "port", "reason"),
    [
        (WEB4, 80, "routed"),
        (WEB6, 80, "routed"),
        (HEAVY, 80, "routed"),
        ("240.20.7.7", 80, "routed"),
        ("240.20.7.7", 81, "no_port"),
        (LOW6, 80, "routed"),  # IPv4 endpoints only, by way of v4-mapped addresses
        (WEB4, 81, "no_endpoint"),  # a named target port that no pod has
        (WEB4, 82, "no_port"),
        (WEB6, 82, "no_port"),
        (EMPTY, 80, "no_endpoint"),
        (PASSING, 80, "passthrough"),
        (PASSING, 81, "passthrough"),
        ("10.9.0.1", 80, "routed"),  # a pod itself
        ("192.0.2.1", 80, "routed"),  # nobody
        ("127.0.0.1", 80, "routed"),
        ("::1", 80, "routed"),
    ],
)
def test_a_connection_gets_what_is_said(
    mesh: tuple[Node, Pod, Pod], address: str, port: int, reason: str
) -> None:
    node, client, _ = mesh
    assert assert_as_in_the_kernel(node, client, address, port)["reason"] == reason


@contextlib.contextmanager
def written(node: Node, name: str, key: bytes, value: bytes) -> Iterator[None]:
    """Entries that map_writer does not write here, or never would."""
    with PinnedMap(pins.maps_dir(node.pin_dir), name) as entries:
        before = entries.get(key)
        entries.put(key, value)
        try:
            yield
        finally:
            if before is None:
                entries.remove(key)
            else:
                entries.put(key, before)


def address_entry(address: str, kind: AddressKind, verdict: Reason) -> tuple[bytes, bytes]:
    key = ADDRESS_KEY.pack(ip_from_text(address), 0)
    return key, key + ADDRESS_VALUE.pack(kind, verdict, 0)[len(key) :]


def service_entry(address: str, number: int, endpoints: int, verdict: Reason) -> tuple[bytes, bytes]:
    key = SERVICE_KEY.pack(ip_from_text(address), 0, port_bytes(80))
    return key, key + SERVICE_VALUE.pack(number, endpoints, verdict, 0, 0)[len(key) :]


@pytest.mark.parametrize(
    "verdict",
    [Reason.PASSTHROUGH, Reason.WAYPOINT_UNSUPPORTED, Reason.POLICY_UNSUPPORTED, Reason.NO_ROOM],
)
def test_verdicts_of_entries_are_obeyed_alike(mesh: tuple[Node, Pod, Pod], verdict: Reason) -> None:
    node, client, _ = mesh
    with written(node, "services", *service_entry("198.51.100.1", 77, 3, verdict)):
        assert assert_as_in_the_kernel(node, client, "198.51.100.1", 80)["reason"] == verdict.label
    for kind in AddressKind:
        with written(node, "addresses", *address_entry("198.51.100.2", kind, verdict)):
            assert assert_as_in_the_kernel(node, client, "198.51.100.2", 80)["reason"] == verdict.label


def test_entries_that_are_broken_are_read_alike(mesh: tuple[Node, Pod, Pod]) -> None:
    node, client, _ = mesh
    address = "198.51.100.3"
    key, value = service_entry(address, 78, 2, Reason.ROUTED)
    with written(node, "services", key, bytes(len(key)) + value[len(key) :]):
        assert assert_as_in_the_kernel(node, client, address, 80)["outcome"] == "left alone"
    with written(node, "services", key, value):
        assert assert_as_in_the_kernel(node, client, address, 80)["reason"] == "endpoint_vanished"
        ip = ip_from_text("10.9.9.9")
        with written(node, "endpoints", ENDPOINT_KEY.pack(78, 0), ENDPOINT_VALUE.pack(79, ip, port_bytes(9))):
            assert assert_as_in_the_kernel(node, client, address, 80)["reason"] == "endpoint_vanished"
    key, value = address_entry(address, AddressKind.WORKLOAD, Reason.ROUTED)
    with written(node, "addresses", key, bytes(len(key)) + value[len(key) :]):
        assert assert_as_in_the_kernel(node, client, address, 80)["reason"] == "no_port"


def test_a_verdict_that_is_not_known_is_said_so(mesh: tuple[Node, Pod, Pod]) -> None:
    node, _, _ = mesh
    key, _ = service_entry("198.51.100.4", 77, 3, Reason.ROUTED)
    unknown = key + SERVICE_VALUE.pack(77, 3, 999, 0, 0)[len(key) :]
    with written(node, "services", key, unknown):
        result = node.cli("explain", "-", "198.51.100.4:80", check=False)
    assert result.returncode == 2
    assert "999 is not a valid Reason" in result.stderr


def test_an_address_of_a_service_comes_before_a_range(mesh: tuple[Node, Pod, Pod]) -> None:
    node, client, _ = mesh
    with written(node, "addresses", *address_entry("240.20.1.1", AddressKind.SERVICE, Reason.ROUTED)):
        assert assert_as_in_the_kernel(node, client, "240.20.1.1", 80)["reason"] == "no_port"
    with written(node, "addresses", *address_entry("240.20.1.1", AddressKind.WORKLOAD, Reason.ROUTED)):
        assert assert_as_in_the_kernel(node, client, "240.20.1.1", 80)["outcome"] == "connected"


def test_a_datagram_that_cannot_change_its_family_is_refused(mesh: tuple[Node, Pod, Pod]) -> None:
    node, client, _ = mesh
    assert explained(node, "-", f"[{LOW6}]:80").status == 0
    status, said = explained(node, "-", f"[{LOW6}]:80", "--protocol", "udp")
    assert (status, said["reason"]) == (1, "family")
    before = counted(node)
    assert json.loads(python(client, SEND.format(to=[LOW6, 80]))) is not None
    assert grown(before, counted(node)) == {"family"}


def test_who_is_not_enrolled_is_left_alone(mesh: tuple[Node, Pod, Pod]) -> None:
    node, _, stranger = mesh
    status, said = explained(node, "shop/stranger", f"{EMPTY}:80")
    assert (status, said["outcome"], said["reason"]) == (0, "left alone", "not enrolled")
    before = counted(node)
    kernel = json.loads(python(stranger, CONNECT.format(to=[EMPTY, 80])))
    assert kernel["peers"].keys() == {f"{EMPTY}:80"}
    assert grown(before, counted(node)) == set()


def test_a_service_is_found_by_each_of_its_names_and_says_who_is_behind_it(
    mesh: tuple[Node, Pod, Pod],
) -> None:
    node, client, _ = mesh
    uid = "Kubernetes//Pod/shop/client"
    for source in ("-", "shop/client", uid, str(client.address4), str(client.address6)):
        for name in (host("web"), "web.shop.svc.cluster.local", "web.shop"):
            _, said = explained(node, source, f"{name}:80")
            assert (said["destination"], said["other_addresses"]) == (f"{WEB4}:80", [f"[{WEB6}]:80"])
    assert {(e["name"], e["percent"], e["healthy"]) for e in said["endpoints"]} == {
        ("shop/web-1", 50.0, True),
        ("shop/web-2", 50.0, True),
    }
    assert {m["name"]: m["unused"] for m in said["members"]["members"]} == {
        "shop/web-1": None, "shop/web-2": None, "shop/web-3": "unhealthy",
    }  # fmt: skip
    assert [step["map"] for step in said["steps"]] == ["pods", "links", "services", "endpoints"]
    weights = explained(node, "-", f"{HEAVY}:80").said["endpoints"]
    assert sorted(each["percent"] for each in weights) == [12.5, 25.0, 62.5]


def test_people_read_it_as_a_table(mesh: tuple[Node, Pod, Pod]) -> None:
    node, _, _ = mesh
    said = node.cli("explain", "shop/client", "web.shop:80").stdout
    assert said.splitlines()[0].endswith(f" -> {host('web')} {WEB4}:80 (tcp)")
    assert "not used: shop/web-3: unhealthy" in said
    assert said.splitlines()[-1] == "connected: routed"
    refused = node.cli("explain", "-", f"{EMPTY}:80", check=False)
    assert refused.returncode == 1
    assert refused.stdout.splitlines()[-1] == "refused: no_endpoint"


@pytest.mark.parametrize(
    ("source", "destination", "why"),
    [
        ("-", "10.0.0.1", "ADDRESS:PORT"),
        ("-", "10.0.0.1:0", "ADDRESS:PORT"),
        ("-", "10.0.0.1:70000", "ADDRESS:PORT"),
        ("-", "fd96::10:80", "write an IPv6 address as"),
        ("-", "nothing.shop:80", "no service is called 'nothing.shop'"),
        ("shop/nobody", "10.0.0.1:80", "no workload is called 'shop/nobody'"),
    ],
)
def test_what_is_not_there_cannot_be_explained(
    mesh: tuple[Node, Pod, Pod], source: str, destination: str, why: str
) -> None:
    result = mesh[0].cli("explain", source, destination, check=False)
    assert result.returncode == 2
    assert why in result.stderr


def test_get_shows_each_kind_from_each_source(mesh: tuple[Node, Pod, Pod]) -> None:
    node, client, _ = mesh
    refused = node.cli("get", "policies", "--from", "bpf", check=False)
    assert (refused.returncode, "not enforced yet" in refused.stderr) == (1, True)
    for source in ("state", "bpf"):
        (pod_there,) = node.json("get", "pods", "--from", source)["pods"]
        assert pod_there["address4"] == str(client.address4)
        assert pod_there["programs"] == 10
        assert str(client.address4) in node.cli("get", "pods", "--from", source).stdout
    assert RANGE in str(node.json("get", "services", "--from", "bpf"))
    for source in ("xds", "state", "bpf"):
        for kind in ("services", "workloads"):
            lines = node.cli("get", kind, "--from", source).stdout.splitlines()
            assert len(lines) == 1 + len(node.json("get", kind, "--from", source)[kind])
            assert lines[0].endswith("  ERROR") == (source == "xds")


def test_the_config_dump_says_who_is_enrolled(mesh: tuple[Node, Pod, Pod]) -> None:
    node, client, _ = mesh
    dump = json.loads(node.cli("config-dump").stdout)
    assert dump["certificates"] == []
    assert host("web") in {f"{each['namespace']}/{each['hostname']}" for each in dump["services"]}
    (uid,) = dump["workloadState"]
    (workload,) = (each for each in dump["workloads"] if each["uid"] == uid)
    assert str(client.address4) in workload["workloadIps"]
    info = {"name": "client", "namespace": "shop", "trustDomain": "cluster.local"}
    assert dump["workloadState"][uid]["info"] == {**info, "serviceAccount": "default"}
    assert dump["workloadState"][uid]["connections"] == {"inbound": [], "outbound": []}


def test_addresses_are_explained_when_no_process_is_left(mesh: tuple[Node, Pod, Pod]) -> None:
    node, client, _ = mesh
    node.cli("down")
    said = assert_as_in_the_kernel(node, client, WEB4, 80)
    assert said["outcome"] == "connected"
    assert said["members"] is None
    result = node.cli("explain", "-", "web.shop:80", check=False)
    assert result.returncode == 2
    assert "map_writer does not answer" in result.stderr
    node.start()
    until(lambda: explained(node, "-", "web.shop:80").status == 0, "names again")
