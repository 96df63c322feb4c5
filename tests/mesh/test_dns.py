"""What resolvers in enrolled pods get, from the mesh and from the servers that they ask."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pykmesh.demo.pods import Pod
from tests.mesh.manifests import host, pod, service, text
from tests.mesh.node import Node, look_up_on, looked_up, until, with_resolv_conf

VIP4, VIP6, DNS_VIP, DNS_VIP6 = "10.96.0.10", "fd96::10", "10.96.0.53", "fd96::53"
WEB = "web.shop.svc.cluster.local"
HEADLESS = [f"10.8.{number // 250}.{number % 250 + 1}" for number in range(80)]

ASK = """
import sys, dns.message, dns.query, dns.rcode
server, transport, *questions = sys.argv[1:]
for question in questions:
    name, kind = question.split("/")
    query = dns.message.make_query(name, kind)
    if transport == "udp": reply = dns.query.udp(query, server, timeout=4)
    elif transport == "tcp": reply = dns.query.tcp(query, server, timeout=4)
    else: reply, _ = dns.query.udp_with_fallback(query, server, timeout=4)
    records = [record.to_text() for rrset in reply.answer for record in rrset]
    print(dns.rcode.to_text(reply.rcode()), *sorted(records))
"""
ASK_EACH = """
import sys, dns.message, dns.query
name, *servers = sys.argv[1:]
for server in servers:
    print(dns.query.udp(dns.message.make_query(name, "A"), server, timeout=4).answer[0][0])
"""
# One unconnected socket, as musl has it: asks all servers at once, and hears who answered.
ASK_ALL = """
import socket, sys, dns.message
family, name, *servers = sys.argv[1:]
s = socket.socket(getattr(socket, family), socket.SOCK_DGRAM); s.settimeout(4)
queries = {}
for server in servers:
    query = dns.message.make_query(name, "TXT" if "test" in name else "A")
    queries[query.id] = server
    s.sendto(query.to_wire(), (server, 53))
for _ in servers:
    data, (address, port, *_) = s.recvfrom(4096)
    reply = dns.message.from_wire(data)
    print(queries[reply.id] == address, port, address, reply.answer[0][0].to_text())
"""
CONNECTED = """
import socket, sys, dns.message
family, kind, server = sys.argv[1:]
s = socket.socket(getattr(socket, family), getattr(socket, kind)); s.settimeout(4)
s.connect((server, 53))
wire = dns.message.make_query("other.test", "TXT").to_wire()
if kind == "SOCK_STREAM":
    s.sendall(len(wire).to_bytes(2, "big") + wire)
    stream = s.makefile("rb"); size = int.from_bytes(stream.read(2), "big"); data = stream.read(size)
    source = s.getpeername()
else:
    s.send(wire); data, source = s.recvfrom(4096)
answer = dns.message.from_wire(data).answer[0][0]
print(s.getpeername()[:2] == (server, 53), source[:2] == (server, 53), answer)
"""
LOOK_UP = """
import socket, sys
for name in sys.argv[1:]:
    print(name, *sorted({place[0] for *_, place in socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)}))
"""
# Asks again by the same unconnected socket, which musl does.
ASK_AGAIN = """
import socket, sys, dns.message
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(0.3)
wire = dns.message.make_query("other.test", "A").to_wire()
for _ in range(30):
    s.sendto(wire, (sys.argv[1], 53))
    try: data, source = s.recvfrom(4096)
    except TimeoutError: continue
    print(dns.message.from_wire(data).answer[0][0]); break
"""
# Asks by one connected socket, and again when it is told to, until it is answered.
ASK_ACROSS = """
import socket, sys, time, dns.message
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(0.3)
s.connect((sys.argv[1], 53))
wire = dns.message.make_query(sys.argv[2], "A").to_wire()
for _ in range(2):
    for _ in range(60):
        try: s.send(wire); data = s.recv(4096)
        except OSError: time.sleep(0.2); continue
        print(dns.message.from_wire(data).answer[0][0], s.getpeername()[0], flush=True); break
    sys.stdin.readline()
"""


class Names(NamedTuple):
    """A node with `--dns`, an enrolled client, one that is not, and two servers of names."""

    node: Node
    client: Pod
    stranger: Pod
    servers: list[Pod]

    def resolv_conf(self, *servers: str, search: str = "shop.svc.cluster.local svc.cluster.local") -> Path:
        path = self.node.directory / "resolv.conf"
        lines = [f"nameserver {server}" for server in servers]
        path.write_text("\n".join([*lines, f"search {search}", "options ndots:5 timeout:1 attempts:4", ""]))
        return path


def run(code: str, pod: Pod, *words: str) -> list[str]:
    result = pod.run(sys.executable, "-c", code, *words)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def ask(pod: Pod, server: str, *questions: str, transport: str = "udp") -> list[str]:
    return run(ASK, pod, server, transport, *questions)


def is_served(pod: Pod, server: str) -> bool:
    """Whether its questions are taken by the proxy."""
    return ask(pod, server, f"{WEB}/A") == [f"NOERROR {VIP4}"]


def start_server(pod: Pod, number: int) -> None:
    process = pod.spawn(
        sys.executable, "-m", "tests.mesh.dns_server", str(number), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def enroll(node: Node, pod: Pod) -> None:
    """With a process, as a pod's sandbox has one."""
    pod.spawn("sleep", "infinity")
    node.enroll(pod)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Names]:
    node = Node(tmp_path_factory.mktemp("dns"), subnet=43)
    try:
        with node.network as network:
            client, stranger = network.add("client", 10), network.add("stranger", 11)
            servers = [network.add(f"dns-{number}", 50 + number) for number in (1, 2)]
            for number, server in enumerate(servers, 1):
                start_server(server, number)
            node.write("client", text(pod("client", *addresses(client), app="client")))
            node.write(
                "services",
                text(
                    service("web", VIP4, VIP6, app="nobody", ports={80: 8080}),
                    service("headless", "None", app="headless", ports={80: 8080}),
                    service("names", DNS_VIP, DNS_VIP6, app="names", ports={53: 53}),
                    service("no-names", "10.96.0.54", app="nobody", ports={53: 53}),
                    pod("names", *addresses(servers[0]), app="names"),
                    *(pod(f"headless-{n}", address, app="headless") for n, address in enumerate(HEADLESS)),
                ),
            )
            node.start("--dns")
            enroll(node, client)
            found = Names(node, client, stranger, servers)
            until(lambda: is_served(client, str(servers[0].address4)), "the client to be served")
            yield found
    finally:
        node.end()


@pytest.fixture(scope="module")
def other(names: Names) -> Pod:
    """Another client that is served: one pod has room for four servers of a family."""
    found = names.node.network.add("other", 93)
    names.node.write("other", text(pod("other", *addresses(found), app="client")))
    enroll(names.node, found)
    until(lambda: is_served(found, str(names.servers[0].address4)), "the other client to be served")
    return found


def addresses(pod: Pod) -> tuple[str, str]:
    return str(pod.address4), str(pod.address6)


TRANSPORTS = pytest.mark.parametrize("transport", ["udp", "tcp"])
FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])


@FAMILIES
@TRANSPORTS
def test_a_service_has_its_addresses_and_other_names_are_the_servers(
    names: Names, family: int, transport: str
) -> None:
    server = addresses(names.servers[1])[family]
    questions = (f"{WEB}/A", f"{WEB}/AAAA", "other.test/A", "other.test/AAAA", f"{WEB}/TXT", "refused.test/A")
    assert ask(names.client, server, *questions, transport=transport) == [
        f"NOERROR {VIP4}",
        f"NOERROR {VIP6}",
        "NOERROR 192.0.2.2",
        "NOERROR 2001:db8::2",
        'NOERROR "server 2"',
        "REFUSED",
    ]


@FAMILIES
@TRANSPORTS
def test_explain_says_who_answers(names: Names, family: int, transport: str) -> None:
    server = addresses(names.servers[1])[family]
    ask(names.client, server, f"{WEB}/A", transport=transport)
    to = f"[{server}]:53" if family else f"{server}:53"
    source = addresses(names.client)[family]
    found = names.node.json("explain", source, to, "--protocol", transport)
    assert (found["outcome"], found["reason"]) == ("answered", "dns_proxy")
    assert [step["map"] for step in found["steps"]][-1] == "dns_listeners"
    other_port = names.node.json("explain", source, to.removesuffix("53") + "54")
    assert other_port["outcome"] == "left alone"


def test_a_pod_that_is_not_enrolled_asks_the_server_itself(names: Names) -> None:
    assert ask(names.stranger, str(names.servers[0].address4), f"{WEB}/A") == ["NOERROR 192.0.2.1"]


@FAMILIES
@pytest.mark.parametrize("name", ["other.test", WEB])
def test_a_socket_that_asks_all_servers_hears_each_from_its_own_address(
    names: Names, family: int, name: str
) -> None:
    servers = [addresses(server)[family] for server in names.servers]
    lines = run(ASK_ALL, names.client, ["AF_INET", "AF_INET6"][family], name, *servers)
    said = [VIP4, VIP4] if name == WEB else ['"server 1"', '"server 2"']
    assert sorted(lines) == sorted(
        f"True 53 {address} {answer}" for address, answer in zip(servers, said, strict=True)
    )


@pytest.mark.parametrize("kind", ["SOCK_DGRAM", "SOCK_STREAM"])
@pytest.mark.parametrize("socket_family", ["AF_INET", "AF_INET6", "mapped"])
def test_a_connected_socket_sees_the_server_that_it_asked(
    names: Names, kind: str, socket_family: str
) -> None:
    address4, address6 = addresses(names.servers[1])
    server = {"AF_INET": address4, "AF_INET6": address6, "mapped": f"::ffff:{address4}"}[socket_family]
    family = "AF_INET" if socket_family == "AF_INET" else "AF_INET6"
    assert run(CONNECTED, names.client, family, kind, server) == ['True True "server 2"']


def test_getaddrinfo_finds_services_by_short_names(names: Names) -> None:
    conf = names.resolv_conf(str(names.servers[0].address4), str(names.servers[1].address6))
    asked = ["web", "web.shop", WEB, "other.test"]
    result = names.client.run(*with_resolv_conf(conf, sys.executable, "-c", LOOK_UP, *asked))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"web {VIP4} {VIP6}",
        f"web.shop {VIP4} {VIP6}",
        f"{WEB} {VIP4} {VIP6}",
        "other.test 192.0.2.1 2001:db8::1",
    ]


@pytest.mark.parametrize("transport", ["tcp", "fallback"])
def test_what_does_not_fit_a_datagram_comes_by_tcp(names: Names, transport: str) -> None:
    server = str(names.servers[0].address4)
    questions = ("headless.shop.svc.cluster.local/A", "big.test/TXT")
    ours, theirs = ask(names.client, server, *questions, transport=transport)
    assert ours.split() == ["NOERROR", *sorted(HEADLESS)]
    assert theirs.count("part ") == 40


def test_a_datagram_that_is_too_small_says_so(names: Names) -> None:
    code = """
import sys, dns.message, dns.query, dns.flags
query = dns.message.make_query("headless.shop.svc.cluster.local", "A")
reply = dns.query.udp(query, sys.argv[1], timeout=4)
print(bool(reply.flags & dns.flags.TC), len(reply.to_wire()) <= 512)"""
    assert run(code, names.client, str(names.servers[0].address4)) == ["True True"]


def test_a_transfer_of_a_zone_comes_whole(names: Names) -> None:
    code = """
import socket, sys, dns.message
s = socket.create_connection((sys.argv[1], 53), 4)
wire = dns.message.make_query("zone.test", "AXFR").to_wire()
s.sendall(len(wire).to_bytes(2, "big") + wire)
stream = s.makefile("rb")
for _ in range(2):
    data = stream.read(int.from_bytes(stream.read(2), "big"))
    print(data[:2] == wire[:2])"""
    assert run(code, names.client, str(names.servers[0].address4)) == ["True", "True"]


@FAMILIES
@TRANSPORTS
def test_a_server_that_is_a_service_is_reached_at_an_endpoint(
    names: Names, family: int, transport: str
) -> None:
    server = (DNS_VIP, DNS_VIP6)[family]
    names.node.until_endpoints(
        host("names"), {f"{address}:53" for address in addresses(names.servers[0])}, 53
    )
    found = ask(names.client, server, f"{WEB}/A", "other.test/A", transport=transport)
    assert found == [f"NOERROR {VIP4}", "NOERROR 192.0.2.1"]


def test_a_server_that_is_a_service_without_endpoints_fails_at_once(names: Names) -> None:
    assert ask(names.client, "10.96.0.54", f"{WEB}/A", "other.test/A") == [f"NOERROR {VIP4}", "SERVFAIL"]


def test_a_server_that_refuses_packets_fails_at_once(names: Names, other: Pod) -> None:
    assert ask(other, str(names.stranger.address4), "other.test/A") == ["SERVFAIL"]


def test_a_client_that_the_mesh_does_not_know_is_told_to_try_again(names: Names) -> None:
    unknown = names.node.network.add("unknown", 90)
    enroll(names.node, unknown)
    server = str(names.servers[0].address4)
    until(lambda: ask(unknown, server, f"{WEB}/A") == ["SERVFAIL"], "it to be served")
    assert ask(unknown, server, "other.test/TXT") == ['NOERROR "server 1"']
    names.node.write("unknown", text(pod("unknown", *addresses(unknown), app="client")))
    until(lambda: is_served(unknown, server), "it to be known")


def test_a_pod_that_is_enrolled_later_is_served_and_not_when_it_is_unenrolled(names: Names) -> None:
    late = names.node.network.add("late", 91)
    names.node.write("late", text(pod("late", *addresses(late), app="client")))
    server = str(names.servers[0].address4)
    enroll(names.node, late)
    until(lambda: is_served(late, server), "it to be served")
    names.node.cli("unenroll", "--cgroup", str(late.cgroup))
    until(lambda: ask(late, server, f"{WEB}/A") == ["NOERROR 192.0.2.1"], "it to ask the server itself")


def test_more_servers_than_there_are_ports_are_asked_directly(names: Names) -> None:
    asking = names.node.network.add("asking", 92)
    names.node.write("asking", text(pod("asking", *addresses(asking), app="client")))
    enroll(names.node, asking)
    until(lambda: is_served(asking, str(names.servers[0].address4)), "it to be served")
    for address in ("10.9.9.1", "10.9.9.2", "10.9.9.3"):
        assert is_served(asking, address)
    assert ask(asking, str(names.servers[1].address4), f"{WEB}/A") == ["NOERROR 192.0.2.2"]


def test_a_socket_bound_to_a_device_asks_the_server_itself(names: Names) -> None:
    code = """
import socket, sys, dns.message
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(4)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
s.sendto(dns.message.make_query(sys.argv[2], "A").to_wire(), (sys.argv[1], 53))
print(dns.message.from_wire(s.recv(4096)).answer[0][0])"""
    assert run(code, names.client, str(names.servers[0].address4), WEB) == ["192.0.2.1"]


def looking_up(names: Names, *asked: str) -> subprocess.Popen[str]:
    conf = names.resolv_conf(str(names.servers[0].address4))
    return look_up_on(names.client, conf, *asked)


def test_killing_the_proxy_again_and_again_fails_no_resolution(names: Names) -> None:
    process, times = looking_up(names, "other.test.", "web.shop.svc.cluster.local."), 5
    for _ in range(times):
        pid = names.node.pid_of("dns_proxy")
        os.kill(pid, signal.SIGKILL)
        until(lambda before=pid: names.node.pid_of("dns_proxy") != before, "another one")
        until(lambda: is_served(names.client, str(names.servers[0].address4)), "the client to be served")
    asked, failed = looked_up(process)
    assert failed == "[]"
    assert asked >= times


def test_a_connected_socket_goes_on_with_the_proxy_after_an_orderly_end(names: Names) -> None:
    server, pid = str(names.servers[0].address4), names.node.pid_of("dns_proxy")
    until(lambda: is_served(names.client, server), "the client to be served")
    process = names.client.spawn(
        sys.executable, "-c", ASK_ACROSS, server, "other.test",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == f"192.0.2.1 {server}\n"
    os.kill(pid, signal.SIGTERM)
    children = names.node.children
    until(lambda: any(n == "dns_proxy" and p != pid for p, n in children().items()), "another one")
    assert process.communicate("\n\n", timeout=30)[0] == f"192.0.2.1 {server}\n"


def test_a_proxy_that_stands_still_is_passed_by_within_a_second(names: Names) -> None:
    server, pid = str(names.servers[0].address4), names.node.pid_of("dns_proxy")
    until(lambda: is_served(names.client, server), "the client to be served")
    os.kill(pid, signal.SIGSTOP)
    try:
        assert run(ASK_AGAIN, names.client, server) == ["192.0.2.1"]
        process = looking_up(names, "other.test.")
        assert asks_directly(names.client, server)
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: is_served(names.client, server), "the client to be served again")
    asked, failed = looked_up(process)
    assert failed == "[]"
    assert asked > 10


def asks_directly(pod: Pod, server: str) -> bool:
    result = pod.run(sys.executable, "-c", ASK, server, "udp", f"{WEB}/A")
    return result.stdout.split() == ["NOERROR", "192.0.2.1"]


def test_without_map_writer_what_was_answered_counts_and_the_rest_is_the_servers(names: Names) -> None:
    server, pid = str(names.servers[0].address4), names.node.pid_of("map_writer")
    assert ask(names.client, DNS_VIP, f"{WEB}/A", "other.test/A") == [f"NOERROR {VIP4}", "NOERROR 192.0.2.1"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert ask(names.client, DNS_VIP, f"{WEB}/A", "other.test/A", "new.test/A") == [
            f"NOERROR {VIP4}",
            "NOERROR 192.0.2.1",
            "NOERROR 192.0.2.1",
        ]
        assert ask(names.client, server, "names.shop.svc.cluster.local/A") == ["NOERROR 192.0.2.1"]
    finally:
        os.kill(pid, signal.SIGCONT)
    until(
        lambda: ask(names.client, server, "names.shop.svc.cluster.local/A") == [f"NOERROR {DNS_VIP}"],
        "map_writer to answer again",
    )


def test_a_loader_that_starts_again_finds_the_namespaces_of_pods(names: Names) -> None:
    for process in ("bpf_loader", "dns_proxy"):
        names.node.kill(process)
    names.node.until_ready()
    until(lambda: is_served(names.client, str(names.servers[0].address4)), "the client to be served")


def test_questions_are_counted(names: Names, other: Pod) -> None:
    def counted() -> dict[str, float]:
        url = f"http://127.0.0.1:{names.node.instance.ports.dns_proxy}/metrics"
        lines = urllib.request.urlopen(url, timeout=5).read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    server = str(names.servers[0].address4)
    until(lambda: is_served(other, server), "the other client to be served")
    before = counted()
    ask(other, server, f"{WEB}/A", "other.test/A", "other.test/TXT")
    ask(other, str(names.stranger.address4), "other.test/A")
    after = counted()
    grown = {name: after[name] - before[name] for name in after if name.startswith("istio_dns")}
    assert grown["istio_dns_requests_total"] == 4
    assert grown["istio_dns_upstream_requests_total"] == 3
    assert grown["istio_dns_upstream_failures_total"] == 1
    assert grown["istio_dns_upstream_request_duration_seconds_count"] == 2
    assert after['mesh_map_entries{map="dns_listeners"}'] >= 4


def test_a_server_that_is_asked_no_more_gives_way(tmp_path: Path) -> None:
    node = Node(tmp_path, subnet=44)
    try:
        with node.network as network:
            client, *servers = (network.add(name, at) for at, name in enumerate(("client", "one", "two"), 50))
            for number, server in enumerate(servers, 1):
                start_server(server, number)
            first, last = (str(server.address4) for server in servers)
            node.write(
                "all",
                text(
                    pod("client", *addresses(client), app="client"),
                    service("web", VIP4, VIP6, app="nobody", ports={80: 8080}),
                ),
            )
            node.start("--dns", "--set", "slot_rest_s=2")
            enroll(node, client)
            until(lambda: is_served(client, first), "the client to be served")
            asked = [first, "10.9.9.1", "10.9.9.2", "10.9.9.3", last]
            assert run(ASK_EACH, client, WEB, *asked) == [VIP4] * 4 + ["192.0.2.2"]
            until(lambda: is_served(client, last), "a server to give way")
            assert ask(client, last, "other.test/A") == ["NOERROR 192.0.2.2"]
    finally:
        node.end()
