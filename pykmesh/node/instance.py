"""An instance on a node: its name, directories and ports, and how the command line finds it.

<run_dir>/instance.json     who runs it, where; removed at its orderly end
<run_dir>/previous.json     how to run the release before this one, if there was one
<run_dir>/upgrade.json      what ran, while another release is put in its place
<run_dir>/lock              held while it runs: one supervisor an instance
<run_dir>/supervisor.sock   says what runs, and how often it was started again
<run_dir>/secrets/<name>    the bus's passwords
<run_dir>/logs/<name>.log   what each process said
<run_dir>/waypoints/        which instances waypoints have, for the embedded control plane
<run_dir>/envoys/<name>/    what a waypoint's instance keeps
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import random
import re
import secrets
import shlex
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from pykmesh.files import lock_holder, temporary_of, write_whole

DEFAULT_NAME: Final = "default"
PORT_MAX: Final = 65535
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,29}[a-z0-9])?")


class InstanceError(Exception):
    """The instance cannot be made or found; the text says why and what to do."""


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """Every port that an instance listens on, on 127.0.0.1."""

    nats: int = 15222
    xds: int = 15010
    metrics: int = 15020
    xds_client: int = 15210
    map_writer: int = 15211
    bpf_loader: int = 15212
    telemetry: int = 15213
    dns_proxy: int = 15214
    control_plane: int = 15215
    waypoint_mgr: int = 15216


CLIENT_PORTS: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
FREE_FROM: Final = 20_000
"""Below are ports that one may expect things at."""
PORT_NAMES: Final = Ports.__struct_fields__


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    name: str = DEFAULT_NAME
    run_dir: Path
    pin_dir: Path
    ports: Ports = Ports()
    pid: int = 0

    @property
    def supervisor_socket(self) -> Path:
        return self.run_dir / "supervisor.sock"

    @property
    def enroll_socket(self) -> Path:
        return self.run_dir / "enroll.sock"

    @property
    def waypoints_dir(self) -> Path:
        return self.run_dir / "waypoints"

    @property
    def envoys_dir(self) -> Path:
        return self.run_dir / "envoys"

    @property
    def previous(self) -> Path:
        return self.run_dir / "previous.json"

    @property
    def journal(self) -> Path:
        return self.run_dir / "upgrade.json"

    def secret(self, process: str) -> Path:
        return self.run_dir / "secrets" / process

    def log(self, process: str) -> Path:
        return self.run_dir / "logs" / f"{process}.log"


def named(
    name: str, run_dir: Path | None = None, pin_dir: Path | None = None, ports: Ports | None = None
) -> Instance:
    """The instance of a name, in the usual places unless told otherwise. InstanceError for a bad name."""
    if not _NAME.fullmatch(name):
        raise InstanceError(f"instance name {name!r}: lower-case letters, digits and dashes, at most 31")
    return Instance(
        name=name,
        run_dir=run_dir or Path("/run/pykmesh") / name,
        pin_dir=pin_dir or Path("/sys/fs/bpf/pykmesh") / name,
        ports=ports or Ports(),
    )


def command(instance: Instance, *words: str) -> str:
    """What to type to have `words` done to this instance and no other."""
    usual = named(instance.name)
    options = (
        ("--instance", instance.name, DEFAULT_NAME),
        ("--run-dir", instance.run_dir, usual.run_dir),
        ("--pin-dir", instance.pin_dir, usual.pin_dir),
    )
    place = [word for option, value, default in options if value != default for word in (option, str(value))]
    return " ".join(["pykmesh", *map(shlex.quote, place), *words])


def how_to_start(instance: Instance) -> str:
    return command(instance, "up -d --config-dir FOLDER (or --xds-address HOST:PORT)")


_reserved: Final[list[int]] = []
"""Sockets that are bound and not listened on for as long as this process is there. Who looks for a free port
passes them by; who has been told one listens there all the same, as every server with SO_REUSEADDR can."""


def free_ports(kept: dict[str, int]) -> Ports:
    """Ports that nobody else is given while this process is there, but for those given."""
    wanted = [name for name in PORT_NAMES if name not in kept]
    return Ports(**kept, **dict(zip(wanted, ports_of_no_client(len(wanted)), strict=True)))


def ports_of_no_client(count: int) -> list[int]:
    """Free ones of loopback that the kernel gives to no client: who starts again finds his own free.

    They are reserved while this process is there. InstanceError where there are not so many.
    """
    first, last = map(int, CLIENT_PORTS.read_text().split())
    candidates = [*range(FREE_FROM, first), *range(last + 1, PORT_MAX + 1)]
    drawn = random.sample(candidates, len(candidates))
    found = list(itertools.islice((port for port in drawn if _reserve(port, strict=True) is None), count))
    if len(found) < count:
        raise InstanceError(f"no {count} ports are free outside of {first} to {last}, which clients have")
    return found


def _reserve(port: int, *, strict: bool) -> OSError | None:
    """Why it cannot be; strict: not either where it is reserved by another."""
    probe = socket.socket()
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(not strict))
        probe.bind(("127.0.0.1", port))
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError as error:
        probe.close()
        return error
    _reserved.append(probe.detach())
    return None


def reserve_ports(ports: Ports, needed: list[str]) -> None:
    """Keeps them from those who look for free ones, also while a process of ours starts again.

    InstanceError naming the first port that is taken and how to choose another.
    """
    users: dict[int, str] = {}
    for name in needed:
        port = getattr(ports, name)
        if not 0 < port <= PORT_MAX or port in users:
            why = f"is that of {users[port]}" if port in users else "is no port to listen on"
            raise InstanceError(f"port {port} ({name}) {why}; choose another with --port {name}=NUMBER")
        users[port] = name
        if taken := _reserve(port, strict=False):
            raise InstanceError(
                f"port {port} ({name}): {taken.strerror}; choose another with --port {name}=NUMBER"
            ) from taken


def not_there(instance: Instance, processes: Iterable[str]) -> list[Path]:
    """Of what a start makes below the run-time directory, and above it, what is not there yet."""
    paths = [*reversed(instance.run_dir.parents), instance.run_dir, *_directories(instance)]
    paths += _files(instance, processes)
    return [path for path in paths if not path.exists()]


def take_back(made: list[Path]) -> None:
    """Removes what a start that was refused has made; directories that others use by now stay."""
    for path in reversed(made):
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


def _directories(instance: Instance) -> list[Path]:
    names = ("secrets", "logs", "waypoints", "envoys")
    return [instance.run_dir / name for name in names]


def _files(instance: Instance, processes: Iterable[str]) -> list[Path]:
    names = [*processes, "supervisor"]
    files = [instance.run_dir / "lock", instance.run_dir / "nats.conf"]
    files += [instance.enroll_socket, instance.supervisor_socket]
    for path in (
        instance.run_dir / "instance.json", instance.previous, instance.journal, *map(instance.secret, names),
    ):  # fmt: skip
        files += [path, temporary_of(path)]
    return files + [instance.log(name).with_suffix(suffix) for name in names for suffix in (".log", ".old")]


def prepare(instance: Instance) -> int:
    """Makes the directories, takes the lock and writes who runs. Returns the lock's descriptor."""
    made = [path for path in (instance.run_dir, *_directories(instance)) if not path.exists()]
    try:
        for directory in (instance.run_dir, *_directories(instance)):
            directory.mkdir(parents=True, exist_ok=True)
        instance.secret("").chmod(0o700)
        held = os.open(instance.run_dir / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        take_back(made)
        raise InstanceError(f"run-time directory {instance.run_dir}: {error.strerror}") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        if error.errno != errno.EWOULDBLOCK:
            raise
        pid = running(instance.run_dir)
        raise InstanceError(
            f"instance {instance.name!r} runs already (pid {pid.pid if pid else 'unknown'}): "
            f"{command(instance, 'down')}, or choose another --instance"
        ) from error
    (instance.run_dir / "instance.json").unlink(missing_ok=True)  # of one who ended without a word
    return held


def write(instance: Instance, processes: list[str]) -> None:
    """Secrets and the file that the command line reads. InstanceError when they cannot be written."""
    try:
        for process in processes:
            if not _has_content(instance.secret(process)):
                write_whole(instance.secret(process), secrets.token_urlsafe(24), 0o600)
        own = msgspec.structs.replace(instance, pid=os.getpid())
        write_whole(instance.run_dir / "instance.json", msgspec.json.encode(own, enc_hook=str))
    except OSError as error:
        raise InstanceError(f"run-time directory {instance.run_dir}: {error.strerror}") from error


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def forget(instance: Instance) -> None:
    (instance.run_dir / "instance.json").unlink(missing_ok=True)
    instance.supervisor_socket.unlink(missing_ok=True)


def remove_files(instance: Instance, processes: Iterable[str]) -> None:
    """Removes what an instance writes below its run-time directory, and directories that are then empty."""
    for path in _files(instance, processes):
        path.unlink(missing_ok=True)
    for directory in (*_directories(instance), instance.run_dir):
        with contextlib.suppress(OSError):
            directory.rmdir()


def running(run_dir: Path) -> Instance | None:
    """The instance whose supervisor lives, which holds the lock; None when there is none.

    InstanceError for who may not look, and where the file that says so is damaged.
    """
    lock, path = run_dir / "lock", run_dir / "instance.json"
    if not _is_locked(lock):
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Instance, dec_hook=_to_path)
    except FileNotFoundError:  # it is starting
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise InstanceError(
            f"{path} is damaged ({error}): end the supervisor that wrote it (pid {lock_holder(lock)}), and "
            f"start again; traffic goes on"
        ) from error


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError as error:
        raise InstanceError(f"{path}: {error.strerror}: run as root") from error
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _to_path(_: type, value: str) -> Path:
    return Path(value)
