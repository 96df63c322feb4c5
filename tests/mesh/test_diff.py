"""`pykmesh diff` on a node whose maps are written to behind the mesh's back."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykmesh.kernel import pins
from pykmesh.kernel.layout import AddressKind, Reason
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ADDRESS_VALUE,
    ENDPOINT_KEY,
    ENDPOINT_VALUE,
    RANGE_KEY,
    RANGE_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    ip_from_text,
    port_bytes,
)
from pykmesh.node.ask import fetch
from tests.mesh.manifests import host, pod, service, text
from tests.mesh.node import Node, until
from tests.mesh.test_choice import entry

VIP = "10.96.0.10"
ENDPOINTS = {"10.9.0.1:8080", "10.9.0.2:8080", "10.9.0.3:8080"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("diff"), subnet=9)
    try:
        pods = [pod(f"web-{n}", f"10.9.0.{n}", app="web") for n in (1, 2, 3)]
        heavy = [{"address": f"10.9.1.{n}", "weight": n} for n in (1, 2, 3)]
        node.write("web", text(service("web", VIP, app="web", ports={80: 8080}), *pods))
        node.write("more", text(entry(*heavy), entry(*heavy, name="range", address="240.20.0.0/16")))
        node.start()
        node.until_endpoints(host("web"), ENDPOINTS)
        yield node
    finally:
        node.end()


def write_web(node: Node, *numbers: int) -> None:
    pods = [pod(f"web-{n}", f"10.9.0.{n}", app="web") for n in numbers]
    node.write("web", text(service("web", VIP, app="web", ports={80: 8080}), *pods))
    node.until_endpoints(host("web"), {f"10.9.0.{n}:8080" for n in numbers})


@contextlib.contextmanager
def opened(node: Node, name: str) -> Iterator[PinnedMap]:
    with PinnedMap(pins.maps_dir(node.pin_dir), name) as found:
        yield found


def differences(node: Node) -> list[dict[str, Any]]:
    result = node.cli("diff", "-o", "json", check=False)
    value = json.loads(result.stdout)
    assert result.returncode == (1 if value["differences"] else 0), result.stderr
    assert value["left_out"] == {}
    found: list[dict[str, Any]] = value["differences"]
    return found


def the_only(node: Node) -> tuple[str, str, str, str]:
    (found,) = differences(node)
    assert found["between"] == "state and kernel"
    return found["what"], found["where"], found["expected"], found["found"]


def list_of(node: Node, vip: str, port: int) -> int:
    with opened(node, "services") as services:
        value = services.get(SERVICE_KEY.pack(ip_from_text(vip), 0, port_bytes(port)))
    assert value is not None
    return int(SERVICE_VALUE.unpack(value)[0])


@contextlib.contextmanager
def changed(node: Node, name: str, key: bytes, value: bytes | None) -> Iterator[None]:
    """For as long as the block runs an entry is another, or is not there."""
    with opened(node, name) as entries:
        before = entries.get(key)
        try:
            if value is None:
                assert entries.remove(key)
            else:
                entries.put(key, value)
            yield
        finally:
            if before is None:
                entries.remove(key)
            else:
                entries.put(key, before)


def test_nothing_differs_on_a_node_that_is_left_alone(node: Node) -> None:
    assert node.cli("diff").stdout == "no differences: 3 services, 9 endpoints, 9 addresses compared\n"


def test_a_changed_endpoint_is_named(node: Node) -> None:
    number = list_of(node, VIP, 80)
    key = ENDPOINT_KEY.pack(number, 1)
    with opened(node, "endpoints") as endpoints:
        before = endpoints.get(key)
    assert before is not None
    value = ENDPOINT_VALUE.pack(number, ip_from_text("10.66.66.66"), port_bytes(6))
    with changed(node, "endpoints", key, value):
        what, where, expected, found = the_only(node)
        assert (what, where) == ("endpoint", f"{host('web')} port 80 IPv4 slot 1")
        assert expected in ENDPOINTS
        assert found == "10.66.66.66:6"
        line = node.cli("diff", check=False).stdout
        assert line == f"state and kernel: {what} {where}: expected {expected}, found {found}\n"
    with changed(node, "endpoints", key, None):
        assert the_only(node)[2:] == (expected, "nothing")
    with changed(node, "endpoints", key, before[:-1] + b"\x01"):
        assert the_only(node)[3].startswith(f"{expected} ")


def test_a_changed_weight_is_named(node: Node) -> None:
    number = list_of(node, "240.10.0.1", 80)
    key = ENDPOINT_KEY.pack(number, 0)
    with opened(node, "endpoints") as endpoints:
        before = endpoints.get(key)
    assert before is not None
    _, ip, port = ENDPOINT_VALUE.unpack(before)
    with changed(node, "endpoints", key, ENDPOINT_VALUE.pack(number, ip, port)):
        what, where, expected, found = the_only(node)
        assert (what, where) == ("endpoint", "shop/choice.example port 80 IPv4 slot 0")
        assert "of 2^32 draws" in expected
        assert found.endswith(":80")


def test_an_address_that_is_gone_or_another_is_named(node: Node) -> None:
    key = ADDRESS_KEY.pack(ip_from_text("10.9.0.1"), 0)
    with changed(node, "addresses", key, None):
        assert the_only(node) == ("address", "10.9.0.1", "workload, routed", "nothing")
    other = key + ADDRESS_VALUE.pack(AddressKind.SERVICE, Reason.NO_ROOM, 0)[len(key) :]
    with changed(node, "addresses", key, other):
        assert the_only(node) == ("address", "10.9.0.1", "workload, routed", "service, no_room")
    with changed(node, "addresses", key, bytes(len(key)) + other[len(key) :]):
        assert the_only(node)[3] == "a value that does not begin with its key"


def test_stray_entries_are_named(node: Node) -> None:
    number = list_of(node, VIP, 80)
    key = SERVICE_KEY.pack(ip_from_text(VIP), 0, port_bytes(81))
    value = key + SERVICE_VALUE.pack(number, 3, Reason.ROUTED, 0, 0)[len(key) :]
    with changed(node, "services", key, value):
        there = f"3 endpoints of {host('web')} port 80 IPv4, routed"
        assert the_only(node) == ("service port", f"{VIP}:81", "nothing", there)
    key = ENDPOINT_KEY.pack(number, 2**32 - 1)
    with changed(node, "endpoints", key, ENDPOINT_VALUE.pack(number, ip_from_text("10.6.6.6"), b"\0\7")):
        where = f"{host('web')} port 80 IPv4 slot {2**32 - 1}"
        assert the_only(node) == ("endpoint", where, "nothing", "10.6.6.6:7")
    with changed(node, "endpoints", ENDPOINT_KEY.pack(77, 0), ENDPOINT_VALUE.pack(77, bytes(16), b"\0\7")):
        assert the_only(node) == ("endpoint", f"list {77:016x} slot 0", "nothing", "[::]:7")
    key = ADDRESS_KEY.pack(ip_from_text("fd99::1"), 5)
    value = key + ADDRESS_VALUE.pack(AddressKind.WORKLOAD, Reason.ROUTED, 0)[len(key) :]
    with changed(node, "addresses", key, value):
        where = "fd99::1 in network 00000005"
        assert the_only(node) == ("address", where, "nothing", "workload, routed")
    key = RANGE_KEY.pack(32 + 96 + 8, 0, ip_from_text("10.0.0.0"))
    with changed(node, "ranges", key, RANGE_VALUE.pack(ip_from_text("240.20.0.0"), 9)):
        where = "240.20.0.0 in network 00000009"
        assert the_only(node) == ("range", "10.0.0.0/8", "nothing", f"looked up as {where}")


def test_the_length_of_a_list_counts(node: Node) -> None:
    number = list_of(node, VIP, 80)
    key = SERVICE_KEY.pack(ip_from_text(VIP), 0, port_bytes(80))
    with changed(
        node, "services", key, key + SERVICE_VALUE.pack(number, 2, Reason.NO_PORT, 0, 0)[len(key) :]
    ):
        name = f"endpoints of {host('web')} port 80 IPv4"
        assert the_only(node) == (
            "service port", f"{VIP}:80", f"3 {name}, routed", f"2 {name}, no_port",
        )  # fmt: skip


def test_looking_changes_nothing_and_changes_go_on(node: Node) -> None:
    key = ADDRESS_KEY.pack(ip_from_text("10.9.0.3"), 0)
    with changed(node, "addresses", key, None):
        before = fetch(node.instance.ports.map_writer, "/status")["last_write"]
        assert the_only(node)[0] == "address"
        assert fetch(node.instance.ports.map_writer, "/status")["last_write"] == before
        assert the_only(node)[0] == "address"
    write_web(node, 1, 4)
    assert differences(node) == []


def test_changes_under_way_are_no_differences(node: Node) -> None:
    over = threading.Event()

    def churn() -> None:
        for draw in map(random.Random, itertools.count()):
            if over.wait(0.03):
                return
            pods = [pod(f"web-{n}", f"10.9.0.{n}", app="web") for n in draw.sample(range(1, 200), 60)]
            node.write("web", text(service("web", VIP, app="web", ports={80: 8080}), *pods))

    changing = threading.Thread(target=churn)
    changing.start()
    try:
        for _ in range(4):
            assert differences(node) == []
    finally:
        over.set()
        changing.join()
        write_web(node, 1, 4)


def test_a_control_plane_that_is_not_followed_differs_from_the_state(node: Node, tmp_path: Path) -> None:
    """The broker stands still: xds_client hears of a service, and map_writer does not."""
    broker = node.pid_of("nats")
    os.kill(broker, signal.SIGSTOP)
    try:
        node.write("late", text(service("late", "10.96.0.77", app="late", ports={80: 80})))
        page = "/services"
        until(
            lambda: host("late") in str(fetch(node.instance.ports.xds_client, page)), "the service to be said"
        )
        (found,) = differences(node)
        assert (found["between"], found["where"]) == ("control plane and state", host("late"))
        assert found["expected"].startswith("contents ")
        assert found["found"] == "nothing"
    finally:
        os.kill(broker, signal.SIGCONT)
    until(lambda: differences(node) == [], "the state to follow")


@pytest.mark.parametrize(
    ("process", "left_out"),
    [
        ("xds_client", {"control plane and state"}),
        ("map_writer", {"control plane and state", "state and kernel"}),
    ],
)
def test_a_process_that_is_away_leaves_a_comparison_out(node: Node, process: str, left_out: set[str]) -> None:
    os.kill(node.instance.pid, signal.SIGSTOP)  # the supervisor: what is killed stays away
    try:
        node.kill(process)
        result = node.cli("diff", "-o", "json", check=False)
        assert result.returncode == 2, result.stdout
        said = json.loads(result.stdout)
        assert said["left_out"].keys() == left_out
        assert all(f"{process} does not answer" in why for why in said["left_out"].values())
        assert f"not compared: control plane and state: {process}" in node.cli("diff", check=False).stderr
        key = ADDRESS_KEY.pack(ip_from_text("10.9.0.1"), 0)
        if process == "xds_client":
            with changed(node, "addresses", key, None):
                assert node.cli("diff", check=False).returncode == 1
    finally:
        os.kill(node.instance.pid, signal.SIGCONT)
        node.until_ready()


def test_a_start_removes_what_differs(node: Node) -> None:
    with opened(node, "endpoints") as endpoints, opened(node, "addresses") as addresses:
        for slot in (5, 2**32 - 1):
            endpoints.put(ENDPOINT_KEY.pack(77, slot), ENDPOINT_VALUE.pack(77, bytes(16), b"\0\7"))
        assert addresses.remove(ADDRESS_KEY.pack(ip_from_text("10.9.0.1"), 0))
        assert len(differences(node)) == 3
        node.kill("map_writer")
        until(lambda: node.cli("diff", check=False).returncode == 0, "map_writer to have mended the maps")
        assert not any(endpoints.get(ENDPOINT_KEY.pack(77, slot)) for slot in (5, 2**32 - 1))


def test_without_a_mesh_it_cannot_be_told(tmp_path: Path) -> None:
    node = Node.__new__(Node)
    node.name, node.run_dir, node.pin_dir = "none", tmp_path / "run", tmp_path / "bpf"
    result = node.cli("diff", check=False)
    assert result.returncode == 2
    assert "is not running" in result.stderr
