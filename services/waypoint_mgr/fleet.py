"""The instances of all waypoints: those that run are adopted, missing ones started, ended ones started again.

How many there are follows the load (scaling.py); they stand behind one address (fronts.py), so that who comes
and goes is known here and to this node's kernel alone. An instance's directory says of which waypoint it is
and where it listens, before it runs: whoever comes after this process finds all of them there, also those
whose waypoint is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
import structlog

from pykmesh.contracts import enrollment
from pykmesh.contracts.enrollment import EnrollmentError, ask_for_front, ask_for_fronts_alone
from pykmesh.files import write_whole
from pykmesh.manifests.names import PortNumber
from services.waypoint_mgr.announce import Place
from services.waypoint_mgr.fronts import Front, FrontError, listening_socket
from services.waypoint_mgr.instances import UNHEARD, EnvoyProcess, InstanceError, Spec, adopt, start
from services.waypoint_mgr.requests import Served
from services.waypoint_mgr.scaling import Found, Load, Policy, decide

READY_POLL_S: Final = 0.05
RESTART_S: Final = 0.5
DRAIN_DEADLINE_S: Final = 30.0
UNSTEER_S: Final = 5.0
"""How long an instance that shall leave waits for the kernel to be told so."""
HANDSHAKE_S: Final = 3.0
"""What was given to an instance before it was to leave may need so long to be a connection."""
STEER_AGAIN_S: Final = 5.0
RETRY_S: Final = 0.5
WAIT_S: Final = 10.0
"""How long clients may wait for an instance, when all are gone, before they are refused."""
AWAY_S: Final = 2.5
"""One that does not answer for so long gets no new connections, where there are others that answer."""
SILENCE_S: Final = 20.0
"""One that does not answer for so long serves nobody either: it is killed, and another one started."""
SCALE_S: Final = 1.0
DEMAND_S: Final = 0.05
SAMPLES: Final = 5
PORTS_TRIED: Final = 100
_FILE: Final = "instance.json"
KEPT: Final = "kept"
NAMES: Final = "principals"
"""Directories that are no instance's, whose names have a `~`."""

log = structlog.get_logger(__name__)


class _Kept(msgspec.Struct, frozen=True):
    """What an instance's directory says. `front` is the port at which connections to its waypoint come in."""

    waypoint: str
    port: PortNumber
    front: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    leaving: bool = False


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all."""

    envoys_dir: Path
    cgroup: Path
    netns: Path | None
    address: str
    """Where they listen; empty: the address that this host has towards its default route."""
    first_port: int
    ads_socket: Path
    enroll_socket: Path


class Member:
    """One instance."""

    def __init__(self, name: str, waypoint: str, port: int, front: int = 0) -> None:
        self.name = name
        self.waypoint = waypoint
        self.port = port
        self.front = front
        self.process: EnvoyProcess | None = None
        self.is_ready = False
        """It listens."""
        self.is_steered = False
        """The kernel gives it connections."""
        self.leaving = anyio.Event()
        self.is_known = True
        """False while it may run from before this process."""
        self.restarts = 0
        self.error = ""
        self.is_adopted = False
        """It ran before this process."""
        self.heard = 0.0
        """When it answered last."""
        self.is_silent = False
        """It has not answered for a while."""
        self.connections = 0
        self._used: deque[tuple[float, float]] = deque(maxlen=SAMPLES)

    @property
    def is_leaving(self) -> bool:
        return self.leaving.is_set()

    def note_used(self, at_s: float, processor_s: float) -> None:
        """How long it has used processors since it began."""
        if self._used and self._used[-1][1] > processor_s:
            self._used.clear()  # another process, another count
        self._used.append((at_s, processor_s))

    @property
    def is_measured(self) -> bool:
        return len(self._used) > 1

    @property
    def processors(self) -> float:
        """In use, over the last few samples."""
        if not self.is_measured:
            return 0.0
        (began, before), (now, used) = self._used[0], self._used[-1]
        return (used - before) / max(now - began, 1e-3)

    def status(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "port": self.port,
            "pid": self.process.pid if self.process else None,
            "ready": self.is_steered,
            "leaving": self.is_leaving,
            "restarts": self.restarts,
            "error": self.error,
            "connections": self.connections,
            "processors": round(self.processors, 3),
        }


class Group:
    """The instances that a waypoint shall have, and where its connections come in."""

    def __init__(self, waypoint: str) -> None:
        self.waypoint = waypoint
        self.policy = Policy()
        self.size = 0
        self.why = "begins"
        self.load: Load | None = None
        self.front: Front | None = None
        self.error = ""
        self.is_known = False
        """Whether connections come in is known, since this process began."""
        self.is_wanted = False
        """One that is wanted no more gives its front up."""
        self.waits_since = float("-inf")
        """When an instance took connections last, or was begun for one: since then clients may wait."""
        self.turned_away = 0
        self._found: list[Found] = []

    def follow(self, load: Load) -> None:
        now = time.monotonic()
        found = decide(self.policy, self.size, load, self._found, now)
        self._found.append(Found(now, found.asked))
        self._found = [one for one in self._found if one.at_s > now - self.policy.window_s]
        self.load = load
        self.resize(found.size, found.why)

    def begin(self) -> None:
        """A connection came while there was no instance."""
        self._found.append(Found(time.monotonic(), 1))
        self.waits_since = time.monotonic()
        self.resize(1, "a connection came")

    def adopt(self, size: int) -> None:
        """So many run from before: they count as asked for until now, for nobody knows better."""
        self._found = [Found(time.monotonic(), size)] if size else []
        self.resize(max(size, 1), "begins")

    def resize(self, size: int, why: str) -> None:
        if size != self.size:
            log.info("waypoint_scaled", waypoint=self.waypoint, was=self.size, size=size, why=why)
        self.size, self.why = size, why
        if not size:
            self.is_asked_for()  # what was turned away until now is nobody who waits

    def is_asked_for(self) -> bool:
        """True when connections came that no instance took, since it was asked last."""
        if self.front is None:
            return False
        before, self.turned_away = self.turned_away, self.front.turned_away
        return self.turned_away != before

    def status(self) -> dict[str, Any]:
        load = self.load
        return {
            "size": self.size,
            "least": self.policy.least,
            "most": self.policy.most,
            "why": self.why,
            "front": f"{self.front.address}:{self.front.port}" if self.front else None,
            "connections": load.connections if load else None,
            "processors": round(load.processors, 3) if load else None,
            "error": self.error,
        }


def _remembered(directory: Path) -> Member | None:
    """None where what was kept is not there, or damaged. Raises any other OSError, which says nothing."""
    try:
        kept = msgspec.json.decode((directory / _FILE).read_bytes(), type=_Kept)
    except (FileNotFoundError, msgspec.MsgspecError, ValueError) as error:
        log.warning("instance_not_remembered", directory=str(directory), error=str(error))
        return None
    member = Member(directory.name, kept.waypoint, kept.port, kept.front)
    member.is_known = kept.leaving
    if kept.leaving:
        member.leaving.set()
    return member


class Fleet:
    """`changed` is called when an instance becomes ready, ends or leaves; `last_words` before it is ended."""

    def __init__(
        self,
        settings: Settings,
        changed: Callable[[], None],
        last_words: Callable[[Served], Awaitable[None]],
        is_configured: Callable[[str], bool],
    ) -> None:
        """`is_configured`: whether an instance, by name, has what it was to get. Who ran before had it."""
        self._settings = settings
        self._tell = changed
        self._last_words = last_words
        self._is_configured = is_configured
        self._tasks: anyio.abc.TaskGroup
        self._steering_due = anyio.Event()
        self._is_wanted = False
        """Whether it was said what shall be."""
        self.members: dict[str, Member] = {}
        self.groups: dict[str, Group] = {}

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; instances run on."""
        async with anyio.create_task_group() as self._tasks:
            for directory in sorted(self._settings.envoys_dir.glob("*/")):
                if directory.name in (KEPT, NAMES):
                    continue
                found = _remembered(directory) or await self._recovered(directory)
                if found is not None:
                    self._add(found)
            self._tasks.start_soon(self._keep_steered)
            self._tasks.start_soon(self._keep_scaled)
            self._tasks.start_soon(self._keep_awake)
            task_status.started()
            await anyio.sleep_forever()

    async def _recovered(self, directory: Path) -> Member | None:
        """What an Envoy says of itself that runs from a directory of which nothing is known."""
        process = adopt(directory, self._settings.cgroup / directory.name)
        if process is None:
            log.warning("instance_unknown", directory=str(directory))
            return None
        try:
            member = Member(directory.name, *await process.said())
        except UNHEARD as error:
            effect = "it runs on, and nobody knows of it"
            log.warning("instance_unknown", directory=str(directory), error=str(error), effect=effect)
            return None
        finally:
            process.close()
        member.is_known = False
        log.warning("instance_recovered", instance=member.name, waypoint=member.waypoint, port=member.port)
        return member

    def _changed(self) -> None:
        self._steering_due.set()
        self._tell()

    # -- what shall be

    def want(self, policies: Mapping[str, Policy]) -> None:
        """Instances of these waypoints there shall be, and of no others."""
        self._is_wanted = True
        for waypoint, policy in policies.items():
            group = self.groups.setdefault(waypoint, Group(waypoint))
            if not group.is_wanted:
                group.is_wanted = True
                group.adopt(len(self._standing(waypoint)))
                self._steering_due.set()
            group.policy = policy
            self._fit(group)
        for waypoint, group in self.groups.items():
            if waypoint not in policies and group.is_wanted:
                group.is_wanted = False
                self._changed()
        for member in self.members.values():
            if member.waypoint not in policies:
                self._leave(member)

    def _standing(self, waypoint: str) -> list[Member]:
        """In the order in which they would stay."""
        found = [m for m in self.members.values() if m.waypoint == waypoint and not m.is_leaving]
        return sorted(found, key=lambda m: (not m.is_ready and m.is_known, m.name))

    def _fit(self, group: Group) -> None:
        """As many instances as the group's size, within what the policy says."""
        size = min(max(group.size, group.policy.least), group.policy.most)
        standing = self._standing(group.waypoint)
        for member in standing[size:]:
            self._leave(member)
        front = group.front.port if group.front else 0
        for _ in range(size - len(standing)):
            self._add(Member(self._free_name(group.waypoint), group.waypoint, self._free_port(), front))
        group.size = size

    def _leave(self, member: Member) -> None:
        if not member.is_leaving:
            member.leaving.set()
            with contextlib.suppress(OSError):
                self._note(member)
            self._changed()

    def places(self, waypoint: str) -> list[Place] | None:
        """Where connections to a waypoint may go. None while that is not known: an instance may run."""
        if not all(member.is_known for member in self.members.values() if member.waypoint == waypoint):
            return None
        group = self.groups.get(waypoint)
        if group is None:
            return []
        if not group.is_known:
            return None
        if group.front is None:
            return []
        waits = group.size == 0 or time.monotonic() - group.waits_since < WAIT_S
        if not waits and not any(member.is_steered for member in self._standing(waypoint)):
            return []
        return [Place(_short_name(waypoint), group.front.address, group.front.port)]

    def served(self) -> Iterator[Served]:
        """Those that may have served requests."""
        for member in self.members.values():
            if member.is_ready and member.process is not None:
                yield Served(member.name, member.process)

    @property
    def address(self) -> str:
        """Where instances listen; empty while there is no such address."""
        return self._settings.address or _default_address()

    # -- one instance, as long as it lives

    def _add(self, member: Member) -> None:
        self.members[member.name] = member
        self._tasks.start_soon(self._keep_running, member)

    async def _keep_running(self, member: Member) -> None:
        """Until it has left."""
        place, cgroup = self._settings.envoys_dir / member.name, self._settings.cgroup / member.name
        if member.is_leaving and (process := adopt(place, cgroup)) is not None:
            member.process = process  # it was told so before this process
            await self._watch(member, process)
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
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            cgroup.rmdir()
        log.info("instance_left", instance=member.name)
        self._changed()

    def _begin(self, member: Member) -> EnvoyProcess:
        """Adopts it, or starts it anew."""
        if not self.address:
            raise InstanceError("no default route: say where waypoints listen (--waypoint-address)")
        settings, state_dir = self._settings, self._settings.envoys_dir / member.name
        state_dir.mkdir(parents=True, exist_ok=True)
        self._note(member)
        cgroup, group = settings.cgroup / member.name, self.groups.get(member.waypoint)
        cgroup.mkdir(parents=True, exist_ok=True)
        spec = Spec(
            node_id=member.name,
            waypoint=member.waypoint,
            state_dir=state_dir,
            ads_socket=settings.ads_socket,
            cgroup=cgroup,
            netns=settings.netns,
            memory_mib=(group.policy if group else Policy()).memory_mib,
        )
        found = adopt(state_dir, cgroup)
        member.is_adopted = found is not None
        if found is not None:
            log.info("instance_adopted", instance=member.name, pid=found.pid)
            return found
        member.is_known = True
        return start(spec)

    def _note(self, member: Member) -> None:
        """Without it nobody would know of the Envoy."""
        kept = _Kept(member.waypoint, member.port, member.front, member.is_leaving)
        path = self._settings.envoys_dir / member.name / _FILE
        write_whole(path, msgspec.json.encode(kept))

    async def _watch(self, member: Member, process: EnvoyProcess) -> None:
        """Until it ends."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._await_ready, member, process)
            tasks.start_soon(self._let_leave, member, process)
            await process.ended()
            tasks.cancel_scope.cancel()
        member.is_ready, member.is_steered, member.is_known, member.process = False, False, True, None
        member.connections = 0
        process.close()
        self._changed()

    async def _await_ready(self, member: Member, process: EnvoyProcess) -> None:
        end = time.monotonic() + WAIT_S
        while not (await process.is_ready() and (member.is_adopted or self._is_configured(member.name))):
            await anyio.sleep(READY_POLL_S)
            if not member.is_known and time.monotonic() > end:
                member.is_known = True  # that it does not answer
                self._changed()
        member.is_ready = member.is_known = True
        member.heard, member.is_silent = time.monotonic(), False
        log.info("instance_ready", instance=member.name)
        self._changed()

    async def _let_leave(self, member: Member, process: EnvoyProcess) -> None:
        """It gets no new connections before those that it has are asked to end."""
        await member.leaving.wait()
        took_connections = member.is_steered
        with anyio.move_on_after(UNSTEER_S):
            while member.is_steered:  # noqa: ASYNC110
                await anyio.sleep(READY_POLL_S)
        if took_connections:
            await anyio.sleep(HANDSHAKE_S)
        await process.drain(DRAIN_DEADLINE_S)
        await self._last_words(Served(member.name, process))
        await process.stop()

    # -- who gets connections

    async def _keep_steered(self) -> None:
        """On every change, and now and then: what the kernel holds may have been taken away."""
        while True:
            is_told = [await self._steer(group) for group in list(self.groups.values())]
            if self._is_wanted and all(is_told):
                is_told.append(await self._leave_no_others())
            with anyio.move_on_after(STEER_AGAIN_S if all(is_told) else RETRY_S):
                await self._steering_due.wait()
            self._steering_due = anyio.Event()

    async def _leave_no_others(self) -> bool:
        """Fronts of waypoints that went while nobody was here to see it, and ports that were changed."""
        fronts = [(group.front.address, group.front.port) for group in self.groups.values() if group.front]
        try:
            await anyio.to_thread.run_sync(ask_for_fronts_alone, self._settings.enroll_socket, fronts)
        except EnrollmentError as error:
            log.info("fronts_not_checked", error=str(error))
            return False
        return True

    async def _steer(self, group: Group) -> bool:
        """False when it is to be tried again."""
        if group.front is None and not group.is_wanted:
            del self.groups[group.waypoint]
            return True
        try:
            if group.front is None:
                group.front = await anyio.to_thread.run_sync(self._hold_port, group)
            ready = [m for m in self._standing(group.waypoint) if m.is_ready] if group.is_wanted else []
            members = [member for member in ready if not member.is_silent] or ready
            missing = await anyio.to_thread.run_sync(self._put_front, group.front, members)
        except (FrontError, EnrollmentError) as error:
            # bpf_loader may be on its way: until it has answered once, what was said before counts.
            group.is_known |= isinstance(error, FrontError)
            if group.error != str(error):
                group.error = str(error)
                log.warning("front_not_served", waypoint=group.waypoint, error=group.error)
            return False
        group.error = ""
        group.is_known |= not missing
        if not group.is_wanted:
            group.front.close()
            del self.groups[group.waypoint]
        self._note_steered(group, {member.port for member in members} - set(missing))
        return not missing

    def _note_steered(self, group: Group, ports: set[int]) -> None:
        is_other = False
        for member in self.members.values():
            if member.waypoint == group.waypoint and member.is_steered != (member.port in ports):
                member.is_steered = not member.is_steered
                is_other = True
        if ports:
            group.waits_since = time.monotonic()
        if is_other:
            self._tell()

    def _hold_port(self, group: Group) -> Front:
        """The port that it had before this process, else the next that is free. Raises FrontError."""
        if not self.address:
            raise FrontError("no default route: say where waypoints listen (--waypoint-address)")
        members = [member for member in self.members.values() if member.waypoint == group.waypoint]
        taken = {member.port for member in self.members.values()} | {
            other.front.port for other in self.groups.values() if other.front
        }
        first = self._settings.first_port
        free = (port for port in range(first, first + PORTS_TRIED + len(taken)) if port not in taken)
        front: Front | None = None
        for port in [*{member.front for member in members if member.front}, *free]:
            try:
                front = Front(self.address, port, self._settings.netns)
                break
            except FrontError as error:
                last = error
        if front is None:
            raise last
        for member in members:
            member.front = front.port
            with contextlib.suppress(OSError):
                self._note(member)
        return front

    def _put_front(self, front: Front, members: list[Member]) -> list[int]:
        """The ports that get no connections yet. Blocks; raises EnrollmentError."""
        said = enrollment.Front(front.address, front.port, sorted(member.port for member in members))
        missing = ask_for_front(self._settings.enroll_socket, said, [])
        if not missing:
            return []
        with contextlib.ExitStack() as opened:
            found: dict[int, int] = {}
            for member in members:
                process = member.process
                if member.port in missing and process is not None:
                    try:
                        found[member.port] = opened.enter_context(
                            listening_socket(process.pid, process.pidfd, member.port)
                        )
                    except OSError as error:
                        log.info("instance_not_listening", instance=member.name, error=str(error))
            listening = msgspec.structs.replace(said, listening=[*found])
            return ask_for_front(self._settings.enroll_socket, listening, [*found.values()])

    # -- how many there are

    async def _keep_scaled(self) -> None:
        while True:
            await anyio.sleep(SCALE_S)
            await self._follow_loads()

    async def _keep_awake(self) -> None:
        """Whoever is asked for and has no instance gets one; no instance that hangs keeps this back."""
        while True:
            asleep = [group for group in self.groups.values() if group.size == 0]
            await anyio.sleep(DEMAND_S if asleep else SCALE_S)
            for group in asleep:
                if group.is_asked_for():
                    group.begin()
                    self._tell()

    async def _follow_loads(self) -> None:
        async with anyio.create_task_group() as tasks:
            for member in self.members.values():
                if member.is_ready and member.process is not None:
                    tasks.start_soon(self._sample, member, member.process)
        for group in self.groups.values():
            serving = [member for member in self._standing(group.waypoint) if member.is_steered]
            if serving:
                group.waits_since = time.monotonic()
            if (not serving and group.size) or not all(member.is_measured for member in serving):
                continue
            before = group.size
            processors = sum(member.processors for member in serving)
            group.follow(Load(len(serving), processors, sum(member.connections for member in serving)))
            if group.size != before:
                self._tell()

    async def _sample(self, member: Member, process: EnvoyProcess) -> None:
        """What cannot be read stays as it was known."""
        try:
            member.connections = await process.connections()
            member.heard = time.monotonic()
        except UNHEARD as error:
            if time.monotonic() - member.heard > SILENCE_S:
                log.warning("instance_killed", instance=member.name, silent_s=SILENCE_S, error=str(error))
                process.kill()
        if member.is_silent != (time.monotonic() - member.heard > AWAY_S):
            member.is_silent = not member.is_silent
            log.info("instance_silent" if member.is_silent else "instance_heard_again", instance=member.name)
            self._steering_due.set()
        await anyio.to_thread.run_sync(process.cut_log)
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = (self._settings.cgroup / member.name / "cpu.stat").read_text()
            used = int(text.partition("usage_usec ")[2].split()[0])
            member.note_used(time.monotonic(), used / 1e6)

    def _free_name(self, waypoint: str) -> str:
        number = 0
        while (name := f"{_short_name(waypoint)}-{number}") in self.members:
            number += 1
        return name

    def _free_port(self) -> int:
        taken = {port for member in self.members.values() for port in (member.port, member.front)}
        taken |= {group.front.port for group in self.groups.values() if group.front}
        port = self._settings.first_port + 1  # the first is a front's
        while port in taken:
            port += 1
        return port


def _short_name(waypoint: str) -> str:
    """It is part of a unix socket's path."""
    short = waypoint.partition("/")[2].partition(".")[0][:20]
    return f"{short}-{hashlib.blake2b(waypoint.encode(), digest_size=3).hexdigest()}"


def _default_address() -> str:
    """The address that this host has towards its default route; empty where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of a range for documentation; nothing is sent
        except OSError:
            return ""
        return str(probe.getsockname()[0])
