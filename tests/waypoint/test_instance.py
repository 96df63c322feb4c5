"""An instance outlives who started it, is adopted, drains, and its end is noticed."""
# ruff: noqa: ASYNC110, ASYNC220, ASYNC240  (the loop is the test's own, and what it waits for tells nothing)

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from pykmesh.contracts.waypoints import Endpoint
from services.waypoint_mgr import instances

from .backends import Answer, Backend, ask, free_port, serving
from .world import (
    DEADLINE_S,
    NODE,
    Waypoint,
    World,
    ads_server,
    at,
    http_route,
    kubernetes_service,
    mesh_service,
    waypoint,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]


def canary(backends: dict[str, Backend], port: int) -> World:
    world = World()
    world.add_user(
        mesh_service("shop", "web", {port: [backends["own"].endpoint]}, ["127.0.1.1"]),
        kubernetes_service("shop", "web", {"port": port, "name": "http"}),
    )
    for name in ("v1", "v2"):
        world.add_backend(mesh_service("shop", name, {80: [backends[name].endpoint]}))
    rules = [
        {
            "matches": [{"headers": [{"name": "x-version", "value": "v2"}]}],
            "backendRefs": [{"name": "v2", "port": 80}],
        },
        {"backendRefs": [{"name": "v1", "port": 80, "weight": 9}, {"name": "v2", "port": 80, "weight": 1}]},
    ]
    world.routes.append(http_route("shop", "canary", {"rules": rules}))
    return world


async def test_a_header_and_weights_choose_the_backend(folder: Path, backends: dict[str, Backend]) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        status = await envoy.apply(canary(backends, envoy.port).configuration())
        assert not status.refusals
        await envoy.ready()

        def told(**headers: str) -> str:
            answer = ask(at("127.0.1.1"), envoy.port, headers=headers)
            return str(answer.told["backend"])

        assert await anyio.to_thread.run_sync(lambda: told(**{"x-version": "v2"})) == "v2"
        seen = await anyio.to_thread.run_sync(lambda: [told() for _ in range(200)])
        assert set(seen) == {"v1", "v2"}
        assert seen.count("v1") > seen.count("v2")


async def test_what_no_service_has_is_closed(folder: Path, backends: dict[str, Backend]) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        await envoy.apply(canary(backends, envoy.port).configuration())
        await envoy.ready()

        def first_bytes() -> bytes:
            with socket.create_connection(("127.0.0.1", envoy.port), timeout=DEADLINE_S) as sock:
                return sock.recv(1)

        assert await anyio.to_thread.run_sync(first_bytes) == b""


@contextmanager
def greeting(text: bytes) -> Iterator[Endpoint]:
    """A server that speaks first."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(text)

        thread = threading.Thread(target=greet)
        thread.start()
        yield Endpoint("127.0.0.1", listening.getsockname()[1])
        thread.join(DEADLINE_S)


async def test_a_server_may_speak_first(folder: Path) -> None:
    world = World()
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        with greeting(b"220 hello") as endpoint:
            world.add_user(
                mesh_service("shop", "db", {envoy.port: [endpoint]}, ["127.0.1.2"]),
                kubernetes_service("shop", "db", {"port": envoy.port, "name": "mysql"}),
            )
            await envoy.apply(world.configuration())
            await envoy.ready()

            def banner() -> bytes:
                with socket.create_connection((at("127.0.1.2"), envoy.port), timeout=DEADLINE_S) as sock:
                    return sock.recv(100)

            assert await anyio.to_thread.run_sync(banner) == b"220 hello"


async def test_a_port_in_use_is_refused_and_told(folder: Path, backends: dict[str, Backend]) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        with socket.create_server(("0.0.0.0", 0)) as taken:
            envoy.port = taken.getsockname()[1]
            status = await envoy.apply(canary(backends, envoy.port).configuration())
            (refusal,) = status.refusals
            assert "in use" in refusal.message
            assert not await envoy.instance.is_ready()
        envoy.port = free_port()
        assert (await envoy.apply(canary(backends, envoy.port).configuration())).is_current
        assert await envoy.instance.is_ready()


async def _end_noticed_after_s(instance: instances.EnvoyProcess) -> float:
    """From its death by SIGKILL."""
    noticed = 0.0

    async def watch() -> None:
        nonlocal noticed
        await instance.ended()
        noticed = time.monotonic()

    with anyio.fail_after(DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            await anyio.lowlevel.checkpoint()
            killed = time.monotonic()
            os.kill(instance.pid, signal.SIGKILL)
    return noticed - killed


async def test_its_end_is_noticed_at_once(folder: Path) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        assert await _end_noticed_after_s(envoy.instance) < 0.1
        assert instances.adopt(envoy.spec.state_dir) is None


async def test_a_log_that_is_too_large_begins_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "LOG_BYTES_MAX", 1000)
    path = folder / NODE / "envoy.log"
    async with ads_server(folder / "ads") as server, waypoint(server, folder, log_level="debug") as envoy:

        async def until_larger() -> bytes:
            with anyio.fail_after(DEADLINE_S):
                while path.stat().st_size <= 1000:
                    await envoy.instance.is_ready()  # it has something to say of each question
            return path.read_bytes()

        before = await until_larger()
        await anyio.to_thread.run_sync(envoy.instance.cut_log)
        assert path.with_suffix(".old").read_bytes().startswith(before)
        after = await until_larger()
        assert after[:1] == b"["
        assert after[:100] not in before


_STARTER = """
import sys
from pathlib import Path
from services.waypoint_mgr.instances import Spec, start
folder = Path(sys.argv[1])
print(start(Spec(node_id="n", waypoint="w", state_dir=folder / "n", ads_socket=folder / "ads")).pid)
"""


async def test_it_outlives_who_started_it_and_is_adopted(folder: Path, backends: dict[str, Backend]) -> None:
    command = [sys.executable, "-c", _STARTER, str(folder)]
    starter = await anyio.run_process(command, stderr=sys.stderr)
    async with ads_server(folder / "ads") as server:
        with anyio.fail_after(DEADLINE_S):
            while (adopted := instances.adopt(folder / "n")) is None:
                await anyio.sleep(0.01)
        assert adopted.node_id == "n"
        assert adopted.pid == int(starter.stdout.split()[-1])
        assert os.getsid(adopted.pid) == adopted.pid
        with pytest.raises(instances.InstanceError, match="runs already"):
            instances.start(adopted_spec(folder))
        del server
        assert await _end_noticed_after_s(adopted) < 0.1
        adopted.close()
        assert instances.adopt(folder / "n") is None


def adopted_spec(folder: Path) -> instances.Spec:
    return instances.Spec(node_id="n", waypoint="w", state_dir=folder / "n", ads_socket=folder / "ads")


async def test_another_process_with_its_id_is_not_taken_for_it(folder: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            stat = Path(f"/proc/{other.pid}/stat").read_text()
            (folder / "bootstrap.json").write_text(json.dumps({"node": {"id": "n"}}))
            instances.pid_file(folder).write_text(stat)
            taken = instances.adopt(folder)
            assert taken is not None
            taken.close()
            fields = stat.rpartition(")")[2].split()
            fields[19] = str(int(fields[19]) - 1)  # it began a tick before
            instances.pid_file(folder).write_text(f"{other.pid} (envoy) {' '.join(fields)}")
            assert instances.adopt(folder) is None
        finally:
            other.kill()


async def test_a_state_directory_without_sense_holds_no_instance(folder: Path) -> None:
    assert instances.adopt(folder) is None
    (folder / "bootstrap.json").write_text("{")
    instances.pid_file(folder).write_text("17")
    assert instances.adopt(folder) is None


async def test_a_path_too_long_for_a_socket_is_named(folder: Path) -> None:
    spec = instances.Spec(
        node_id="n", waypoint="w", state_dir=folder / ("n" * 100), ads_socket=folder / "ads"
    )
    with pytest.raises(instances.InstanceError, match="shorter state directory"):
        instances.start(spec)


async def leave(envoy: Waypoint) -> None:
    await envoy.instance.drain(DEADLINE_S)
    await envoy.instance.stop()


async def test_stopping_lets_a_request_end(folder: Path) -> None:
    with serving("own") as slow:
        backends = dict.fromkeys(("own", "v1", "v2", "mirror"), slow)
        async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
            await envoy.apply(canary(backends, envoy.port).configuration())
            await envoy.ready()
            answers: list[Answer] = []

            async def request() -> None:
                path = f"/?wait={DEADLINE_S}"
                answers.append(await anyio.to_thread.run_sync(lambda: ask(at("127.0.1.1"), envoy.port, path)))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(request)
                await anyio.to_thread.run_sync(lambda: slow.seen.get(timeout=DEADLINE_S))
                tasks.start_soon(leave, envoy)
                with anyio.fail_after(DEADLINE_S):
                    while await envoy.instance.is_ready():  # /ready says no once it drains
                        await anyio.sleep(0.01)
                slow.released.set()
            assert [(answer.status, answer.headers.get("connection")) for answer in answers] == [
                (200, "close")
            ]
            with anyio.fail_after(1):
                await envoy.instance.ended()


async def test_stopping_ends_at_the_deadline(folder: Path, backends: dict[str, Backend]) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        await envoy.apply(canary(backends, envoy.port).configuration())
        await envoy.ready()
        with socket.create_connection((at("127.0.1.1"), envoy.port)) as idle:
            with anyio.fail_after(DEADLINE_S):
                while not await envoy.instance.connections():
                    await anyio.sleep(0.01)
            began = time.monotonic()
            await envoy.instance.drain(0.3)
            await envoy.instance.stop()
            assert 0.3 <= time.monotonic() - began < 3
            idle.settimeout(DEADLINE_S)
            assert idle.recv(1) == b""


@pytest.mark.kernel
async def test_it_runs_in_the_cgroup_and_network_namespace_given(folder: Path) -> None:
    root = Path("/sys/fs/cgroup/unified")
    cgroup = (root if root.exists() else Path("/sys/fs/cgroup")) / folder.name
    cgroup.mkdir()
    try:
        with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 60"], stdout=-1) as holder:
            try:
                assert holder.stdout
                holder.stdout.readline()
                netns = Path(f"/proc/{holder.pid}/ns/net")
                async with (
                    ads_server(folder / "ads") as server,
                    waypoint(server, folder, cgroup=cgroup, netns=netns) as envoy,
                ):
                    assert (await envoy.apply(World().configuration())).is_current
                    await envoy.ready()
                    pid = envoy.instance.pid
                    assert (cgroup / "cgroup.procs").read_text().split() == [str(pid)]
                    assert Path(f"/proc/{pid}/ns/net").readlink() == netns.readlink()
            finally:
                holder.kill()
    finally:
        cgroup.rmdir()


async def test_one_that_has_no_memory_left_turns_requests_away(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with ads_server(folder / "ads") as server, waypoint(server, folder, memory_mib=1) as envoy:
        await envoy.apply(canary(backends, envoy.port).configuration())
        answered: Answer | OSError | None = None
        with anyio.fail_after(DEADLINE_S):
            while not isinstance(answered, OSError):  # connections too are refused, as it has more than all
                try:
                    answered = await anyio.to_thread.run_sync(ask, at("127.0.1.1"), envoy.port)
                    assert answered.status in (200, 503)
                except OSError as error:
                    answered = error
                await anyio.sleep(0.1)
