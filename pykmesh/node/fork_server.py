"""Starts an instance's processes, the Python ones as forks of one that has imported what they run.

Most of a Python process's start, and of the memory that it has for itself, are its imports. A fork has them
from its parent: it starts in a tenth of the time and shares their memory. It is a process like any other,
with a session, an environment and a log of its own, and shows the command that it stands for. Where another
release has come to lie in the place of what is imported, what starts is executed anew: it is of that one.

The server answers one request after the other on a socket: start a command, say how a process ended. A
request is a file in memory: environments may be large. It ends with its supervisor. What it started is told
to end with it (SIGTERM), and is killed by the supervisor where it does not (`Process.end_with_server`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
import anyio.to_thread
from setproctitle import setproctitle, setthreadtitle

from pykmesh.kernel.layout import is_replaced

ANSWER_DEADLINE_S: Final = 30.0
"""A module is imported before its first fork."""
ANSWER_BYTES_MAX: Final = 64 * 1024
READ_BYTES: Final = 64 * 1024
_PR_SET_PDEATHSIG: Final = 1
_MODULE: Final = [sys.executable, "-m"]


def python(module: str) -> list[str]:
    return [*_MODULE, module]


class ForkServer:
    """The supervisor's end. A server that is gone is started again with the next process."""

    def __init__(self) -> None:
        self._door: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._turn = anyio.Lock()

    async def start(self, command: list[str], environment: Mapping[str, str]) -> Process:
        """Runs a command with this environment. OSError when it cannot."""
        output, its_output = os.pipe2(os.O_CLOEXEC)
        try:
            pid = await self._ask({"command": command, "environment": dict(environment)}, its_output)
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)  # nobody has reaped it: it is the one that was started
                await self.reap(pid)
                raise
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(its_output)
        parent = self._server.pid if self._server else 0
        return Process(self, parent, pid, pidfd, output)

    async def reap(self, pid: int) -> int | None:
        """How a process ended: its exit status, or minus a signal; None when its server ended before it."""
        try:
            return await self._ask({"reap": pid})
        except OSError:
            return None

    def end(self) -> None:
        if self._door is not None:
            self._door.close()
            self._door = None
        if self._server is not None:
            self._server.kill()  # at once, also where it hangs
            self._server.wait()
            self._server = None

    async def _ask(self, request: dict[str, Any], *descriptors: int) -> int:
        async with self._turn:
            door = self._door or self._begin()
            if self._server is not None:
                self._server.send_signal(signal.SIGCONT)  # one that somebody stopped would answer nothing
            try:
                answer = await anyio.to_thread.run_sync(
                    _asked, door, json.dumps(request).encode(), descriptors
                )
            except OSError:
                self.end()
                raise
        if "error" in answer:
            raise OSError(answer["error"])
        return int(answer["answer"])

    def _begin(self) -> socket.socket:
        """Not in a thread that ends: what a thread started is told to end with it."""
        self._door, its_door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.settimeout(ANSWER_DEADLINE_S)
        with its_door:
            self._server = subprocess.Popen(
                # By what also ends one that is stopped: its processes end with it.
                ["setpriv", "--pdeathsig", "KILL", *python(__name__), str(its_door.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[its_door.fileno()],
                start_new_session=True,
            )
        return self._door


def _asked(door: socket.socket, request: bytes, descriptors: tuple[int, ...]) -> dict[str, Any]:
    """OSError when the server has ended or does not answer."""
    with os.fdopen(os.memfd_create("request"), "wb") as file:
        file.write(request)
        file.flush()
        socket.send_fds(door, [b"\n"], [file.fileno(), *descriptors])
    data = door.recv(ANSWER_BYTES_MAX)
    if not data:
        raise ConnectionResetError("the fork server has ended")
    answer: dict[str, Any] = json.loads(data)
    return answer


class Process:
    """What the server started. `receive` gives what it writes, until it has ended."""

    def __init__(self, server: ForkServer, parent: int, pid: int, pidfd: int, output: int) -> None:
        self.pid = pid
        self._server = server
        self._parent = parent
        self._pidfd = pidfd
        self._output = output

    async def receive(self) -> bytes:
        """Empty at the end."""
        await anyio.wait_readable(self._output)
        return os.read(self._output, READ_BYTES)

    async def wait(self) -> int | None:
        """Its exit status, or minus a signal; None when nobody can tell. Once only."""
        await anyio.wait_readable(self._pidfd)
        with anyio.CancelScope(shield=True):
            code = await self._server.reap(self.pid)
        return code  # noqa: RET504  (mypy: the scope might swallow what is raised in it)

    async def end_with_server(self, deadline_s: float) -> None:
        """Kills it where the server has ended and it has not, so long after."""
        try:
            parent = os.pidfd_open(self._parent)
        except ProcessLookupError:
            pass
        except OSError:  # no descriptor is left to watch it by
            return
        else:
            try:
                await anyio.wait_readable(parent)
            finally:
                os.close(parent)
        await anyio.sleep(deadline_s)
        self.kill()

    def kill(self) -> None:
        """It may have ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def end(self, deadline_s: float) -> None:
        """SIGTERM, then SIGKILL at the deadline. It may have ended; nothing can be asked of it after this."""
        with anyio.CancelScope(shield=True):
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError), anyio.move_on_after(deadline_s):
                    signal.pidfd_send_signal(self._pidfd, number)
                    await self.wait()
        os.close(self._pidfd)
        os.close(self._output)


def serve(door: socket.socket) -> str:
    """Answers until the supervisor has ended. Returns in forks alone: the module to run."""
    own = os.getpid()
    _own_sources()
    while True:
        data, descriptors, _, _ = socket.recv_fds(door, 1, 2)
        if not data:
            sys.exit(0)
        if not descriptors:  # there was no room for one more
            door.send(json.dumps({"error": "no descriptor came with the request"}).encode())
            continue
        with os.fdopen(descriptors.pop(0), "rb") as file:
            file.seek(0)
            request = json.load(file)
        command = request.get("command")
        module = _module(command) if command else ""
        try:
            answer: dict[str, Any] = {"answer": _fork(module) if command else _exit_status(request["reap"])}
        except OSError as error:
            answer = {"error": str(error)}
        if command and answer == {"answer": 0}:
            door.close()
            _become(own, command, module, request["environment"], *descriptors)
            return module
        for descriptor in descriptors:
            os.close(descriptor)
        door.send(json.dumps(answer).encode())


def _exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(module: str) -> int:
    if module:
        with contextlib.suppress(BaseException):  # also an exit: it says so in the fork, in its own log
            importlib.import_module(f"{module}.__main__")
        sys.modules.pop(f"{module}.__main__", None)
        gc.freeze()
    return os.fork()


def _module(command: list[str]) -> str:
    """What a fork can run. Nothing where another release lies in the place of what is imported here."""
    is_another = is_replaced() or _sources() != _own_sources()
    return "" if command != python(command[-1]) or is_another else command[-1]


def _sources() -> frozenset[tuple[str, int, int]]:
    """Of what is run here: each file, when it was written, and its size."""
    packages = Path(__file__).parents[2]
    files = [path for name in ("pykmesh", "services") for path in (packages / name).rglob("*.py")]
    with contextlib.suppress(FileNotFoundError):  # it is being replaced
        return frozenset(
            (str(path), found.st_mtime_ns, found.st_size) for path in files for found in [path.stat()]
        )
    return frozenset()


_own_sources = functools.cache(_sources)
"""Those of when this was asked first."""


def _become(parent: int, command: list[str], module: str, environment: dict[str, str], output: int) -> None:
    """Returns when the command is a module that is to be run in this process."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    if not module:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # which this Python ignores, and what it executes would
        try:
            os.execvp(command[0], command)  # noqa: S606  (a command line of our own)
        except OSError as error:
            sys.exit(f"{command[0]}: {error.strerror}")
    sys.argv = command[-1:]
    setproctitle(" ".join(command))
    setthreadtitle(command[-1].rpartition(".")[2])


if __name__ == "__main__":
    setproctitle(" ".join(python(__spec__.name)))
    runpy.run_module(serve(socket.socket(fileno=int(sys.argv[1]))), run_name="__main__", alter_sys=True)
