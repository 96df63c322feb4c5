"""Running a node: what the command line says when something stands in the way, and what it leaves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykmesh.kernel import libbpf
from pykmesh.kernel.cgroups import find_root, of_process
from pykmesh.kernel.hooks import HOOKS
from pykmesh.node.instance import InstanceError, running
from tests.mesh.conftest import VIP4
from tests.mesh.manifests import host, pod, service, text
from tests.mesh.node import Node, finish, probe, serve, until


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path, subnet=1)
    try:
        with node.network:
            yield node
    finally:
        node.end()


@pytest.fixture
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    other = Node(tmp_path_factory.mktemp("other"), subnet=2)
    try:
        with other.network:
            yield other
    finally:
        other.end()


def attached(cgroup: Path) -> int:
    """How many programs stand on a cgroup itself."""
    fd = os.open(cgroup, os.O_RDONLY)
    try:
        return sum(len(libbpf.query_programs(fd, hook.attach_type, effective=False)) for hook in HOOKS)
    finally:
        os.close(fd)


def test_down_leaves_traffic_and_uninstall_leaves_nothing(node: Node) -> None:
    client, web = node.network.add("client", 10), node.network.add("web-1", 20)
    serve(web, "--http", "8080")
    node.write(
        "web",
        text(service("web", VIP4, app="web", ports={80: 8080}), pod("web-1", str(web.address4), app="web")),
    )
    node.start()
    node.enroll(client)
    node.until_endpoints(host("web"), {f"{web.address4}:8080"})
    assert attached(client.cgroup) == len(HOOKS)
    node.cli("down")
    prober = probe(client, VIP4, 80)
    assert client.run("curl", "-sS", "--max-time", "5", f"http://{VIP4}/").stdout == "web-1\n"
    assert finish(prober)["failed"] == 0
    assert node.cli("get", "endpoints", "--from", "bpf").returncode == 0
    node.cli("uninstall")
    assert attached(client.cgroup) == 0
    assert not node.pin_dir.exists()
    assert not node.run_dir.exists()


def test_the_instance_may_stand_behind_the_command(node: Node) -> None:
    node.write("empty", "# nothing yet\n")

    def cli(*words: str) -> str:
        command = [sys.executable, "-m", "pykmesh", *words, *node.place]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}\n{node.logs()}"
        return result.stdout

    assert f"instance {node.name} is ready" in cli("up", "-d", "--free-ports", *node.options)
    assert json.loads(cli("status", "-o", "json"))["instance"] == node.name == node.status()["instance"]
    assert f"instance {node.name} is down" in cli("down")
    cli("uninstall")
    assert not node.run_dir.exists()


def test_unenroll_takes_every_program_off(node: Node) -> None:
    client = node.network.add("client", 10)
    node.start()
    node.enroll(client)
    node.cli("unenroll", "--cgroup", str(client.cgroup))
    assert attached(client.cgroup) == 0
    assert node.status()["processes"]["bpf_loader"]["enrolled"] == []
    refused = node.cli("unenroll", "--cgroup", str(client.cgroup), check=False)
    assert refused.returncode == 1
    assert "is not enrolled" in refused.stderr


def test_enrolling_works_while_the_bus_is_away(node: Node) -> None:
    client = node.network.add("client", 10)
    node.start()
    os.kill(node.pid_of("nats"), signal.SIGSTOP)
    try:
        node.enroll(client)
        assert attached(client.cgroup) == len(HOOKS)
    finally:
        os.kill(node.pid_of("nats"), signal.SIGCONT)


def test_a_process_is_enrolled_by_its_id(node: Node) -> None:
    client = node.network.add("client", 10)
    node.start()
    sleeper = client.spawn("sleep", "60")
    until(lambda: str(sleeper.pid) in (client.cgroup / "cgroup.procs").read_text(), "in its cgroup")
    until(
        lambda: Path(f"/proc/{sleeper.pid}/ns/net").stat().st_ino == client.netns.stat().st_ino,
        "in its namespace",
    )
    node.cli("enroll", "--pid", str(sleeper.pid))
    enrolled = node.status()["processes"]["bpf_loader"]["enrolled"]
    assert [(entry["path"], entry["address4"]) for entry in enrolled] == [
        (str(client.cgroup), client.address4)
    ]


def test_the_meshs_own_cgroup_is_not_enrolled(node: Node) -> None:
    node.start()
    own = of_process(find_root(), node.pid_of("bpf_loader"))
    refused = node.cli("enroll", "--cgroup", str(own), check=False)
    assert refused.returncode == 1
    assert "the mesh's own processes" in refused.stderr


@pytest.mark.parametrize("where", ["same", "above", "below"])
def test_a_cgroup_with_another_instances_programs_is_refused_by_name(
    node: Node, other: Node, where: str
) -> None:
    client = other.network.add("client", 10)
    inner = client.cgroup / "inner"
    inner.mkdir()
    node.start()
    other.start()
    try:
        first, second = {
            "same": (client.cgroup, client.cgroup),
            "above": (client.cgroup, inner),
            "below": (inner, client.cgroup),
        }[where]
        node.cli("enroll", "--cgroup", str(first))
        refused = other.cli("enroll", "--cgroup", str(second), check=False)
        assert refused.returncode == 1
        assert node.name in refused.stderr
        assert str(first) in refused.stderr
    finally:
        node.cli("unenroll", "--cgroup", str(first))
        inner.rmdir()


def test_a_map_that_keeps_its_size_is_told_with_the_way_out(node: Node) -> None:
    def kept() -> list[tuple[str, str, str]]:
        errors = node.status()["processes"]["bpf_loader"]["errors"]
        assert all(e["event"] == "map_size_kept" and "pykmesh uninstall" in e["to_change"] for e in errors)
        return [(e["map"], e["pinned"], e["wanted"]) for e in errors]

    small = ("--set", "services_max=1000", "--set", "flows_bytes=100000")  # a ring's size is rounded up
    large = ("--set", "services_max=2000", *small[2:])
    for sizes, expected in ((small, []), (small, []), (large, [("services", "1000", "2000")])):
        node.start(*sizes)
        assert kept() == expected
        log = (node.run_dir / "logs" / "bpf_loader.log").read_text()
        assert log.count("map_size_kept") == len(expected)
        node.cli("down")
    node.start(*large)
    assert "1: map_size_kept" in node.cli("status").stdout
    node.cli("down")
    node.cli("uninstall")
    node.start(*large)
    assert kept() == []


def test_what_is_left_of_a_removed_cgroup_is_cleared(node: Node) -> None:
    client = node.network.add("client", 10)
    node.start()
    node.enroll(client)
    client.cgroup.rmdir()
    node.kill("bpf_loader")
    until(lambda: node.status()["processes"]["bpf_loader"], "bpf_loader back")
    until(lambda: node.status()["processes"]["bpf_loader"].get("enrolled") == [], "cleared")
    assert list((node.pin_dir / "links").iterdir()) == []


def test_two_instances_stand_side_by_side(node: Node, other: Node) -> None:
    for each in (node, other):
        client, web = each.network.add("client", 10), each.network.add("web-1", 20)
        serve(web, "--http", "8080")
        each.write(
            "web",
            text(
                service("web", VIP4, app="web", ports={80: 8080}), pod("web-1", str(web.address4), app="web")
            ),
        )
        each.start()
        each.enroll(client)
        each.until_endpoints(host("web"), {f"{web.address4}:8080"})
        assert client.run("curl", "-sS", "--max-time", "5", f"http://{VIP4}/").stdout == "web-1\n"


def test_a_second_up_is_refused(node: Node) -> None:
    node.start()
    refused = node.cli("up", "-d", "--free-ports", *node.options, check=False)
    assert refused.returncode == 1
    assert "runs already" in refused.stderr
    assert node.cli("status").returncode == 0


def test_a_port_that_is_taken_is_named_with_the_way_out(node: Node) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = node.cli(
            "up", "-d", "--free-ports", "--port", f"metrics={port}", *node.options, check=False
        )
    assert refused.returncode == 1
    assert f"port {port} (metrics)" in refused.stderr
    assert "--port metrics=NUMBER" in refused.stderr


def test_a_full_disk_for_the_run_time_directory_is_told(node: Node, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=3", "tmpfs", str(full)], check=True)
    try:
        node.run_dir = full / "run"
        refused = node.cli("up", "--free-ports", *node.options, check=False)
    finally:
        node.run_dir = tmp_path / "run"
        subprocess.run(["umount", str(full)], check=True)
    assert refused.returncode == 1
    assert "No space left on device" in refused.stderr
    assert str(full) in refused.stderr


@contextlib.contextmanager
def small_disk(node: Node) -> Iterator[Path]:
    """A file system of 256 KiB for the run-time directory."""
    disk, before = node.directory / "disk", node.run_dir
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    node.run_dir = disk / "run"
    try:
        yield disk
        if running(node.run_dir) is not None:
            node.cli("down")
    finally:
        node.run_dir = before
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Takes all the room that there is."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    return path


def test_up_behind_on_a_full_disk_ends_with_one_line(node: Node) -> None:
    with small_disk(node) as disk:
        fill(disk)
        refused = node.cli("up", "-d", "--free-ports", *node.options, check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == f"Error: run-time directory {node.run_dir}: No space left on device\n"


def test_a_disk_that_fills_while_it_runs_loses_lines_and_no_process(node: Node) -> None:
    with small_disk(node) as disk:
        node.start()
        supervisor, logs = node.instance.pid, node.run_dir / "logs"
        assert "supervisor_started" in (logs / "supervisor.log").read_text()
        filler = fill(disk)
        before = node.children()
        for process in ("telemetry", "nats"):
            node.kill(process)  # what starts again, and what misses it, has much to say
            until(lambda: len(node.children()) == len(before), "started again")
            node.until_ready()
        assert node.instance.pid == supervisor
        assert sorted(node.children().values()) == sorted(before.values())
        assert len(node.children().keys() & before.keys()) == len(before) - 2
        filler.unlink()
        sizes = {path: path.stat().st_size for path in logs.iterdir()}
        node.kill("telemetry")
        until(lambda: "process_restarting" in (logs / "supervisor.log").read_text(), "logged again")
        until(lambda: (logs / "telemetry.log").stat().st_size > sizes[logs / "telemetry.log"], "and again")


def test_what_the_processes_say_is_in_their_own_logs_alone(node: Node) -> None:
    node.start()
    logs = {path.stem: path.read_text() for path in (node.run_dir / "logs").glob("*.log")}
    assert "process_ready" in logs["map_writer"]
    assert "process_ready" not in logs["supervisor"]
    assert "supervisor_started" in logs["supervisor"]


def test_up_behind_says_what_each_process_waits_for_and_its_last_error(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYKMESH_READY_DEADLINE_S", "8")
    gave_up = node.cli("up", "-d", "--free-ports", "--xds-address", "127.0.0.1:1", check=False)
    assert gave_up.returncode == 1
    assert gave_up.stderr.count("\n") == 1
    assert gave_up.stderr.startswith("Error: not ready after 8 s: ")
    assert "xds_client waits for: " in gave_up.stderr
    assert "(last error: " in gave_up.stderr
    assert gave_up.stderr.endswith(f"it goes on trying: pykmesh {' '.join(node.place)} status\n")


@pytest.mark.parametrize("option", ["--xds-token-file", "--xds-root-cert"])
@pytest.mark.parametrize("detach", [(), ("-d",)])
def test_a_file_that_cannot_be_read_is_told_at_once(node: Node, option: str, detach: tuple[str, ...]) -> None:
    missing = node.directory / "nope"
    words = ("--xds-address", "127.0.0.1:1", option, str(missing))
    refused = node.cli("up", *detach, "--free-ports", *words, check=False, timeout_s=15)
    assert (refused.returncode, refused.stderr) == (
        1,
        f"Error: {option} {missing}: No such file or directory\n",
    )
    assert not node.run_dir.exists()


def test_a_setting_that_is_wrong_is_told_in_words(node: Node) -> None:
    node.write("empty", "# nothing yet\n")
    words = ("--free-ports", "--set", "services_max=many", *node.options)
    assert "PYKMESH_SERVICES_MAX" in node.cli("up", "-d", *words, check=False).stderr


INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == where:
            os.kill(os.getpid(), signal.SIGINT)
where = sys.argv[1]
sys.meta_path.insert(0, Finder)
from pykmesh.__main__ import start
sys.argv[1:] = sys.argv[2:]
start()
"""


@pytest.mark.parametrize("where", ["pykmesh.cli", "click", "pykmesh.node.mesh", "anyio", "pykmesh.node.run"])
def test_ctrl_c_during_the_start_is_no_traceback(node: Node, where: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, where, *node.place, "up", "--free-ports", *node.options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode in (-signal.SIGINT, 1)
    assert "Traceback" not in result.stderr
    assert "KeyboardInterrupt" not in result.stderr
    assert not node.run_dir.exists()


@pytest.mark.parametrize("what", ["port", "pin"])
def test_a_start_that_is_refused_removes_what_it_made(node: Node, what: str) -> None:
    words = ["up", "--free-ports", *node.options]
    with socket.socket() as taken:
        if what == "port":
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            words += ["--port", f"metrics={taken.getsockname()[1]}"]
        else:
            (node.directory / "bpf").write_text("")
        assert node.cli(*words, check=False).returncode == 1
        assert not node.run_dir.exists()
        kept = node.run_dir / "logs"
        kept.mkdir(parents=True)
        (kept / "nats.log").write_text("from before")
        assert node.cli(*words, check=False).returncode == 1
        assert sorted(node.run_dir.rglob("*")) == [kept, kept / "nats.log"]


def test_hints_are_commands_that_work(node: Node) -> None:
    node.start()
    hint = f"pykmesh {' '.join(node.place)} "
    for words in (("up", "-d", "--free-ports", *node.options), ("up", "--free-ports", *node.options)):
        refused = node.cli(*words, check=False).stderr
        assert f"{hint}down" in refused
    assert f"{hint}down first" in node.cli("uninstall", check=False).stderr
    assert f"{hint}uninstall removes" in node.cli("down").stdout
    assert f"{hint}up -d --config-dir FOLDER" in node.cli("status", check=False).stderr


def test_how_a_process_ends_again_and_again_is_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKMESH_READY_DEADLINE_S", "5")
    node.write("empty", "# nothing yet\n")
    words = ("--config-dir", str(node.config), "--set", f"pods_max={2**31 - 1}")
    gave_up = node.cli("up", "-d", "--free-ports", *words, check=False)
    assert gave_up.returncode == 1
    said = r"exit status 1: KernelError: .* a map is larger than can be made here: see the settings"
    assert re.search(rf"bpf_loader waits for: [a-z ]+ \(last error: {said}", gave_up.stderr)
    until(
        lambda: re.search(
            rf"^bpf_loader .*does not answer; it ended with {said}",
            node.cli("status", check=False).stdout,
            re.MULTILINE,
        ),
        "the status to tell it",
    )


def test_a_setting_out_of_its_range_ends_up_at_once(node: Node) -> None:
    refused = node.cli("up", "-d", "--free-ports", *node.options, "--set", "pods_max=0", check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: bpf_loader: PYKMESH_PODS_MAX in the environment is '0': ")


def test_status_counts_restarts_and_has_the_broker(node: Node) -> None:
    node.start()
    before = node.status()
    assert before["restarts"] == dict.fromkeys(before["processes"], 0)
    nats = before["processes"]["nats"]
    assert (nats["pid"], nats["ready"]) == (node.pid_of("nats"), True)
    os.kill(nats["pid"], signal.SIGSTOP)
    try:
        stopped = node.cli("status", check=False)
        assert stopped.returncode == 1
        assert re.search(r"^nats +- +no +0 .*does not answer$", stopped.stdout, re.MULTILINE)
    finally:
        os.kill(nats["pid"], signal.SIGCONT)
    for process in ("nats", "telemetry"):
        node.kill(process)
    until(lambda: node.status()["ready"] and node.status()["restarts"]["telemetry"], "all back")
    after = node.status()
    assert after["restarts"] == {**before["restarts"], "nats": 1, "telemetry": 1}
    assert after["processes"]["nats"]["pid"] != nats["pid"]
    assert re.search(rf"^nats +{nats['version']} +yes +1 ", node.cli("status").stdout, re.MULTILINE)


def test_a_pin_directory_that_cannot_be_made_is_told(node: Node) -> None:
    blocked = node.directory / "file"
    blocked.write_text("")
    node.pin_dir = blocked / "mesh"
    refused = node.cli("up", "--free-ports", *node.options, check=False, timeout_s=30)
    assert refused.returncode == 1
    assert str(blocked) in refused.stderr


def test_wrong_words_are_told(node: Node) -> None:
    assert "either --config-dir or --xds-address" in node.cli("up", check=False).stderr
    assert "NAME=NUMBER" in node.cli("up", "--port", "nats=x", *node.options, check=False).stderr
    assert "is not running" in node.cli("status", check=False).stderr
    assert "is not running" in node.cli("down", check=False).stderr
    assert "is the mesh up?" in node.cli("enroll", "--cgroup", "/sys", check=False).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_the_foreground(node: Node, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "pykmesh", *node.place, "up", "--free-ports", *node.options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until((node.run_dir / "instance.json").exists, "begun")
    children = node.children()
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said
    assert "traffic goes on" in said
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


def test_a_broken_file_is_told_and_keeps_what_was_good(node: Node) -> None:
    good = text(service("web", VIP4, app="web", ports={80: 8080}), pod("web-1", "10.101.0.20", app="web"))
    node.write("web", good)
    node.start()
    node.until_endpoints(host("web"), {"10.101.0.20:8080"})
    node.write("web", good.replace("port: 80\n", "port: eighty\n"))
    errors = until(lambda: node.status()["processes"]["control_plane"]["manifest_errors"], "the error told")
    assert "web.yaml" in str(errors)
    assert "port" in str(errors)
    assert node.endpoints(host("web")) == {"10.101.0.20:8080"}


def test_a_control_plane_that_comes_back_to_an_empty_folder_takes_nothing_from_the_kernel(node: Node) -> None:
    good = text(service("web", VIP4, app="web", ports={80: 8080}), pod("web-1", "10.101.0.20", app="web"))
    node.write("web", good)
    node.start()
    node.until_endpoints(host("web"), {"10.101.0.20:8080"})
    node.cli("down")
    (node.config / "web.yaml").unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "pykmesh", *node.place, "up", "--free-ports", *node.options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until((node.run_dir / "instance.json").exists, "begun")
        until(lambda: f"No YAML file in {node.config} yet" in node.cli("status", check=False).stdout, "told")
        until(lambda: node.status()["processes"]["map_writer"], "map_writer there")
        assert node.raw_endpoints() == {"10.101.0.20:8080"}
        node.write("web", good)
        node.until_ready()
        node.until_endpoints(host("web"), {"10.101.0.20:8080"})
        (node.config / "web.yaml").unlink()  # on purpose: it runs
        until(lambda: node.raw_endpoints() == set(), "gone")
    finally:
        process.terminate()
        process.wait(20)


def test_who_may_not_look_is_told_so(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.start()

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(InstanceError, match="lock: Permission denied: run as root"):
            running(node.run_dir)


def test_what_is_not_known_yet_is_not_shown_as_nothing(node: Node) -> None:
    """A map_writer that has started again without a control plane."""
    found = service("web", VIP4, app="web", ports={80: 8080}), pod("web-1", "10.101.0.20", app="web")
    node.write("web", text(*found))
    node.start()
    node.until_endpoints(host("web"), {"10.101.0.20:8080"})
    control_plane = node.pid_of("control_plane")
    os.kill(control_plane, signal.SIGSTOP)
    try:
        for process in ("xds_client", "map_writer"):
            node.kill(process)
        until(lambda: node.status()["processes"]["map_writer"], "map_writer to answer")
        said = r"Error: map_writer waits for [a-z, ]+; --from bpf reads the kernel without it\n"
        for what in ("services", "endpoints"):
            refused = node.cli("get", what, check=False)
            assert refused.returncode == 1
            assert re.fullmatch(said, refused.stderr)
        assert node.raw_endpoints() == {"10.101.0.20:8080"}
    finally:
        os.kill(control_plane, signal.SIGCONT)
    until(lambda: "web.shop" in node.cli("get", "services", check=False).stdout, "all known again")


def test_a_service_whose_address_is_anothers_stands_in_the_status(node: Node) -> None:
    node.write("a", text(service("a", VIP4, app="a", ports={80: 8080})))
    node.write("b", text(service("b", VIP4, app="a", ports={80: 8080})))
    node.start()
    (told,) = node.status()["processes"]["map_writer"]["services_covered"].values()
    assert told == f"{host('b')}: {VIP4} is that of {host('a')}"
    assert told in node.cli("status").stdout


def test_a_control_plane_that_comes_back_to_a_broken_file_takes_nothing_from_the_kernel(node: Node) -> None:
    good = text(service("web", VIP4, app="web", ports={80: 8080}), pod("web-1", "10.101.0.20", app="web"))
    node.write("web", good)
    node.write("more", text(pod("web-2", "10.101.0.21", app="web")))
    both = {"10.101.0.20:8080", "10.101.0.21:8080"}
    node.start()
    node.until_endpoints(host("web"), both)
    node.write("web", good.replace("port: 80\n", "port: eighty\n"))
    node.kill("control_plane")
    line = 1 + good.splitlines().index("    port: 80")
    why = f"manifests: web.yaml:{line}: spec.ports[0].port: Expected `int`, got `str`"

    def waits_for() -> list[str]:
        return list((node.status()["processes"]["control_plane"] or {}).get("waits_for", ()))

    until(lambda: why in waits_for(), "control_plane back, and not ready, and why")
    assert not node.status()["ready"]
    until(lambda: not node.status()["processes"]["xds_client"]["connected"], "nobody to connect to")
    assert node.endpoints(host("web")) == both
    node.write("more", text(pod("web-3", "10.101.0.22", app="web")))  # seen, and not said
    node.write("web", good)
    node.until_endpoints(host("web"), {"10.101.0.20:8080", "10.101.0.22:8080"})
    node.until_ready()
