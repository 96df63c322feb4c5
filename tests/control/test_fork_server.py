"""What a supervisor's processes are started by: any command, and how it ended."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from pykmesh.contracts.settings import EXIT_SETTINGS
from pykmesh.node import fork_server
from pykmesh.node import supervisor as module
from pykmesh.node.fork_server import ForkServer, Process, python
from pykmesh.node.instance import InstanceError, ports_of_no_client
from pykmesh.node.supervisor import Spec, Supervisor
from tests.control.mesh_node import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.end()


async def outcome(process: Process) -> tuple[str, int | None]:
    said = b""
    while data := await process.receive():
        said += data
    code = await process.wait()
    await process.end(0)
    return said.decode(), code


@pytest.mark.parametrize(
    ("command", "said", "code"),
    [
        (["sh", "-c", "echo $NAME; exit 3"], "a name\n", 3),
        (["sh", "-c", "kill -9 $$"], "", -signal.SIGKILL),
        (python("calendar"), "January", 0),
        (
            python("services.map_writer"),
            "map_writer: PYKMESH_ADMIN_PORT in the environment is 'none': ",
            EXIT_SETTINGS,
        ),
        (python("services.nobody"), "No module named services.nobody", 1),
        (["/nowhere/at-all"], "/nowhere/at-all: No such file or directory\n", 1),
    ],
)
async def test_a_command_runs_with_its_environment_and_its_end_is_told(
    server: ForkServer, command: list[str], said: str, code: int
) -> None:
    environment = {"PATH": os.environ["PATH"], "NAME": "a name", "PYKMESH_ADMIN_PORT": "none"}
    found = await outcome(await server.start(command, environment))
    assert said in found[0], found
    assert found[1] == code


HANGS = """
import http.server, os, sys
class Once(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked = getattr(self.server, "asked", 0) + 1
        if self.server.asked > 2:
            while True:
                __import__("time").sleep(60)
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Once).serve_forever()
"""


async def test_one_that_is_alive_no_more_is_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that never was: it may be starting."""
    monkeypatch.setattr(module, "LIVE_EVERY_S", 0.1)
    ports = ports_of_no_client(2)
    commands = ([sys.executable, "-c", HANGS, str(ports[0])], ["sleep", "60"])
    specs = [
        Spec(name, command, {}, tmp_path / name, port)
        for name, command, port in zip(("hangs", "starts"), commands, ports, strict=True)
    ]
    supervisor = Supervisor(specs)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supervisor.run)
        await until("it to be started again", lambda: supervisor.restarts["hangs"] > 0)
        assert supervisor.ended["hangs"].startswith(f"signal {signal.SIGKILL:d}")
        assert supervisor.restarts["starts"] == 0
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("code", [0, 1, 2, EXIT_SETTINGS])
async def test_only_wrong_settings_end_all(tmp_path: Path, code: int) -> None:
    """Not 2, with which a broker ends that has run out of memory."""
    supervisor = Supervisor([Spec("one", ["sh", "-c", f"echo sorry; exit {code}"], {}, tmp_path / "log")])
    with anyio.fail_after(20):
        if code == EXIT_SETTINGS:
            with pytest.RaisesGroup(pytest.RaisesExc(InstanceError, match="sorry")):
                await supervisor.run()
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supervisor.run)
            await until("two restarts", lambda: supervisor.restarts["one"] > 1)
            tasks.cancel_scope.cancel()


async def test_a_process_shows_its_own_command_in_a_session_of_its_own(
    server: ForkServer, tmp_path: Path
) -> None:
    settings = {"PYKMESH_ADMIN_PORT": "0", "PYKMESH_METRICS_PORT": "0", "PYKMESH_PIN_DIR": str(tmp_path)}
    process = await server.start(python("services.telemetry"), settings)
    assert b"process_started" in await process.receive()
    proc = Path("/proc") / str(process.pid)
    assert (proc / "cmdline").read_bytes().rstrip(b"\0").decode() == " ".join(python("services.telemetry"))
    assert (proc / "comm").read_text() == "telemetry\n"
    assert os.getsid(process.pid) == process.pid
    await process.end(5)
    assert not proc.exists()


async def test_a_server_that_is_killed_takes_its_processes_along_and_the_next_is_another(
    server: ForkServer,
) -> None:
    process = await server.start(["sleep", "60"], dict(os.environ))
    os.kill(parent_of(process), signal.SIGKILL)
    assert await outcome(process) == ("", None)
    assert await outcome(await server.start(["echo", "again"], dict(os.environ))) == ("again\n", 0)


async def test_a_server_that_was_stopped_goes_on_at_the_next_request(server: ForkServer) -> None:
    process = await server.start(["sleep", "60"], dict(os.environ))
    os.kill(parent_of(process), signal.SIGSTOP)
    with anyio.fail_after(10):
        assert await outcome(await server.start(["echo", "on"], dict(os.environ))) == ("on\n", 0)
        await process.end(5)


async def test_an_environment_may_be_large(server: ForkServer) -> None:
    """As large as execve(2) takes; each text 128 KiB at most."""
    environment = {"PATH": os.environ["PATH"], **{f"SERVICE_{n}": "x" * 100_000 for n in range(10)}}
    assert await outcome(await server.start(["sh", "-c", "echo ${#SERVICE_9}"], environment)) == (
        "100000\n",
        0,
    )


async def test_a_program_has_the_signals_that_programs_expect(server: ForkServer) -> None:
    said, _ = await outcome(await server.start(["grep", "SigIgn", "/proc/self/status"], dict(os.environ)))
    ignored = int(said.split()[1], 16)
    assert not any(ignored & 1 << number - 1 for number in (signal.SIGPIPE, signal.SIGXFSZ))


async def test_a_server_that_hangs_is_ended_at_once(server: ForkServer) -> None:
    process = await server.start(["sleep", "60"], dict(os.environ))
    os.kill(parent_of(process), signal.SIGSTOP)
    with anyio.fail_after(10):
        server.end()
        assert await outcome(process) == ("", None)


async def test_what_does_not_end_with_its_server_is_killed(server: ForkServer) -> None:
    process = await server.start(["sh", "-c", "trap '' TERM; echo ready; sleep 60"], dict(os.environ))
    assert await process.receive() == b"ready\n"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(process.end_with_server, 0.1)
        await anyio.sleep(0.05)
        os.kill(parent_of(process), signal.SIGKILL)
        with anyio.fail_after(10):
            assert await process.wait() is None
    await process.end(0)


async def test_what_nobody_could_watch_is_not_left(
    server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = await server.start(["sleep", "60"], dict(os.environ))

    def no_more(_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_more)
    with pytest.raises(OSError, match="Too many"):
        await server.start(["sleep", "60"], dict(os.environ))
    monkeypatch.undo()
    assert children_of(parent_of(watched)) == [watched.pid]
    await watched.end(5)


def children_of(pid: int) -> list[int]:
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def parent_of(process: Process) -> int:
    return int((Path("/proc") / str(process.pid) / "stat").read_text().rpartition(")")[2].split()[1])


async def test_what_does_not_end_in_time_is_killed(server: ForkServer) -> None:
    process = await server.start(["sh", "-c", "trap '' TERM; echo ready; sleep 60"], dict(os.environ))
    assert await process.receive() == b"ready\n"
    await process.end(0.2)
    assert not (Path("/proc") / str(process.pid)).exists()


def test_nothing_is_forked_of_files_that_were_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    command = python("services.map_writer")
    assert fork_server._module(command) == "services.map_writer"
    monkeypatch.setattr(fork_server, "_own_sources", frozenset)
    assert fork_server._module(command) == ""
