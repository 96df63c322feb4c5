"""The instances of all waypoints: those that run are adopted, missing ones started, ended ones started again.

An instance's directory says of which waypoint it is and where it listens, before it runs: whoever comes after
this process finds all of them there, also those whose waypoint is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
import msgspec
import structlog

from services.waypoint_mgr.announce import Place
from services.waypoint_mgr.instances import EnvoyProcess, InstanceError, Spec, adopt, start

READY_POLL_S: Final = 0.05
RESTART_S: Final = 0.5
DRAIN_DEADLINE_S: Final = 30.0
LEAVE_S: Final = 1.0
"""How long clients may still be sent to an instance that is announced no more."""
_FILE: Final = "instance.json"

log = structlog.get_logger(__name__)


class _Kept(msgspec.Struct, frozen=True):
    """What an instance's directory says."""

    waypoint: str
    port: int


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all."""

    envoys_dir: Path
    cgroup: Path
    netns: Path | None
    address: str
    """Where they listen; empty: the address that this host has towards its default route."""
    first_port: int
    ads_socket: Path


class Member:
    """One instance."""

    def __init__(self, name: str, waypoint: str, port: int) -> None:
        self.name = name
        self.waypoint = waypoint
        self.port = port
        self.process: EnvoyProcess | None = None
        self.is_ready = False
        self.leaving = anyio.Event()
        self.is_known = True
        """False while it may run from before this process."""
        self.restarts = 0
        self.error = ""

    @property
    def is_leaving(self) -> bool:
        return self.leaving.is_set()

    def status(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "port": self.port,
            "pid": self.process.pid if self.process else None,
            "ready": self.is_ready,
            "leaving": self.is_leaving,
            "restarts": self.restarts,
            "error": self.error,
        }


class Fleet:
    """`changed` is called when an instance becomes ready, ends or leaves."""

    def __init__(self, settings: Settings, changed: Callable[[], None]) -> None:
        self._settings = settings
        self._changed = changed
        self._tasks: anyio.abc.TaskGroup
        self.members: dict[str, Member] = {}

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; instances run on."""
        async with anyio.create_task_group() as self._tasks:
            for directory in sorted(self._settings.envoys_dir.glob("*/")):
                self._remember(directory)
            task_status.started()
            await anyio.sleep_forever()

    def _remember(self, directory: Path) -> None:
        try:
            kept = msgspec.json.decode((directory / _FILE).read_bytes(), type=_Kept)
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("instance_unknown", directory=str(directory), error=str(error))
            return
        member = Member(directory.name, kept.waypoint, kept.port)
        member.is_known = False
        self._add(member)

    def want(self, waypoints: Iterable[str]) -> None:
        """Instances of these there shall be, and of no others."""
        wanted = set(waypoints)
        for waypoint in wanted - {m.waypoint for m in self.members.values() if not m.is_leaving}:
            self._add(Member(self._free_name(waypoint), waypoint, self._free_port()))
        for member in self.members.values():
            if member.waypoint not in wanted and not member.is_leaving:
                member.leaving.set()
                self._changed()

    def places(self, waypoint: str) -> list[Place] | None:
        """Where connections to a waypoint may go. None while that is not known: an instance may run."""
        if not all(member.is_known for member in self.members.values() if member.waypoint == waypoint):
            return None
        return [
            Place(member.name, self.address, member.port)
            for member in self.members.values()
            if member.waypoint == waypoint and member.is_ready and not member.is_leaving
        ]

    @property
    def address(self) -> str:
        """Where instances listen; empty while there is no such address."""
        return self._settings.address or _default_address()

    def _add(self, member: Member) -> None:
        self.members[member.name] = member
        self._tasks.start_soon(self._keep_running, member)

    async def _keep_running(self, member: Member) -> None:
        """Until it has left."""
        while not member.is_leaving:
            try:
                member.process = self._begin(member)
                member.error = ""
            except (InstanceError, OSError) as error:
                member.error, member.is_known = str(error), True
                self._changed()
                log.warning("instance_not_started", instance=member.name, error=str(error))
                await anyio.sleep(RESTART_S)
                continue
            await self._watch(member, member.process)
            if not member.is_leaving:
                member.restarts += 1
                log.warning("instance_ended", instance=member.name)
                await anyio.sleep(RESTART_S)
        del self.members[member.name]
        shutil.rmtree(self._settings.envoys_dir / member.name, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self._settings.cgroup / member.name).rmdir()
        log.info("instance_left", instance=member.name)
        self._changed()

    def _begin(self, member: Member) -> EnvoyProcess:
        """Adopts it, or starts it anew."""
        if not self.address:
            raise InstanceError("no default route: say where waypoints listen (--waypoint-address)")
        settings, state_dir = self._settings, self._settings.envoys_dir / member.name
        state_dir.mkdir(parents=True, exist_ok=True)
        (state_dir / _FILE).write_bytes(msgspec.json.encode(_Kept(member.waypoint, member.port)))
        cgroup = settings.cgroup / member.name
        cgroup.mkdir(parents=True, exist_ok=True)
        spec = Spec(
            node_id=member.name,
            waypoint=member.waypoint,
            state_dir=state_dir,
            ads_socket=settings.ads_socket,
            cgroup=cgroup,
            netns=settings.netns,
        )
        found = adopt(state_dir)
        if found is not None:
            log.info("instance_adopted", instance=member.name, pid=found.pid)
            return found
        member.is_known = True
        return start(spec)

    async def _watch(self, member: Member, process: EnvoyProcess) -> None:
        """Until it ends."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._await_ready, member, process)
            tasks.start_soon(self._let_leave, member, process)
            await process.ended()
            tasks.cancel_scope.cancel()
        member.is_ready, member.is_known, member.process = False, True, None
        process.close()
        self._changed()

    async def _await_ready(self, member: Member, process: EnvoyProcess) -> None:
        while not await process.is_ready():  # noqa: ASYNC110  (an Envoy tells nobody)
            await anyio.sleep(READY_POLL_S)
        member.is_ready = member.is_known = True
        log.info("instance_ready", instance=member.name)
        self._changed()

    async def _let_leave(self, member: Member, process: EnvoyProcess) -> None:
        await member.leaving.wait()
        await anyio.sleep(LEAVE_S)
        await process.stop(DRAIN_DEADLINE_S)

    def _free_name(self, waypoint: str) -> str:
        """Short, for it is part of a unix socket's path."""
        short = waypoint.partition("/")[2].partition(".")[0][:20]
        digest = hashlib.blake2b(waypoint.encode(), digest_size=3).hexdigest()
        number = 0
        while (name := f"{short}-{digest}-{number}") in self.members:
            number += 1
        return name

    def _free_port(self) -> int:
        taken = {member.port for member in self.members.values()}
        port = self._settings.first_port
        while port in taken:
            port += 1
        return port


def _default_address() -> str:
    """The address that this host has towards its default route; empty where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of a range for documentation; nothing is sent
        except OSError:
            return ""
        return str(probe.getsockname()[0])
