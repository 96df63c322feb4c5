"""A service for which the maps have no room: refused, and called by what it is."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykmesh.demo.pods import Pod
from tests.mesh.conftest import VIP4
from tests.mesh.manifests import Object, host, pod, service, text
from tests.mesh.node import Node, python, serve, until

OTHER = "10.96.0.20"
CONNECT = """
import socket
s = socket.socket(); s.settimeout(5)
print(s.connect_ex(({address!r}, {port})))
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path, subnet=3)
    try:
        with node.network:
            yield node
    finally:
        node.end()


def with_room_for_one(node: Node, setting: str) -> tuple[Pod, Pod, Object]:
    """A client and an endpoint of a service that takes all the room there is."""
    client, web = node.network.add("client", 10), node.network.add("web-1", 20)
    serve(web, "--http", "8080")
    member = pod("web-1", str(web.address4), app="web")
    node.write("web", text(service("web", VIP4, app="web", ports={80: 8080}), member))
    node.start("--set", setting)
    node.enroll(client)
    node.until_endpoints(host("web"), {f"{web.address4}:8080"})
    return client, web, member


def refused(node: Node) -> dict[str, str]:
    found: dict[str, str] = node.status()["processes"]["map_writer"]["refused"]
    return found


def last_refusal(node: Node) -> str:
    return node.cli("observe", "--verdict", "refused", "--last", "1").stdout.rstrip()


def test_a_service_without_room_is_refused_as_such_until_it_has_room(node: Node) -> None:
    client, web, member = with_room_for_one(node, "services_max=1")

    node.write("late", text(service("late", OTHER, app="web", ports={80: 8080})))
    until(lambda: refused(node) == {host("late"): "map services is full (1 entries)"}, "refused by name")
    for port in (80, 81):
        assert python(client, CONNECT.format(address=OTHER, port=port)) == str(errno.ECONNREFUSED)
        until(lambda p=port: last_refusal(node).endswith(f"-> late.shop:{p}  TCP refused no_room"), "told")
    assert python(client, CONNECT.format(address=VIP4, port=80)) == "0"
    assert python(client, CONNECT.format(address=VIP4, port=81)) == str(errno.ECONNREFUSED)
    until(lambda: last_refusal(node).endswith("-> web.shop:81  TCP refused no_port"), "told")

    node.write("web", text(member))
    node.until_endpoints(host("late"), {f"{web.address4}:8080"})  # its service comes after them
    until(lambda: python(client, CONNECT.format(address=OTHER, port=80)) == "0", "a way to it")
    assert python(client, CONNECT.format(address=OTHER, port=81)) == str(errno.ECONNREFUSED)
    until(lambda: last_refusal(node).endswith("-> late.shop:81  TCP refused no_port"), "told")


def test_a_service_without_room_for_its_endpoints_is_refused_as_such_until_it_has_room(node: Node) -> None:
    client, web, member = with_room_for_one(node, "endpoints_max=1")

    node.write("late", text(service("late", OTHER, app="web", ports={80: 8080})))
    until(lambda: list(refused(node).values()) == ["map endpoints is full (1 entries)"], "refused by name")
    for port, reason in ((80, "no_room"), (81, "no_port")):
        assert python(client, CONNECT.format(address=OTHER, port=port)) == str(errno.ECONNREFUSED)
        told = f"-> late.shop:{port}  TCP refused {reason}"
        until(lambda t=told: last_refusal(node).endswith(t), told)

    node.write("web", text(member))
    node.until_endpoints(host("late"), {f"{web.address4}:8080"})
    assert python(client, CONNECT.format(address=OTHER, port=80)) == "0"
