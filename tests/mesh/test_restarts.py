"""Nothing that happens to the mesh's own processes touches traffic."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.mesh.conftest import VIP4, Mesh, web_manifests
from tests.mesh.manifests import host
from tests.mesh.node import finish, probe, until

PROCESSES = ["bpf_loader", "map_writer", "xds_client", "telemetry", "nats", "control_plane"]


@pytest.mark.parametrize("process", PROCESSES)
def test_killing_a_process_fails_no_connection(mesh: Mesh, process: str) -> None:
    prober = probe(mesh.client, VIP4, 80)
    before = mesh.node.pid_of(process)
    mesh.node.kill(process)
    mesh.node.until_ready()
    assert mesh.node.pid_of(process) != before
    found = finish(prober)
    assert found["failed"] == 0, found["errors"]
    assert found["connections"] > 20
    assert set(found["answers"]) == {"web-1", "web-2"}


@pytest.mark.parametrize("process", PROCESSES)
def test_a_change_made_after_a_kill_arrives(mesh: Mesh, process: str) -> None:
    mesh.node.kill(process)
    mesh.node.write("web", web_manifests(mesh.web[0]))
    mesh.node.until_endpoints(
        host("web"), {f"{mesh.web[0].address4}:8080", f"{mesh.web[0].address6}:8080"}, 80
    )
    mesh.node.write("web", web_manifests(*mesh.web))
    both = {f"{address}:8080" for w in mesh.web for address in (w.address4, w.address6)}
    mesh.node.until_endpoints(host("web"), both, 80)
    mesh.node.until_ready()


def test_traffic_goes_on_while_the_mesh_is_down_and_when_it_comes_back(mesh: Mesh) -> None:
    prober = probe(mesh.client, VIP4, 80)
    mesh.node.cli("down")
    mesh.node.start()
    found = finish(prober)
    assert found["failed"] == 0, found["errors"]
    assert found["connections"] > 20


def test_killing_what_the_processes_are_forks_of_starts_them_again_and_fails_no_connection(
    mesh: Mesh,
) -> None:
    prober = probe(mesh.client, VIP4, 80)
    before = mesh.node.children()
    os.kill(mesh.node.fork_server(), signal.SIGKILL)
    until(lambda: not before.keys() & mesh.node.children().keys(), "the old ones to end")
    until(lambda: sorted(mesh.node.children().values()) == sorted(before.values()), "others")
    mesh.node.until_ready()
    found = finish(prober)
    assert found["failed"] == 0, found["errors"]
    assert found["connections"] > 20


def test_killing_the_supervisor_ends_its_processes_and_fails_no_connection(mesh: Mesh) -> None:
    prober = probe(mesh.client, VIP4, 80)
    pids = mesh.node.children()
    os.kill(mesh.node.instance.pid, signal.SIGKILL)
    until(lambda: not any((Path("/proc") / str(pid)).exists() for pid in pids), "its processes to end")
    mesh.node.start()
    found = finish(prober)
    assert found["failed"] == 0, found["errors"]
    assert found["connections"] > 20
