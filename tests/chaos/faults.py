"""What a scenario does: faults, changes, and looks at what has to be seen. One class each, read from YAML."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import msgspec
import nats
from pyroute2 import netns

from pykmesh.demo.pods import Pod
from pykmesh.kernel import cgroups, libbpf, pins
from pykmesh.kernel.maps import PinnedMap
from pykmesh.node.ask import supervised
from pykmesh.node.instance import running
from tests.chaos.stage import HoldsNotError, Stage, wait_until
from tests.mesh.attached import ONE_OF_EACH, hooks_of
from tests.mesh.manifests import Object, pod, service, text
from tests.mesh.node import look_up_on, looked_up, with_resolv_conf
from tests.mesh.releases import HERE, make_other

Number = float | tuple[float, float]
"""Two: a draw between them."""

IN_A_MOMENT = 10
KILLED = 128 + signal.SIGKILL
FEW_NEVER_COME = 0.9
"""Of the calls that a take-over makes in the one direction, so many are made in the other one too."""


def drawn(number: Number, chance: random.Random) -> float:
    return chance.uniform(*number) if isinstance(number, tuple) else number


class _Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag=str.lower):
    def act(self, stage: Stage) -> None:
        """Raises HoldsNotError for what has to hold and does not."""
        raise NotImplementedError


# -- time


class Wait(_Step):
    seconds: Number

    def act(self, stage: Stage) -> None:
        time.sleep(drawn(self.seconds, stage.chance))


class Settled(_Step):
    """Until everything is ready, and the kernel holds what the control plane says."""

    def act(self, stage: Stage) -> None:
        stage.settled()


class Repeat(_Step):
    """`of`, again and again, so many times or for so long."""

    of: list[Step]
    times: int = 0
    seconds: float = 0.0

    def act(self, stage: Stage) -> None:
        end, done = time.monotonic() + self.seconds, 0
        while done < self.times or (not self.times and time.monotonic() < end):
            for step in self.of:
                step.act(stage)
            done += 1


class Together(_Step):
    """Several rows of steps beside each other."""

    rows: list[list[Step]]

    def act(self, stage: Stage) -> None:
        failed: list[Exception] = []

        def play(row: list[Step], seed: float) -> None:
            stage.draw_by(seed)
            try:
                for step in row:
                    step.act(stage)
            except Exception as error:  # noqa: BLE001  (told below, by the scenario's own thread)
                failed.append(error)

        threads = [threading.Thread(target=play, args=(row, stage.chance.random())) for row in self.rows]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]


# -- processes


def _pid(stage: Stage, process: str) -> int:
    """Of one that runs, waited for. HoldsNotError for one that there is not."""
    found = running(stage.node.run_dir)
    if found is None:
        raise HoldsNotError(f"{process} cannot be found: no supervisor runs")
    if process == "supervisor":
        return found.pid

    def pid() -> int | None:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            if process == "fork_server":
                return stage.node.fork_server()
            known = supervised(found)
            if known and process not in known:
                raise HoldsNotError(f"no process is called {process}; there are {', '.join(known)}")
            return known.get(process, {}).get("pid")
        return None

    return int(wait_until(pid, f"{process} to run"))


def _signal(stage: Stage, process: str, number: int) -> None:
    """To the process that is there at this moment."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(_pid(stage, process), number)
            return


class Kill(_Step):
    """With SIGKILL: one of `status`, `supervisor`, `fork_server`, or one drawn of several."""

    process: str | list[str]

    def act(self, stage: Stage) -> None:
        name = self.process if isinstance(self.process, str) else stage.chance.choice(self.process)
        _signal(stage, name, signal.SIGKILL)
        if name == "supervisor":
            wait_until(lambda: running(stage.node.run_dir) is None, "the supervisor to end")


class KillAll(_Step, tag="kill all"):
    """All in the same moment."""

    def act(self, stage: Stage) -> None:
        pids = [each["pid"] for each in supervised(stage.node.instance).values() if each["pid"]]
        if not pids:
            raise HoldsNotError("nothing runs that could be killed")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Stop(_Step):
    """Stopped for so long (SIGSTOP), then it goes on."""

    process: str
    seconds: Number

    def act(self, stage: Stage) -> None:
        pid = _pid(stage, self.process)
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(drawn(self.seconds, stage.chance))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class Down(_Step):
    def act(self, stage: Stage) -> None:
        stage.node.cli("down")


class Up(_Step):
    """Also where it cannot become ready: `ready` false returns when it runs."""

    ready: bool = True

    def act(self, stage: Stage) -> None:
        if self.ready:
            stage.node.start()
            return
        up = subprocess.Popen(
            [
                sys.executable, "-m", "pykmesh", *stage.node.place,
                "up", "--free-ports", *stage.node.options,
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        stage.cleanups.callback(_end, up)
        wait_until(lambda: running(stage.node.run_dir) is not None, "the supervisor to run")


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# -- limits


class Limit(_Step):
    """Of the kernel's, for one process: bytes of its memory or address space, or its descriptors."""

    process: str
    what: Literal["memory", "addresses", "descriptors"]
    more: int
    """Above what it has now."""

    def act(self, stage: Stage) -> None:
        pid = _pid(stage, self.process)
        if self.what == "memory":
            _limit_memory(stage, pid, self.more)
            return
        if self.what == "addresses":
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            which, limit = resource.RLIMIT_AS, pages * resource.getpagesize() + self.more
        else:
            which, limit = resource.RLIMIT_NOFILE, len(list(Path(f"/proc/{pid}/fd").iterdir())) + self.more
        resource.prlimit(pid, which, (limit, limit))


def _limit_memory(stage: Stage, pid: int, limit: int) -> None:
    """By a cgroup, as a container's is. What the process has already is charged elsewhere."""
    v1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    root = v1.parent if v1.exists() else cgroups.find_root()
    if not v1.exists():
        (root / "cgroup.subtree_control").write_text("+memory")
    name = root / f"chaos-{stage.node.name}-{pid}"
    name.mkdir()
    stage.cleanups.callback(_remove_cgroup, name)
    (name / ("memory.limit_in_bytes" if v1.exists() else "memory.max")).write_text(str(limit))
    (name / "cgroup.procs").write_text(str(pid))


def _remove_cgroup(path: Path) -> None:
    """Whoever it was for is gone, or goes."""
    for pid in (path / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    with contextlib.suppress(HoldsNotError):
        wait_until(lambda: not (path / "cgroup.procs").read_text(), "the process to end")
        path.rmdir()


class Hog(_Step):
    """Processes that compute, beside everything else."""

    count: int
    seconds: Number

    def act(self, stage: Stage) -> None:
        hogs = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(self.count)]
        try:
            time.sleep(drawn(self.seconds, stage.chance))
        finally:
            for hog in hogs:
                hog.kill()
                hog.wait()


class Disk(_Step):
    """The run-time directory's disk (`Mesh.disk_kib`): full, or with room again."""

    full: bool

    def act(self, stage: Stage) -> None:
        filler = stage.node.run_dir / "filler"
        if not self.full:
            filler.unlink()
            return
        with filler.open("wb", 0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


# -- the control plane


class Scale(_Step):
    """How many endpoints of `web` are to serve, drawn from all; `now`: until the kernel says so."""

    to: int | tuple[int, int]
    now: bool = True

    def act(self, stage: Stage) -> None:
        count = self.to if isinstance(self.to, int) else stage.chance.randint(*self.to)
        names = [each.name for each in stage.web]
        stage.scale(sorted(stage.chance.sample(names, count)))
        if self.now:
            stage.in_kernel()


class Services(_Step):
    """So many further services, of a pod each that is nowhere, in a file; 0: the file goes.

    `ranges`: each is a ServiceEntry of a range of addresses.
    """

    count: int
    pods: int = 1
    ranges: bool = False

    def act(self, stage: Stage) -> None:
        if not self.count:
            (stage.node.config / "further.yaml").unlink()
            return
        objects = []
        for n in range(self.count):
            app = f"further-{n}"
            if self.ranges:
                objects.append(_range(app, f"10.112.{n}.0/24"))
                continue
            objects.append(service(app, f"10.96.{1 + n // 250}.{n % 250}", app=app, ports={80: 8080}))
            objects += [
                pod(f"{app}-{k}", f"10.{200 + k}.{n // 250}.{n % 250 + 1}", app=app) for k in range(self.pods)
            ]
        stage.node.write("further", text(*objects))


def _range(name: str, addresses: str) -> Object:
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "hosts": [f"{name}.example"],
            "addresses": [addresses],
            "ports": [{"number": 80, "name": "tcp", "protocol": "TCP"}],
            "resolution": "STATIC",
            "endpoints": [{"address": "10.200.0.1"}],
        },
    }


class Folder(_Step):
    """The configuration folder: `broken` (a file cannot be read), `gone`, `empty`, and `back`."""

    state: Literal["broken", "gone", "empty", "back"]

    def act(self, stage: Stage) -> None:
        kept, broken = stage.directory / "kept", stage.node.config / "broken.yaml"
        if self.state == "broken":
            broken.write_text("kind: Service\nmetadata: [not closed\n")
        elif self.state == "back":
            broken.unlink(missing_ok=True)
            if kept.exists():
                shutil.rmtree(stage.node.config, ignore_errors=True)
                kept.rename(stage.node.config)
        else:
            stage.node.config.rename(kept)
            if self.state == "empty":
                stage.node.config.mkdir()


class Wire(_Step):
    """The way to the control plane; `held`: nothing passes, `garbled`: noise does."""

    state: Literal["through", "cut", "held", "garbled"]

    def act(self, stage: Stage) -> None:
        if stage.wire is None:
            raise HoldsNotError("the mesh has no wire")
        stage.wire.state(self.state)


class ControlPlane(_Step, tag="control plane"):
    """The one that stands apart: away, or there, as one of an istiod's releases."""

    runs: bool
    dialect: Literal["1.25", "1.31"] = "1.31"

    def act(self, stage: Stage) -> None:
        if stage.control_plane is None:
            raise HoldsNotError("the control plane does not stand apart")
        stage.control_plane.end()
        if self.runs:
            stage.control_plane.start(self.dialect)


# -- the bus


class Flood(_Step):
    """Garbage on the bus, by who may speak there: bytes that are no message."""

    user: str
    subject: str
    seconds: Number
    bytes: int = 2000

    def act(self, stage: Stage) -> None:
        instance = stage.node.instance
        password = instance.secret(self.user).read_text().strip()
        until = time.monotonic() + drawn(self.seconds, stage.chance)

        async def flood() -> None:
            client = await nats.connect(
                f"nats://127.0.0.1:{instance.ports.nats}", user=self.user, password=password
            )
            while time.monotonic() < until:
                for _ in range(100):
                    await client.publish(self.subject, stage.chance.randbytes(self.bytes))
                await client.flush()
            await client.close()

        anyio.run(flood)


class Password(_Step):
    """Of a process for the bus: another one, or the right one again. It is killed, to read it."""

    process: str
    right: bool

    def act(self, stage: Stage) -> None:
        path = stage.node.instance.secret(self.process)
        kept = stage.directory / f"password-{self.process}"
        if self.right:
            shutil.copy(kept, path)
        else:
            shutil.copy(path, kept)
            path.write_text("wrong")
        _signal(stage, self.process, signal.SIGKILL)


class Stranger(_Step):
    """Takes the broker's port in its absence, takes connections and says nothing that it should."""

    seconds: Number

    def act(self, stage: Stage) -> None:
        with socket.socket() as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end = time.monotonic() + 20
            while True:
                _signal(stage, "nats", signal.SIGKILL)
                with contextlib.suppress(OSError):
                    door.bind(("127.0.0.1", stage.node.instance.ports.nats))
                    break
                if time.monotonic() > end:
                    raise HoldsNotError("the broker's port was never free")
            door.listen()
            door.settimeout(0.1)
            until = time.monotonic() + drawn(self.seconds, stage.chance)
            while time.monotonic() < until:
                with contextlib.suppress(OSError):
                    peer, _ = door.accept()
                    with peer:
                        peer.sendall(b"220 mail.example.org ESMTP\r\n")


# -- the kernel's side


class Unpin(_Step):
    """Pins removed by hand: of all maps, of one that is drawn, or all links of pods or of waypoints.

    Or the directories of all of them; or the file system that they are on is unmounted.
    """

    what: Literal["maps", "a map", "pods", "waypoints", "directories", "bpffs"]

    def act(self, stage: Stage) -> None:
        if self.what == "bpffs":
            subprocess.run(["umount", "--lazy", str(stage.node.pin_dir)], check=True)
            return
        if self.what == "directories":
            for find in (pins.links_dir, pins.waypoints_dir, pins.maps_dir):
                shutil.rmtree(find(stage.node.pin_dir))
            return
        if self.what in ("pods", "waypoints"):
            find = pins.links_dir if self.what == "pods" else pins.waypoints_dir
            for directory in find(stage.node.pin_dir).iterdir():
                shutil.rmtree(directory)
            return
        found = sorted(pins.maps_dir(stage.node.pin_dir).iterdir())
        for path in found if self.what == "maps" else [stage.chance.choice(found)]:
            path.unlink()


_LRU_HASH: Final = 9


class Fill(_Step):
    """Entries that mean nothing to anybody go into a map of the kernel's, until it takes no more.

    One that evicts takes them all: twice what it has room for, one after another, as what is of use is newer.
    """

    map: str

    def act(self, stage: Stage) -> None:
        with PinnedMap(pins.maps_dir(stage.node.pin_dir), self.map) as found:
            key, value = found.layout.key_size, found.layout.value_size
            evicts = found.layout.type == _LRU_HASH
            try:
                for _ in range(2 * found.max_entries):
                    found.put(stage.chance.randbytes(key), bytes(value))
                    time.sleep(0.002 * evicts)
                if evicts:
                    return
            except libbpf.KernelError as error:
                if error.errno == errno.E2BIG:
                    return
                raise
        raise HoldsNotError(f"{self.map} takes more than {found.max_entries} entries")


_BYSTANDERS = itertools.cycle(range(100, 250))


class Bystander(_Step):
    """A pod that is enrolled and goes, both at once, or first its cgroup (made anew) or its namespace."""

    goes: Literal["cgroup", "namespace", "unenrolled", "both"]

    def act(self, stage: Stage) -> None:
        network = stage.node.network
        name = f"by-{stage.chance.randrange(1 << 24):x}"
        found = network.add(name, next(_BYSTANDERS))
        stage.node.enroll(found)
        if self.goes == "unenrolled":
            stage.node.cli("unenroll", "--cgroup", str(found.cgroup))
        elif self.goes == "namespace":
            netns.remove(found.netns.name)
            time.sleep(0.1)
        elif self.goes == "cgroup":
            found.cgroup.rmdir()
            found.cgroup.mkdir()
            stage.node.enroll(found)
        _remove(stage, found)


def _remove(stage: Stage, found: Pod) -> None:
    stage.node.network.pods.pop(found.name).end()
    found.cgroup.rmdir()
    if found.netns.exists():
        netns.remove(found.netns.name)


# -- releases


class Upgrade(_Step):
    """To the other release, whose maps differ, or to this; `killed`: after so long, then done again."""

    to: Literal["other", "this"]
    roll_back: bool = False
    killed: Number | None = None

    def act(self, stage: Stage) -> None:
        release = _other_release() if self.to == "other" else HERE
        words = [sys.executable, "-m", "pykmesh", *stage.node.place, "upgrade"]
        words += ["--roll-back"] if self.roll_back else []
        environment = {**os.environ, "PYTHONPATH": str(release), "PYTHONSAFEPATH": "1"}
        if self.killed is not None:
            with subprocess.Popen(
                words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as upgrade:
                time.sleep(drawn(self.killed, stage.chance))
                stage.killed_upgrades += upgrade.poll() is None
                upgrade.kill()
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        if done.returncode:
            raise HoldsNotError(f"upgrade: {done.stderr}")


class KillAtCalls(_Step, tag="kill at calls"):
    """The loader's take-over by one release from the other, killed before a system call, and gone on with.

    Before each of its calls in turn, or so many that are drawn. One of the two releases, drawn, goes on: the
    next kill is of a take-over by the other one. The instance is down.
    """

    draws: int = 0

    def act(self, stage: Stage) -> None:
        holder, other = _other_release(), HERE
        _, counts = _take_over(stage, holder, "to-its-end")
        calls = [f"{name}:{n}" for name, count in sorted(counts.items()) for n in range(1, count + 1)]
        chosen = stage.chance.sample(calls, self.draws) if self.draws else calls
        killed = 0
        for call in chosen:
            status, _ = _take_over(stage, other, call)
            if stage.chance.random() < 0.5:
                holder, other = other, holder
            ended, _ = _take_over(stage, holder, "to-its-end")
            left = _what_is_left(stage)
            if status not in (0, KILLED) or ended or left:
                raise HoldsNotError(f"killed before {call}: status {status}, then {ended}; {left}")
            killed += status == KILLED
        if killed < FEW_NEVER_COME * len(chosen):
            raise HoldsNotError(f"of {len(chosen)} take-overs only {killed} were killed")


def _take_over(stage: Stage, release: Path, call: str) -> tuple[int, dict[str, int]]:
    """Its exit status, and how many system calls of each name it made."""
    words = [sys.executable, str(HERE / "tests" / "mesh" / "killed_upgrade.py")]
    done = subprocess.run(
        [*words, stage.node.name, str(stage.node.pin_dir), call],
        env={**os.environ, "PYTHONPATH": str(release), "PYTHONSAFEPATH": "1"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    try:
        # what it logs comes before, and may have been cut short
        return done.returncode, json.loads(done.stdout[done.stdout.rindex("{") :])
    except ValueError as error:
        raise HoldsNotError(f"a take-over at {call}: {done.stdout}{done.stderr}") from error


def _what_is_left(stage: Stage) -> str:
    """What a take-over should have seen to: one pin of each map, and on the cgroup programs of those."""
    names = Counter(path.name.partition("@")[0] for path in pins.maps_dir(stage.node.pin_dir).iterdir())
    twice = [name for name, count in names.items() if count > 1]
    hooks = hooks_of(stage.client.cgroup, stage.node.pin_dir)
    is_whole = not twice and not pins.staging_dir(stage.node.pin_dir).exists() and hooks == ONE_OF_EACH
    return "" if is_whole else f"pinned twice: {twice}; programs that read what is pinned: {hooks}"


OTHER_RELEASE: Final = "CHAOS_OTHER_RELEASE"


@functools.cache
def _other_release() -> Path:
    """Made once; removed at the end of the process. Or one that was made before (`OTHER_RELEASE`)."""
    if made := os.environ.get(OTHER_RELEASE):
        return Path(made)
    directory = tempfile.TemporaryDirectory(prefix="release-")
    atexit.register(directory.cleanup)
    make_other(Path(directory.name))
    return Path(directory.name)


# -- waypoints


class Instances(_Step):
    """How many Envoys the waypoint is to have."""

    count: int

    def act(self, stage: Stage) -> None:
        stage.write_waypoint(self.count)

        def there() -> bool:
            found = stage.instances()
            return len(found) == self.count and all(each["ready"] and not each["leaving"] for each in found)

        wait_until(there, f"{self.count} instances")


class KillEnvoy(_Step, tag="kill envoy"):
    """One of them, drawn: what it is busy with may fail, and what begins in that moment."""

    def act(self, stage: Stage) -> None:
        stage.may_fail["shop"] += stage.under_way("shop") + IN_A_MOMENT
        os.kill(stage.chance.choice(stage.instances())["pid"], signal.SIGKILL)


class LimitEnvoy(_Step, tag="limit envoy"):
    """One of them, drawn, gets no more memory, and is ended by the kernel for what it asks for."""

    def act(self, stage: Stage) -> None:
        stage.may_fail["shop"] += stage.under_way("shop") + IN_A_MOMENT
        pid = stage.chance.choice(stage.instances())["pid"]
        _limit_memory(stage, pid, 0)
        wait_until(lambda: pid not in [each["pid"] for each in stage.instances()], "the Envoy to be ended")


# -- what has to be seen


class NotEnrolled(_Step, tag="not enrolled"):
    """So many bystanders at once; the last is refused, with a text that says this. They go again."""

    count: int
    text: str

    def act(self, stage: Stage) -> None:
        network, made = stage.node.network, list[Pod]()
        try:
            for _ in range(self.count):
                made.append(network.add(f"by-{stage.chance.randrange(1 << 24):x}", next(_BYSTANDERS)))
                words = ("enroll", "--cgroup", str(made[-1].cgroup), "--netns", str(made[-1].netns))
                said = stage.node.cli(*words, check=len(made) < self.count)
            if not said.returncode or self.text not in said.stderr:
                raise HoldsNotError(f"the last of {self.count} was told {said.stdout}{said.stderr}")
        finally:
            for each in made:
                _remove(stage, each)


class KilledUpgrades(_Step, tag="killed upgrades"):
    """So many at least were under way when they were killed."""

    at_least: int

    def act(self, stage: Stage) -> None:
        if stage.killed_upgrades < self.at_least:
            raise HoldsNotError(f"only {stage.killed_upgrades} upgrades were killed: the rest had ended")


class Says(_Step):
    """`pykmesh status` shows it: a regular expression."""

    text: str
    within: float = 20.0

    def act(self, stage: Stage) -> None:
        said = ""

        def found() -> bool:
            nonlocal said
            said = stage.node.cli("status", check=False).stdout
            return re.search(self.text, said) is not None

        try:
            wait_until(found, f"status to say {self.text!r}", self.within)
        except HoldsNotError as error:
            raise HoldsNotError(f"{error}, which says: {said}") from error


class Entries(_Step):
    """A map of the kernel's comes to hold so many at least."""

    map: str
    at_least: int

    def act(self, stage: Stage) -> None:
        def count() -> int:
            with PinnedMap(pins.maps_dir(stage.node.pin_dir), self.map) as found:
                return len(list(found.items()))

        wait_until(lambda: count() >= self.at_least, f"{self.map} to hold {self.at_least}")


class Restarted(_Step):
    """`pykmesh status` says that it was started again."""

    process: str

    def act(self, stage: Stage) -> None:
        def restarts() -> int:
            with contextlib.suppress(OSError, ValueError):
                return supervised(stage.node.instance)[self.process]["restarts"] or 0
            return 0

        wait_until(restarts, f"{self.process} to be started again")


class Ended(_Step, tag="supervisor ended"):
    """By itself, or by the kernel."""

    def act(self, stage: Stage) -> None:
        wait_until(lambda: running(stage.node.run_dir) is None, "the supervisor to end")


class Resolves(_Step):
    """The client asks for a name by DNS, again and again until it has the address."""

    name: str
    address: str

    def act(self, stage: Stage) -> None:
        conf = stage.directory / "resolv.conf"
        conf.write_text("nameserver 192.0.2.53\noptions timeout:1\n")
        code = f"import socket; print(socket.gethostbyname({self.name!r}))"
        words = with_resolv_conf(conf, sys.executable, "-S", "-c", code)

        def answer() -> str:
            return stage.client.run(*words, timeout_s=20).stdout.strip()

        wait_until(lambda: answer() == self.address, f"{self.name} to be {self.address}")


class LooksUp(_Step, tag="looks up"):
    """The client looks a name up all the while, by a server that knows all of them: no look-up fails."""

    name: str
    meanwhile: list[Step]

    def act(self, stage: Stage) -> None:
        server, conf = stage.web[0], stage.directory / "server.conf"
        conf.write_text(f"nameserver {server.address4}\noptions timeout:1 attempts:4\n")
        words = [sys.executable, "-m", "tests.mesh.dns_server", "1"]
        with server.spawn(*words, stdout=subprocess.PIPE, text=True) as serving:
            try:
                assert serving.stdout is not None
                serving.stdout.readline()
                process = look_up_on(stage.client, conf, self.name)
                for step in self.meanwhile:
                    step.act(stage)
                asked, failed = looked_up(process)
            finally:
                serving.kill()
        if failed != "[]" or not asked:
            raise HoldsNotError(f"of {asked} look-ups failed: {failed}")


class Metric(_Step):
    """A sample of Prometheus's page, summed over its labels, is so much at least."""

    name: str
    at_least: float = 1.0

    def act(self, stage: Stage) -> None:
        def value() -> float:
            at = f"http://127.0.0.1:{stage.node.instance.ports.metrics}/metrics"
            with contextlib.suppress(OSError), urllib.request.urlopen(at, timeout=5) as page:
                return sum(_samples(page.read().decode(), self.name))
            return 0.0

        wait_until(lambda: value() >= self.at_least, f"{self.name} to be {self.at_least:g}")


def _samples(page: str, name: str) -> Iterator[float]:
    for line in page.splitlines():
        if line.partition("{")[0].partition(" ")[0] == name:
            yield float(line.rpartition(" ")[2])


Step = (
    Wait | Settled | Repeat | Together | Kill | KillAll | Stop | Down | Up | Limit | Hog | Disk | Scale
    | Services | Folder | Wire | ControlPlane | Flood | Password | Stranger | Unpin | Bystander | Upgrade
    | KillAtCalls | KilledUpgrades | NotEnrolled | Fill | Entries | Restarted | Resolves | Instances
    | KillEnvoy | LimitEnvoy | Says | LooksUp | Metric | Ended
)  # fmt: skip
