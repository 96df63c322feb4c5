"""Two releases whose maps differ, in each other's place under traffic: nothing is dropped or wrong."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pykmesh.demo.pods import Pod
from pykmesh.kernel import pins
from pykmesh.kernel.hooks import HOOKS
from pykmesh.node.instance import running
from tests.mesh.attached import ONE_OF_EACH, hooks_of
from tests.mesh.manifests import Object, host, pod, service, text
from tests.mesh.node import Node, finish, probe, serve, until
from tests.mesh.releases import CHANGED, HERE, build, make_other
from tests.mesh.waypoints import SHOP4, ask, status, waypoint_mesh

VIP = "10.96.0.70"
LONG_LIVED = f"""
import socket, sys, time
with socket.create_connection(("{VIP}", 80), 10) as s:
    print("open", flush=True)
    for line in sys.stdin:
        s.sendall(b"GET / HTTP/1.1\\r\\nhost: web\\r\\n\\r\\n")
        assert b"200" in s.recv(4096)
        print("answered", flush=True)
"""


class Upgrades(NamedTuple):
    node: Node
    client: Pod
    web: list[Pod]
    other: Path

    def upgrade(self, release: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """By the command line of a release."""
        done = self.run(release, "-m", "pykmesh", *self.node.place, "upgrade", *words)
        if check:
            assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{self.node.logs()}"
        return done

    def run(self, release: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=release,
            env={**os.environ, "PYTHONPATH": str(release), "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def begin_and_be_killed(self) -> None:
        """An upgrade to the other release, of which no more than that release's supervisor is left."""
        ran, words = self.node.instance, [sys.executable, "-m", "pykmesh", *self.node.place, "upgrade"]
        environment = {**os.environ, "PYTHONPATH": str(self.other), "PYTHONSAFEPATH": "1"}
        with subprocess.Popen(
            words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as killed:
            until(lambda: running(self.node.run_dir) not in (None, ran), "the other release to be begun")
            killed.kill()

    def programs(self) -> set[str]:
        """What is attached to the client's cgroup."""
        (links,) = pins.links_dir(self.node.pin_dir).iterdir()
        return {path.name for path in links.iterdir()}

    def pins(self) -> dict[str, str]:
        found = [path.name.partition("@") for path in pins.maps_dir(self.node.pin_dir).iterdir()]
        assert len(found) == len({name for name, _, _ in found}), "one pin of each map"
        return {name: layout for name, _, layout in found}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release like this one, with other maps and a program of another name."""
    found = tmp_path_factory.mktemp("other")
    make_other(found)
    return found


@pytest.fixture(scope="module")
def upgrades(tmp_path_factory: pytest.TempPathFactory, other: Path) -> Iterator[Upgrades]:
    node = Node(tmp_path_factory.mktemp("upgrade"), subnet=31)
    try:
        with node.network as network:
            client = network.add("client", 10)
            web = [network.add(f"web-{n}", 20 + n) for n in range(2)]
            for each in web:
                serve(each, "--http", "8080")
            found = Upgrades(node, client, web, other)
            node.write("pods", text(*(known(each) for each in (client, *web))))
            node.write("web", text(service("web", VIP, "fd96::70", app="web", ports={80: 8080})))
            node.start()
            node.enroll(client)
            node.until_endpoints(host("web"), {f"{each.address4}:8080" for each in web}, 80)
            yield found
    finally:
        node.end()


def known(each: Pod) -> Object:
    return pod(each.name, str(each.address4), app="client" if each.name == "client" else "web")


def test_back_and_forth_under_traffic_nothing_is_dropped(upgrades: Upgrades) -> None:
    """With other maps of services, endpoints, pods and datagrams each time; then as if nothing had been."""
    before = upgrades.pins()
    prober = probe(upgrades.client, VIP, 80)
    with upgrades.client.spawn(
        sys.executable, "-c", LONG_LIVED, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as long_lived:
        assert long_lived.stdin
        assert long_lived.stdout
        assert long_lived.stdout.readline() == "open\n"
        for words, release in (
            ((), upgrades.other),
            (("--roll-back",), upgrades.other),
            ((), upgrades.other),
        ):
            done = json.loads(upgrades.upgrade(release, *words, "-o", "json").stdout)
            copied = done["copied"]
            assert set(copied["entries"]) == CHANGED
            assert copied["entries"]["endpoints"] == 2
            long_lived.stdin.write("\n")
            long_lived.stdin.flush()
            assert long_lived.stdout.readline() == "answered\n"
        long_lived.stdin.close()
        assert long_lived.wait(10) == 0
    after = upgrades.pins()
    assert {"pykmesh_freed", "pykmesh_conn4"} < upgrades.programs()
    assert len(upgrades.programs()) == len(HOOKS)
    assert {name for name in before if before[name] != after[name]} == CHANGED
    done = json.loads(upgrades.upgrade(HERE, "-o", "json").stdout)
    assert set(done["copied"]["entries"]) == CHANGED
    assert upgrades.pins() == before
    assert upgrades.programs() == {hook.program for hook in HOOKS}
    upgrades.node.write("pods", text(known(upgrades.client), known(upgrades.web[0])))
    upgrades.node.until_endpoints(host("web"), {f"{upgrades.web[0].address4}:8080"}, 80)
    counted = finish(prober)
    assert counted["connections"] > 100
    assert counted["failed"] == 0, counted["errors"]
    assert upgrades.node.cli("diff").returncode == 0


def test_what_would_be_done_is_said_and_nothing_is_done(upgrades: Upgrades) -> None:
    before, pid = upgrades.pins(), upgrades.node.instance.pid
    said = upgrades.upgrade(upgrades.other, "--dry-run").stdout
    for name in CHANGED:
        assert f"{name}@{before[name]}" in said
    assert "maps are kept as they are" in said
    assert (upgrades.pins(), upgrades.node.instance.pid) == (before, pid)
    assert "is ready" not in said


def test_a_step_that_cannot_be_taken_is_refused_before_it_begins(upgrades: Upgrades) -> None:
    """A release whose endpoints have other keys."""
    types = upgrades.other / "bpf" / "mesh_types.h"
    said = types.read_text()
    pid = upgrades.node.instance.pid
    try:
        before = "struct endpoint_key {\n\t__u64 service; /* service_value.id */\n\t__u32 slot;\n"
        assert before in said
        types.write_text(said.replace(before, "struct endpoint_key {\n\t__u64 service;\n\t__be32 slot;\n"))
        build(upgrades.other)
        refused = upgrades.upgrade(upgrades.other, check=False)
        assert refused.returncode == 1
        assert "not begun: slot in the key of map endpoints is u32 of 4 bytes, not be32" in refused.stderr
        assert "slot in the key" in upgrades.upgrade(upgrades.other, "--dry-run", check=False).stdout
        assert upgrades.node.instance.pid == pid
    finally:
        types.write_text(said)
        build(upgrades.other)


def test_a_release_that_does_not_take_the_words_of_the_one_before_is_not_begun_with(
    upgrades: Upgrades,
) -> None:
    pid, prober = upgrades.node.instance.pid, probe(upgrades.client, VIP, 80)
    commands = upgrades.other / "pykmesh" / "cli" / "node_commands.py"
    said = commands.read_text()
    try:
        commands.write_text(said.replace('"--config-dir",', '"--config-folder",'))
        for words in ([], ["--dry-run"]):
            refused = upgrades.upgrade(upgrades.other, *words, check=False)
            assert refused.returncode == 1
            told = "not begun: this release does not start as the one before: "
            assert f"{told}No such option '--config-dir'" in refused.stdout + refused.stderr
    finally:
        commands.write_text(said)
    assert upgrades.node.instance.pid == pid
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]


def test_a_release_that_does_not_start_leaves_the_one_before(
    upgrades: Upgrades, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has taken the maps over by then: the one before takes them back."""
    before, prober = upgrades.pins(), probe(upgrades.client, VIP, 80)
    main = upgrades.other / "services" / "telemetry" / "__main__.py"
    said = main.read_text()
    try:
        main.write_text("import nobody\n")
        assert "not begun: " in upgrades.upgrade(upgrades.other, check=False).stderr
        assert upgrades.pins() == before
        main.write_text("import sys\nif __name__ == '__main__':\n    sys.exit('no such luck')\n")
        monkeypatch.setenv("PYKMESH_READY_DEADLINE_S", "soon")
        assert "not a number of seconds" in upgrades.upgrade(upgrades.other, check=False).stderr
        monkeypatch.setenv("PYKMESH_READY_DEADLINE_S", "5")
        refused = upgrades.upgrade(upgrades.other, check=False)
    finally:
        main.write_text(said)
    assert refused.returncode == 1
    assert "not ready after 5 s: " in refused.stderr
    assert "telemetry waits for: not started (last error: exit status 1: no such luck)" in refused.stderr
    assert "bpf_loader waits" not in refused.stderr, "its exit is that of no other"
    assert "the release before runs again" in refused.stderr
    upgrades.node.until_ready()
    assert upgrades.pins() == before
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]
    assert upgrades.node.cli("diff").returncode == 0


def test_one_that_is_ended_at_any_step_is_gone_on_with(upgrades: Upgrades) -> None:
    """The loader killed before each of its steps, one after another, and again: traffic goes on."""
    before, prober = upgrades.pins(), probe(upgrades.client, VIP, 80)
    upgrades.node.cli("down")
    for release in (upgrades.other, HERE):
        module = str(HERE / "tests" / "mesh" / "killed_upgrade.py")
        done = upgrades.run(release, module, upgrades.node.name, str(upgrades.node.pin_dir))
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.splitlines()[-1]) > 8, (
            "steps: each attempt is left less to do by the one before"
        )
        found = upgrades.pins()
        assert {name for name in before if before[name] != found[name]} == (
            CHANGED if release == upgrades.other else set()
        )
        assert not pins.staging_dir(upgrades.node.pin_dir).exists()
        assert hooks_of(upgrades.client.cgroup, upgrades.node.pin_dir) == ONE_OF_EACH
    upgrades.node.start()
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]
    assert upgrades.node.cli("diff").returncode == 0


def test_what_runs_in_the_foreground_is_left_to_who_has_it(upgrades: Upgrades) -> None:
    upgrades.node.cli("down")
    words = [
        sys.executable,
        "-m",
        "pykmesh",
        *upgrades.node.place,
        "up",
        "--free-ports",
        *upgrades.node.options,
    ]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as foreground:
        try:
            until(lambda: running(upgrades.node.run_dir), "it to run")
            refused = upgrades.upgrade(upgrades.other, check=False)
            assert "runs in the foreground" in refused.stderr
        finally:
            foreground.terminate()
            foreground.wait(20)
    refused = upgrades.upgrade(upgrades.other, check=False)
    assert "is not running" in refused.stderr
    upgrades.node.start()


def test_the_same_release_again_is_no_release_to_go_back_to(upgrades: Upgrades) -> None:
    upgrades.upgrade(upgrades.other)
    upgrades.upgrade(HERE)
    done = json.loads(upgrades.upgrade(HERE, "-o", "json").stdout)
    assert (done["can_go_back"], done["copied"]) == (False, None)
    previous = json.loads(upgrades.node.instance.previous.read_text())
    assert previous["python_path"] == str(upgrades.other)
    refused = upgrades.upgrade(upgrades.other, "--roll-back", check=False)
    assert f"this is the release before ({upgrades.other})" in refused.stderr


def test_a_release_that_is_put_in_the_place_of_the_running_one_takes_over_as_processes_start(
    upgrades: Upgrades, tmp_path: Path
) -> None:
    """Its bpf_loader first: the others find that their maps are read by nobody any more."""
    before, prober, place = upgrades.pins(), probe(upgrades.client, VIP, 80), tmp_path / "release"
    for part in ("pykmesh", "services"):
        shutil.copytree(HERE / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
    upgrades.upgrade(place)
    for part in ("pykmesh", "services"):
        shutil.copytree(upgrades.other / part, place / part, dirs_exist_ok=True)
    upgrades.node.kill("bpf_loader")
    gone = pins.maps_dir(upgrades.node.pin_dir) / f"services@{before['services']}"
    until(lambda: not gone.exists(), "other maps")
    upgrades.node.until_ready()
    assert {name for name in before if before[name] != upgrades.pins()[name]} == CHANGED
    assert hooks_of(upgrades.client.cgroup, upgrades.node.pin_dir) == ONE_OF_EACH
    upgrades.node.write("pods", text(known(upgrades.client), known(upgrades.web[1])))
    words = ("-m", "pykmesh", *upgrades.node.place, "get", "endpoints", "--from", "bpf")
    until(lambda: str(upgrades.web[0].address4) not in upgrades.run(place, *words).stdout, "a change")
    assert upgrades.run(place, "-m", "pykmesh", *upgrades.node.place, "diff").returncode == 0
    upgrades.upgrade(HERE)
    assert upgrades.pins() == before
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]
    upgrades.node.write("pods", text(*(known(each) for each in (upgrades.client, *upgrades.web))))


def test_without_a_control_plane_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No release would become ready, nor the one before again."""
    node = Node(tmp_path, "--xds-address", "127.0.0.1:1", subnet=39)
    try:
        monkeypatch.setenv("PYKMESH_READY_DEADLINE_S", "2")
        assert "it goes on trying" in node.cli("up", "-d", "--free-ports", *node.options, check=False).stderr
        pid = node.instance.pid
        for words in ([], ["--dry-run"]):
            refused = node.cli("upgrade", *words, check=False)
            assert refused.returncode == 1
            assert "xds_client has no stream to the control plane at 127.0.0.1:1" in (
                refused.stdout + refused.stderr
            )
        assert node.instance.pid == pid
    finally:
        node.end()


def test_files_that_are_damaged_are_named_with_what_to_do(upgrades: Upgrades) -> None:
    node, pid = upgrades.node, upgrades.node.instance.pid
    upgrades.node.instance.previous.write_text("{")
    done = json.loads(upgrades.upgrade(HERE, "-o", "json").stdout)
    assert (done["can_go_back"], done["pid"] != pid) == (False, True)
    refused = upgrades.upgrade(HERE, "--roll-back", check=False)
    assert f"{node.instance.previous}: " in refused.stderr
    assert "remove it" in refused.stderr
    node.instance.previous.unlink()
    file, pid = node.run_dir / "instance.json", node.instance.pid
    said = file.read_bytes()
    file.write_bytes(said[:20])
    try:
        for words in (["status"], ["down"], ["up", "-d", *node.options], ["upgrade"]):
            refused = node.cli(*words, check=False)
            assert refused.returncode == 1
            assert f"{file} is damaged" in refused.stderr
            assert f"(pid {pid})" in refused.stderr
    finally:
        file.write_bytes(said)
    node.until_ready()


def test_a_supervisor_that_does_not_end_is_killed(upgrades: Upgrades) -> None:
    prober, pid = probe(upgrades.client, VIP, 80), upgrades.node.instance.pid
    os.kill(pid, signal.SIGSTOP)
    upgrades.upgrade(HERE)
    assert upgrades.node.instance.pid != pid
    upgrades.node.until_ready()
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]


def test_one_that_is_killed_is_gone_on_with_by_the_next(upgrades: Upgrades) -> None:
    """At the worst moment: what ran has ended, and nothing else runs."""
    prober, ran = probe(upgrades.client, VIP, 80), upgrades.node.instance
    words = [sys.executable, "-m", "pykmesh", *upgrades.node.place, "upgrade"]
    with subprocess.Popen(words, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        until(lambda: running(upgrades.node.run_dir) != ran, "the supervisor to end")
        killed.kill()
    if (found := running(upgrades.node.run_dir)) is not None:
        os.kill(found.pid, 9)
        until(lambda: running(upgrades.node.run_dir) is None, "what it may have begun to end")
    upgrades.upgrade(HERE)
    upgrades.node.until_ready()
    assert not upgrades.node.instance.journal.exists()
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]


def test_one_that_is_killed_when_it_has_begun_the_other_release_is_gone_on_with(upgrades: Upgrades) -> None:
    """What it began takes the instance's place by itself, or gives way; what was before stays known."""
    prober = probe(upgrades.client, VIP, 80)
    upgrades.begin_and_be_killed()
    upgrades.upgrade(upgrades.other)
    assert json.loads(upgrades.node.instance.previous.read_text())["python_path"] == str(HERE)
    upgrades.upgrade(upgrades.other, "--roll-back")
    upgrades.node.until_ready()
    counted = finish(prober)
    assert counted["failed"] == 0, counted["errors"]


def test_one_that_is_killed_then_is_gone_back_from(upgrades: Upgrades) -> None:
    """Whether what it began is ready by then or not."""
    upgrades.begin_and_be_killed()
    upgrades.upgrade(upgrades.other, "--roll-back")
    upgrades.node.until_ready()
    assert upgrades.programs() == {hook.program for hook in HOOKS}


def test_what_an_older_journal_names_is_left_alone(upgrades: Upgrades) -> None:
    """It was written by one that was killed, and much has been since."""
    journal = upgrades.node.instance.journal
    upgrades.node.cli("down")
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:
            release = {"executable": sys.executable, "python_path": str(HERE)}
            begun = {
                "pid": stranger.pid,
                "release": release,
                "directory": "/",
                "environment": dict(os.environ),
            }
            arguments = [*upgrades.node.place, "up", "--free-ports", *upgrades.node.options]
            journal.write_text(json.dumps({**begun, "arguments": arguments}))
            upgrades.upgrade(HERE)
            assert stranger.poll() is None
        finally:
            stranger.kill()
    upgrades.node.until_ready()


def test_two_at_once_are_one(upgrades: Upgrades) -> None:
    held = os.open(upgrades.node.run_dir, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = upgrades.upgrade(HERE, check=False)
        others = [upgrades.node.cli(word, check=False) for word in ("down", "uninstall")]
    finally:
        os.close(held)
    assert refused.returncode == 1
    assert f"another upgrade of instance {upgrades.node.name} is under way" in refused.stderr
    for each in others:
        assert each.returncode == 1
        assert "under way, and would start it again" in each.stderr
    upgrades.node.until_ready()


def test_words_and_environment_mean_what_they_meant_where_it_was_started(tmp_path: Path) -> None:
    """Not what they would mean where `upgrade` is typed: such a folder lies there too, and such a package."""
    place = {"PYKMESH_INSTANCE": f"t-{os.getpid()}", "PYTHONPATH": str(HERE), "PATH": os.environ["PATH"]}
    words = (
        sys.executable,
        "-P",
        "-m",
        "pykmesh",
        "--run-dir",
        str(tmp_path / "r"),
        "--pin-dir",
        str(tmp_path / "p"),
    )

    def run(where: Path, *more: str, environment: dict[str, str] | None = None) -> str:
        said = subprocess.run(
            [*words, *more],
            cwd=where,
            env=environment or place,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert said.returncode == 0, said.stderr
        return said.stdout

    here, there = tmp_path / "here", tmp_path / "there"
    for directory, name in ((here, "meant"), (there, "other")):
        (directory / "manifests").mkdir(parents=True)
        (directory / "manifests" / "a.yaml").write_text(
            text(service(name, VIP, "fd96::70", app=name, ports={80: 1}))
        )
    (there / "pykmesh").mkdir()
    (there / "pykmesh" / "__init__.py").write_text("raise SystemExit('another package')")
    try:
        run(here, "up", "-d", "--free-ports", "--config-dir", "manifests")
        instance = running(tmp_path / "r")
        assert instance
        run(
            there,
            "--instance",
            instance.name,
            "upgrade",
            environment={**place, "PYKMESH_INSTANCE": "another"},
        )
        again = running(tmp_path / "r")
        assert again
        assert (again.name, again.pid == instance.pid) == (instance.name, False)
        found = json.loads(run(there, "get", "services", "-o", "json"))
        assert [each["name"].partition(".")[0] for each in found["services"]] == ["shop/meant"]
    finally:
        for word in ("down", "uninstall"):
            subprocess.run([*words, word], env=place, capture_output=True, check=False, timeout=60)


def test_what_a_waypoint_serves_goes_on(tmp_path_factory: pytest.TempPathFactory, other: Path) -> None:
    """Its Envoys stay, and are told what connections are for by the programs of either release."""
    with waypoint_mesh(tmp_path_factory.mktemp("uw"), 33) as mesh:
        upgrades, prober = Upgrades(mesh.node, mesh.client, [], other), probe(mesh.client, SHOP4, 80)
        envoys = [instance["pid"] for instance in status(mesh)["instances"]]
        for release in (other, HERE):
            upgrades.upgrade(release)
            until(lambda: ask(mesh, 20, "x-canary: yes") == {(200, "v2"): 20}, "the route")
            assert [instance["pid"] for instance in status(mesh)["instances"]] == envoys
        counted = finish(prober)
        assert counted["failed"] == 0, counted["errors"]
