"""Services and pods that are made, changed and removed in the API server, and connections meanwhile."""

from __future__ import annotations

import errno

from tests.istio.conftest import Mesh
from tests.istio.namespace import Namespace
from tests.istio.traffic import answers, at, refusal, workload
from tests.mesh.manifests import service
from tests.mesh.node import python, until
from tests.mesh.test_choice import entry
from tests.mesh.test_traffic import ASK, PEER


def test_a_service_is_reached_over_both_families_while_it_grows_and_shrinks(
    mesh: Mesh, namespace: Namespace
) -> None:
    namespace.apply(service("web", app="web", ports={80: 8080}))
    for count in (1, 3, 2):
        servers = mesh.web[:count]
        namespace.apply(*map(workload, servers))
        for left_out in mesh.web[count:] if count == 2 else ():
            namespace.delete("Pod", left_out.name)
        mesh.node.until_endpoints(namespace.host("web"), at(8080, *servers))
        for address in namespace.vips("web"):
            assert answers(mesh.client, address) == {server.name for server in servers}


def test_a_pod_gets_connections_while_it_is_ready(mesh: Mesh, namespace: Namespace) -> None:
    first, second, _ = mesh.web
    namespace.apply(service("web", app="web", ports={80: 8080}), workload(first), workload(second))
    mesh.node.until_endpoints(namespace.host("web"), at(8080, first, second))
    namespace.apply(workload(second, ready=False))
    mesh.node.until_endpoints(namespace.host("web"), at(8080, first))
    address = namespace.vips("web")[0]
    assert answers(mesh.client, address) == {first.name}
    namespace.apply(workload(first, ready=False))
    mesh.node.until_endpoints(namespace.host("web"), set())
    assert refusal(mesh.client, address) == errno.ECONNREFUSED
    namespace.apply(workload(second))
    mesh.node.until_endpoints(namespace.host("web"), at(8080, second))
    assert answers(mesh.client, address) == {second.name}


def test_a_port_of_a_service_changes_and_the_old_one_is_refused(mesh: Mesh, namespace: Namespace) -> None:
    server = mesh.web[0]
    namespace.apply(service("web", app="web", ports={80: 8080}), workload(server))
    mesh.node.until_endpoints(namespace.host("web"), at(8080, server), 80)
    namespace.apply(service("web", app="web", ports={81: 8081}))
    mesh.node.until_endpoints(namespace.host("web"), at(8081, server))
    for address in namespace.vips("web"):
        assert answers(mesh.client, address, 81) == {server.name}
        assert refusal(mesh.client, address, 80) == errno.ECONNREFUSED


def test_a_port_by_name_is_each_pods_own(mesh: Mesh, namespace: Namespace) -> None:
    first, second, without = mesh.web
    namespace.apply(
        service("web", app="web", ports={80: "http"}),
        workload(first, ports={"http": 8080}),
        workload(second, ports={"http": 8081}),
        workload(without, ports={"grpc": 8080}),
    )
    mesh.node.until_endpoints(namespace.host("web"), at(8080, first) | at(8081, second))
    for address in namespace.vips("web"):
        assert answers(mesh.client, address) == {first.name, second.name}


def test_a_headless_service_leaves_its_pods_addresses_alone(mesh: Mesh, namespace: Namespace) -> None:
    server = mesh.web[0]
    namespace.apply(service("web", "None", app="web", ports={80: 8080}), workload(server))
    until(lambda: namespace.host("web") in mesh.node.cli("get", "services", "-o", "json").stdout, "known")
    for family, address in (("AF_INET", str(server.address4)), ("AF_INET6", str(server.address6))):
        code = ASK.format(family=family, address=address, port=8080) + PEER
        assert python(mesh.client, code) == str((address, 8080))


def test_a_service_entry_leads_to_its_endpoints(mesh: Mesh, namespace: Namespace) -> None:
    first, second, _ = mesh.web
    outside = [{"address": str(server.address4), "ports": {"udp": 8080}} for server in (first, second)]
    namespace.apply(entry(*outside, name="outside", address="240.10.1.1"))
    host = f"{namespace.name}/outside.example"
    mesh.node.until_endpoints(host, {f"{first.address4}:8080", f"{second.address4}:8080"})
    assert answers(mesh.client, "240.10.1.1") == {first.name, second.name}
    namespace.apply(entry(outside[1], name="outside", address="240.10.1.1"))
    mesh.node.until_endpoints(host, {f"{second.address4}:8080"})
    assert answers(mesh.client, "240.10.1.1") == {second.name}
    namespace.delete("ServiceEntry")
    mesh.node.until_endpoints(host, set())


def test_a_service_entry_selects_pods(mesh: Mesh, namespace: Namespace) -> None:
    server = mesh.web[0]
    selecting = entry(name="chosen", address="240.10.1.2")
    selecting["spec"] |= {
        "workloadSelector": {"labels": {"app": "web"}},
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8081}],
    }
    del selecting["spec"]["endpoints"]
    namespace.apply(selecting, workload(server))
    mesh.node.until_endpoints(f"{namespace.name}/chosen.example", {f"{server.address4}:8081"})
    assert answers(mesh.client, "240.10.1.2") == {server.name}


def test_an_address_that_another_pod_gets_serves_that_one_only(mesh: Mesh, namespace: Namespace) -> None:
    moved, other, _ = mesh.web
    namespace.apply(
        service("old", app="old", ports={80: 8080}),
        service("new", app="new", ports={80: 8081}),
        workload(moved, "old", name="old-1"),
        workload(other, "new", name="new-1"),
    )
    mesh.node.until_endpoints(namespace.host("old"), at(8080, moved))
    mesh.node.until_endpoints(namespace.host("new"), at(8081, other))
    namespace.delete("Pod", "old-1")
    namespace.apply(workload(moved, "new", name="new-2"))
    mesh.node.until_endpoints(namespace.host("new"), at(8081, moved, other))
    assert mesh.node.endpoints(namespace.host("old")) == set()
    for old, new in zip(namespace.vips("old"), namespace.vips("new"), strict=True):
        assert refusal(mesh.client, old) == errno.ECONNREFUSED
        assert answers(mesh.client, new) == {moved.name, other.name}


def test_a_service_that_is_deleted_is_an_address_like_any_other(mesh: Mesh, namespace: Namespace) -> None:
    namespace.apply(service("web", app="web", ports={80: 8080}), workload(mesh.web[0]))
    mesh.node.until_endpoints(namespace.host("web"), at(8080, mesh.web[0]))
    address = namespace.vips("web")[0]
    namespace.delete("Service")
    until(
        lambda: address not in mesh.node.cli("get", "services", "--from", "bpf", "-o", "json").stdout,
        "out of the maps",
    )
    assert refusal(mesh.client, address) not in (0, errno.ECONNREFUSED)
