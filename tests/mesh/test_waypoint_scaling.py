"""Several instances of a waypoint: who comes, goes or is killed while clients ask, and how many there are."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pykmesh.kernel import pins
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import FRONT_KEY, ip_to_text
from services.waypoint_mgr.fleet import WAIT_S
from tests.mesh.manifests import text
from tests.mesh.node import finish, probe, python, until
from tests.mesh.waypoints import SHOP4, Mesh, ask, gateway, status, until_handed_over, waypoint_mesh

# Two clients, each with a connection that it keeps: again and again until told to end.
KEEP = f"""
import http.client, json, signal, threading
ended, found, lock = threading.Event(), {{"asked": 0, "failed": []}}, threading.Lock()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
def client():
    connection = http.client.HTTPConnection({SHOP4!r}, 80, timeout=5)
    while not ended.is_set():
        failed = None
        try:
            connection.request("GET", "/")
            answer = connection.getresponse()
            answer.read()
            failed = None if answer.status == 200 else answer.status
        except (OSError, http.client.HTTPException) as error:
            failed = repr(error)
            connection.close()
        with lock:
            found["asked"] += 1
            found["failed"] += [failed] if failed else []
        ended.wait(0.002)
threads = [threading.Thread(target=client) for _ in range(2)]
for thread in threads: thread.start()
print("ready", flush=True)
ended.wait()
for thread in threads: thread.join()
print(json.dumps(found), flush=True)
"""
HOLD = f"""
import socket, sys
held = [socket.create_connection(({SHOP4!r}, 90), 5) for _ in range(int(sys.argv[1]))]
print("ready", flush=True)
sys.stdin.read()
"""


STRANGER = """
import socket, sys
held = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with waypoint_mesh(tmp_path_factory.mktemp("ws"), 14) as found:
        yield found


def instances(mesh: Mesh) -> list[Any]:
    return [one for one in status(mesh)["instances"] if one["ready"] and not one["leaving"]]


def sized(mesh: Mesh, size: int, **annotations: str) -> list[Any]:
    """The instances, once there are so many and no others, none of them leaving."""
    mesh.node.write("gateway", text(gateway(**annotations)))

    def found() -> tuple[list[Any]] | None:
        every = status(mesh)["instances"]
        leaving = any(one["leaving"] for one in every)
        return (every,) if not leaving and len(every) == size == len(instances(mesh)) else None

    (every,) = until(found, f"{size} instances", 60)
    return list(every)


def keep_asking(mesh: Mesh) -> subprocess.Popen[str]:
    process = mesh.client.spawn(sys.executable, "-S", "-c", KEEP, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def hold(mesh: Mesh, count: int) -> subprocess.Popen[str]:
    command = (sys.executable, "-S", "-c", HOLD, str(count))
    process = mesh.client.spawn(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def served(mesh: Mesh, port: int) -> int:
    """Connections that an instance has taken, by its own count."""
    directory = next(
        path
        for path in (mesh.node.run_dir / "envoys").glob("*/")
        if f'"port":{port},' in (path / "instance.json").read_text()
    )
    command = [
        "curl",
        "-s",
        "--unix-socket",
        str(directory / "admin.sock"),
        "http://envoy/stats?filter=http.*downstream_cx_total",
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sum(int(line.rpartition(": ")[2]) for line in lines if "admin" not in line)


def test_new_connections_go_to_all_instances(mesh: Mesh) -> None:
    found = sized(mesh, 3, min_instances="3")
    before = [served(mesh, one["port"]) for one in found]
    answers = ask(mesh, 300)
    assert answers.total() == 300 == answers[200, "v1"] + answers[200, "v2"]
    shares = [served(mesh, one["port"]) - was for one, was in zip(found, before, strict=True)]
    assert sum(shares) == 300
    assert all(60 <= share <= 140 for share in shares), shares


def test_an_instance_that_is_killed_costs_what_it_was_busy_with(mesh: Mesh) -> None:
    """One client with a connection for each request: there is at most one under way at each instance."""
    sized(mesh, 3, min_instances="3")
    prober = probe(mesh.client, SHOP4, 80)
    kills = 3
    for _ in range(kills):
        victim = instances(mesh)[0]
        os.kill(victim["pid"], signal.SIGKILL)
        until(lambda v=victim: v["pid"] not in {one["pid"] for one in status(mesh)["instances"]}, "gone")
        until(lambda: len(instances(mesh)) == 3, "back")
    counted = finish(prober)
    assert counted["connections"] > 100
    assert counted["failed"] <= kills, counted["errors"]
    assert "Connection refused" not in counted["errors"]
    assert "timed out" not in counted["errors"]
    assert counted["longest_pause_ms"] < 1000


def test_scaling_in_and_out_fails_no_request(mesh: Mesh) -> None:
    sized(mesh, 1, min_instances="1", max_instances="1")
    prober, keeper = probe(mesh.client, SHOP4, 80), keep_asking(mesh)
    for size in (3, 1, 2, 1):
        sized(mesh, size, min_instances=str(size), max_instances=str(size))
    counted, kept = finish(prober), finish(keeper)
    assert counted["connections"] > 100
    assert counted["failed"] == 0, counted["errors"]
    assert kept["asked"] > 100
    assert kept["failed"] == []


def test_an_instance_whose_port_is_a_strangers_costs_the_others_nothing(mesh: Mesh) -> None:
    (first,) = sized(mesh, 1, min_instances="1", max_instances="1")
    port = first["port"] + 1
    command = (sys.executable, "-S", "-c", STRANGER, str(mesh.waypoint.address4), str(port))
    stranger = mesh.waypoint.spawn(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert stranger.stdout is not None
    assert stranger.stdout.readline() == "ready\n"
    mesh.node.write("gateway", text(gateway(min_instances="2", max_instances="2")))
    until(lambda: "cannot bind" in str([one["error"] for one in status(mesh)["instances"]]), "it to be told")
    assert len(instances(mesh)) == 1
    assert status(mesh)["reduced"] == "", "what the others have is good"
    assert ask(mesh, 20).keys() <= {(200, "v1"), (200, "v2")}
    stranger.communicate("", timeout=10)
    until(lambda: len(instances(mesh)) == 2, "the port to be free")
    assert {one["error"] for one in status(mesh)["instances"]} == {""}


def test_an_envoy_that_hangs_is_killed_and_another_one_started(mesh: Mesh) -> None:
    found = sized(mesh, 2, min_instances="2", max_instances="2")
    os.kill(found[0]["pid"], signal.SIGSTOP)
    until(lambda: [one["pid"] for one in instances(mesh)] == [found[1]["pid"]], "the others to be left", 15)
    assert ask(mesh, 40).keys() <= {(200, "v1"), (200, "v2")}
    until(lambda: found[0]["pid"] not in {one["pid"] for one in status(mesh)["instances"]}, "killed", 60)
    until(lambda: len(instances(mesh)) == 2, "back")
    assert ask(mesh, 40).keys() <= {(200, "v1"), (200, "v2")}


def test_the_size_follows_the_connections_and_says_why(mesh: Mesh) -> None:
    sized(mesh, 1, target_connections="2", scale_in_after="2")
    holder = hold(mesh, 6)
    try:
        until(lambda: len(instances(mesh)) == 3, "three instances for six connections")
        told = mesh.node.cli("waypoint", "status").stdout
        assert "3 of 1 to 4 instances: " in told
        assert "connections each, target 2" in told
    finally:
        holder.kill()
        holder.communicate()
    until(lambda: len(status(mesh)["instances"]) == 1, "one again", 60)


def test_with_nothing_to_do_there_is_none_and_the_next_connections_wait_for_one(mesh: Mesh) -> None:
    """However long there was none, and however many connect before there is one."""
    sized(mesh, 0, min_instances="0", scale_in_after="1")
    assert status(mesh)["scaling"]["size"] == 0
    assert mesh.node.cli("waypoint", "status").returncode == 0
    time.sleep(WAIT_S + 1)
    assert not status(mesh)["instances"], "nobody woke it"
    prober = probe(mesh.client, SHOP4, 80)
    until(lambda: instances(mesh), "one")
    counted = finish(prober)
    assert counted["errors"].keys() <= {"TimeoutError"}, counted["errors"]
    assert ask(mesh, 5).total() == 5
    assert len(status(mesh)["instances"]) == 1


def test_the_only_instance_killed_makes_connections_wait_and_refuses_none(mesh: Mesh) -> None:
    (victim,) = sized(mesh, 1, min_instances="1", max_instances="1")
    os.kill(victim["pid"], signal.SIGKILL)
    until(lambda: status(mesh)["instances"][0]["pid"] != victim["pid"], "ended")
    answers = ask(mesh, 3)
    assert answers.total() == answers[200, "v1"] + answers[200, "v2"] == 3


def test_an_annotation_that_is_wrong_is_told_and_changes_nothing(mesh: Mesh) -> None:
    sized(mesh, 1, min_instances="many", max_instances="1")
    until(lambda: status(mesh)["annotations_misread"], "read")
    told = mesh.node.cli("waypoint", "status", check=False)
    assert told.returncode == 1
    assert "annotation pykmesh.io/min-instances: 'many': expected a number from 0 to 32" in told.stdout


def test_the_front_is_nobodys_way_in(mesh: Mesh) -> None:
    sized(mesh, 2, min_instances="2")
    until_handed_over(mesh)
    address, port = status(mesh)["scaling"]["front"].split(":")
    code = f"""
import socket
with socket.create_connection(({address!r}, {port}), 5) as s:
    s.settimeout(5)
    try:
        s.sendall(b"GET / HTTP/1.1\\r\\nhost: shop\\r\\n\\r\\n")
        print(s.recv(100))
    except ConnectionError:
        print(b"")
"""
    assert python(mesh.client, code) == "b''"


def test_who_comes_after_a_manager_finds_front_and_instances(mesh: Mesh) -> None:
    before = sized(mesh, 2, min_instances="2")
    front = status(mesh)["scaling"]["front"]
    prober = probe(mesh.client, SHOP4, 80)
    mesh.node.kill("waypoint_mgr")
    mesh.node.until_ready()
    until(lambda: len(instances(mesh)) == 2, "both known")
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]
    assert {one["pid"] for one in status(mesh)["instances"]} == {one["pid"] for one in before}
    assert status(mesh)["scaling"]["front"] == front


@pytest.mark.parametrize("count", [1, 2])
def test_what_instances_kept_is_damaged_and_they_are_adopted_all_the_same(mesh: Mesh, count: int) -> None:
    """Which process it is, its cgroup says too; whose it is and where it listens, Envoy does."""
    before = sized(mesh, count, min_instances=str(count), max_instances=str(count))
    stray = mesh.node.run_dir / "envoys" / "stray"
    (stray / "sub").mkdir(parents=True)
    prober = probe(mesh.client, SHOP4, 80)
    os.kill(mesh.node.pid_of("waypoint_mgr"), signal.SIGSTOP)
    for one, text_ in zip(before, (b'{"waypoint":"\xff"}', b""), strict=False):
        for name, content in (("process.stat", b"17"), ("instance.json", text_), ("bootstrap.json", b"{")):
            (mesh.node.run_dir / "envoys" / one["name"] / name).write_bytes(content)
    mesh.node.kill("waypoint_mgr")
    mesh.node.until_ready()
    until(lambda: len(instances(mesh)) == count, "all known")
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]
    assert {one["pid"]: one["port"] for one in status(mesh)["instances"]} == {
        one["pid"]: one["port"] for one in before
    }
    assert (stray / "sub").exists(), "what is no instance is left alone"
    shutil.rmtree(stray)


def test_who_comes_after_a_manager_keeps_the_size_for_a_while(mesh: Mesh) -> None:
    sized(mesh, 3, min_instances="3")
    os.kill(mesh.node.pid_of("waypoint_mgr"), signal.SIGSTOP)  # it hears nothing of what is said now
    mesh.node.write("gateway", text(gateway(scale_in_after="300")))
    mesh.node.kill("waypoint_mgr")
    mesh.node.until_ready()
    until(lambda: len(instances(mesh)) == 3, "all known")
    until(lambda: "were needed" in status(mesh)["scaling"]["why"], "a decision")
    assert status(mesh)["scaling"]["size"] == 3


def test_an_instance_that_drains_leaves_also_when_the_manager_was_killed(mesh: Mesh) -> None:
    sized(mesh, 2, min_instances="2", max_instances="2")
    holder = hold(mesh, 8)
    try:
        mesh.node.write("gateway", text(gateway(max_instances="1")))
        leaves = until(
            lambda: [one["pid"] for one in status(mesh)["instances"] if one["leaving"]], "one to leave"
        )
        mesh.node.kill("waypoint_mgr")
        mesh.node.until_ready()
        mesh.node.write("gateway", text(gateway(min_instances="2", max_instances="2")))
        stay = until(lambda: len(found := instances(mesh)) == 2 and found, "another in its place")
        assert {one["pid"] for one in stay}.isdisjoint(leaves)
    finally:
        holder.kill()
        holder.communicate()


def test_a_gateway_that_is_gone_for_a_moment_keeps_one_front(mesh: Mesh) -> None:
    """What it left is given up, and connections come in at one place only."""
    sized(mesh, 2, min_instances="2")
    for _ in range(3):
        mesh.node.write("gateway", "# gone\n")
        until(lambda: not mesh.node.status()["processes"]["waypoint_mgr"]["waypoints"], "gone")
        mesh.node.write("gateway", text(gateway(min_instances="2")))
        until(lambda: mesh.node.status()["processes"]["waypoint_mgr"]["waypoints"], "back")
    sized(mesh, 2, min_instances="2")
    until_handed_over(mesh)
    until(lambda: ask(mesh, 3)[200, "v1"] + ask(mesh, 3)[200, "v2"] > 0, "served")
    with PinnedMap(pins.maps_dir(mesh.node.pin_dir), "fronts") as fronts:
        (key,) = [key for key, _ in fronts.items()]
    address, port = FRONT_KEY.unpack(key)
    assert status(mesh)["scaling"]["front"] == f"{ip_to_text(address)}:{port}"
