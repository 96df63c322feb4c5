"""What a scenario is played on: an instance by the command line, pods, and traffic that counts."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, Final, Literal

import click
import msgspec

from pykmesh.cli.diff import EQUAL, Difference, compare_all
from pykmesh.demo.pods import Pod
from pykmesh.kernel import pins
from pykmesh.kernel.hooks import FRONT_HOOK, WAYPOINT_HOOKS
from pykmesh.kernel.maps import PinnedMap
from pykmesh.node.instance import running
from tests.chaos import traffic
from tests.chaos.traffic import Client, Counts
from tests.chaos.wire import ControlPlane, Wire
from tests.mesh.attached import ONE_OF_EACH, hooks_of
from tests.mesh.manifests import Object, host, pod, service, text
from tests.mesh.node import Node
from tests.mesh.waypoints import SHOP4, SHOP6, gateway, shop

WEB4, WEB6 = "10.96.0.10", "fd96::10"
EMPTY4, EMPTY6 = "10.96.0.30", "fd96::30"
ADDRESSES: Final = {
    "web": (WEB4, WEB6),
    "empty": (EMPTY4, EMPTY6),
    "shop": (SHOP4, SHOP6),
}
SETTLE_DEADLINE_S: Final = float(os.environ.get("CHAOS_SETTLE_S", "60"))
UNDER_WAY_S: Final = 0.1
"""What was begun before a change was in the kernel has its answer by then."""
OF_WAYPOINT: Final = sorted(hook.program for hook in (*WAYPOINT_HOOKS, FRONT_HOOK))
SUBNET: Final = 40
MARKED_PORT: Final = 81
FIRST_MARK: Final = 20_000
MARKS: Final = 500
"""What processes remember of them is then as much as it will be."""


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client of a service: new connections (`connect`), ones that stay (`keep`), datagrams, refusals."""

    kind: Literal["connect", "keep", "datagrams", "refused"]
    to: Literal["web", "empty", "shop"] = "web"
    family: Literal[4, 6] = 4
    port: int = 80
    rate: float = 50.0
    """Connections or datagrams a second."""
    scales: bool = False
    """`rate` is that at the rate 1 of the whole run."""
    count: int = 20
    """Connections that stay."""
    every_ms: int = 100
    """A request on each, so often."""


class Mesh(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What runs besides the usual."""

    pods: int = 4
    """Endpoints of `web`."""
    deaf: int = 0
    """Endpoints of `empty`, at which nobody listens."""
    waypoint: bool = False
    """`shop` is there: by way of a waypoint of two Envoys to the endpoints of `web`."""
    apart: bool = False
    """The control plane is a process of its own, at the end of a wire that can be tampered with."""
    disk_kib: int = 0
    """The run-time directory has a disk of its own, of this size."""
    options: list[str] = []
    """Further words of `pykmesh up`."""
    settings: dict[str, str] = {}


class HoldsNotError(Exception):
    """Something that has to hold does not; the text says what."""


class Stage:
    """A mesh with traffic to `web` (endpoints `web-1` and so on) and to `empty`, which has none.

    Wrong is an answer of an endpoint that was not one by then; while changes are under way, of one that was
    none by any of those since the last that has arrived.
    """

    def __init__(self, directory: Path, mesh: Mesh, chance: random.Random, rate: float) -> None:
        self.mesh = mesh
        self._chance, self._chances = chance, threading.local()
        self.rate = rate
        self.directory = directory
        self.wrong = 0
        self.may_fail = Counter[str]()
        """By service, connections that a step has cost, as it must."""
        self.program = traffic.build(directory)
        self.node = Node(directory, subnet=SUBNET)
        self.client: Pod
        self.web: list[Pod] = []
        self.wanted: list[str] = []
        self.notes: list[str] = []
        self.killed_upgrades = 0
        self.cleanups = contextlib.ExitStack()
        self.wire: Wire | None = None
        self.control_plane: ControlPlane | None = None
        self._clients: dict[Traffic, Client] = {}
        self._ended: list[tuple[Traffic, Counts]] = []
        self._answers: Counter[str] = Counter()
        self._allowed: set[str] | None = None
        self._changing = threading.RLock()
        self._mark = FIRST_MARK

    @property
    def chance(self) -> random.Random:
        """Of this thread: what is drawn does not depend on which of several comes first."""
        found: random.Random = getattr(self._chances, "own", self._chance)
        return found

    def draw_by(self, seed: float) -> None:
        """From now on, in this thread."""
        self._chances.own = random.Random(seed)

    # -- the mesh

    def prepare(self) -> None:
        network = self.cleanups.enter_context(self.node.network)
        self.client = network.add("client", 10)
        self.web = [network.add(f"web-{n}", 20 + n) for n in range(1, self.mesh.pods + 1)]
        for each in self.web:
            traffic.serve(self.program, each)
        self.node.write(
            "client", text(pod("client", str(self.client.address4), str(self.client.address6), app="client"))
        )
        deaf = [network.add(f"deaf-{n}", 80 + n) for n in range(1, self.mesh.deaf + 1)]
        self.node.write("deaf", text(*(_pod(each, "nobody") for each in deaf)))
        self.wanted = [each.name for each in self.web]
        self.write_web()
        if self.mesh.waypoint:
            waypoint = network.add("waypoint", 11)
            self.node.options += ["--waypoint-address", str(waypoint.address4)]
            self.node.options += ["--waypoint-netns", str(waypoint.netns)]
            self.write_waypoint(2)
        if self.mesh.apart:
            self._stand_apart()
        if self.mesh.disk_kib:
            self._own_disk()
        for words in (["--set", f"{name}={value}"] for name, value in self.mesh.settings.items()):
            self.node.options += words
        self.node.options += self.mesh.options

    def _stand_apart(self) -> None:
        self.control_plane = ControlPlane(self.node.config, self.directory / "control_plane.log")
        self.cleanups.callback(self.control_plane.end)
        self.control_plane.start("1.31")
        self.wire = self.cleanups.enter_context(
            Wire(self.control_plane.port, random.Random(self.chance.random()))
        )
        self.node.options = ["--xds-address", f"127.0.0.1:{self.wire.port}"]

    def _own_disk(self) -> None:
        where = str(self.node.run_dir)
        self.node.run_dir.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={self.mesh.disk_kib}k", "none", where], check=True
        )
        self.cleanups.callback(subprocess.run, ["umount", "-l", where], check=False)
        self.cleanups.callback(self.node.cli, "down", check=False)  # who runs there is not found afterwards

    def start(self) -> None:
        self.node.start()
        self.node.enroll(self.client)
        self.settled()
        if self.mesh.waypoint:
            front = f"{self.node.network.pods['waypoint'].address4}:"
            wait_until(
                lambda: any(each.startswith(front) for each in self.node.endpoints(host("shop"))),
                "the waypoint to be ready",
            )

    def write_web(self) -> None:
        """With a target port that has not been before: no earlier state is taken for this one."""
        objects = [_pod(each, "web") for each in self.web if each.name in self.wanted]
        self._mark = FIRST_MARK + (self._mark + 1 - FIRST_MARK) % MARKS
        ports = {80: traffic.PORT, 9090: traffic.UDP_PORT, MARKED_PORT: self._mark}
        services = [
            service("web", WEB4, WEB6, app="web", ports=ports),
            service("empty", EMPTY4, EMPTY6, app="nobody", ports={80: traffic.PORT}),
        ]
        self.node.write("web", text(*services, *objects))

    def write_waypoint(self, instances: int) -> None:
        number = str(instances)
        annotations = {"min_instances": number, "max_instances": number, "scale_in_after": "1s"}
        self.node.write("waypoint", text(gateway("wp", **annotations), shop()))

    def instances(self) -> list[dict[str, Any]]:
        """Of the waypoint, as `status` has them."""
        found = self.node.status()["processes"]["waypoint_mgr"]["waypoints"]
        return [instance for waypoint in found for instance in waypoint["instances"]]

    def scale(self, names: list[str]) -> None:
        """Says who is to serve; that it is so is known by `settled`."""
        with self._changing:
            self._period(None if self._allowed is None else self._allowed | set(names))
            self.wanted = names
            self.write_web()

    def as_wanted(self) -> bool:
        pods = [each for each in self.web if each.name in self.wanted]
        marked = {f"{a}:{self._mark}" for each in pods for a in (each.address4, each.address6)}
        return self.node.endpoints(host("web"), MARKED_PORT) == marked

    def in_kernel(self) -> None:
        """Waits until the maps say what is wanted. Raises HoldsNotError at the deadline."""
        with self._changing:
            wait_until(self.as_wanted, f"the maps to say that {self.wanted} serve")
            time.sleep(UNDER_WAY_S)
            self._period(set(self.wanted))

    def settled(self) -> None:
        """Waits until everything is ready and what the control plane says is what the kernel holds."""
        wait_until(
            lambda: self.node.status()["ready"], lambda: f"everything to be ready: {self._waits_for()}"
        )
        self.in_kernel()
        wait_until(
            lambda: compare_all(self.node.instance).status == EQUAL,
            lambda: f"nothing to differ: {self.differences()}",
        )

    def differences(self) -> list[Difference]:
        """Entries that are wrong. Raises HoldsNotError where they cannot be known."""
        try:
            found = compare_all(self.node.instance)
        except (click.ClickException, AssertionError) as error:
            raise HoldsNotError(f"what the kernel holds cannot be compared: {error}") from error
        if found.left_out:
            raise HoldsNotError(f"not compared: {found.left_out}")
        return found.differences

    def nothing_left(self) -> None:
        """Waits until what stands in the kernel is for the pods that are there."""
        wait_until(lambda: not self._left(), lambda: f"enrolled to be what is there: {self._left()}")

    def _left(self) -> str:
        """How links and `pods` differ from the client alone, and the links of waypoints from whole ones."""
        cgroup = self.client.cgroup.stat().st_ino
        links = sorted(path.name for path in pins.links_dir(self.node.pin_dir).iterdir())
        with PinnedMap(pins.maps_dir(self.node.pin_dir), "pods") as pods:
            count = len(list(pods.items()))
        said = self.node.status()["processes"]["bpf_loader"]["enrolled"]
        hooks = hooks_of(self.client.cgroup, self.node.pin_dir)
        found = pins.waypoints_dir(self.node.pin_dir).iterdir()
        waypoints = [sorted(pin.name for pin in each.iterdir()) for each in found]
        right = (len(links), count, [each["cgroup_id"] for each in said], hooks, waypoints) == (
            1, 1, [cgroup], ONE_OF_EACH, [OF_WAYPOINT] if self.mesh.waypoint else [],
        )  # fmt: skip
        return "" if right else f"links {links}, {count} pods, {said}, programs {hooks}, {waypoints}"

    def _waits_for(self) -> dict[str, Any]:
        processes = self.node.status()["processes"]
        known = {name: each or {"waits_for": ["no answer"]} for name, each in processes.items()}
        return {name: each.get("waits_for", each) for name, each in known.items() if not each.get("ready")}

    # -- traffic

    def begin(self, found: Traffic) -> None:
        """Starts a client."""
        address = ADDRESSES[found.to][found.family == 6]
        words = [found.kind, address, str(found.port)]
        if found.kind == "keep":
            words += [str(found.count), str(found.every_ms)]
        else:
            words.append(f"{found.rate * (self.rate if found.scales else 1):g}")
        self._clients[found] = Client(self.program, self.client, *words)

    def end(self, found: Traffic) -> Counts:
        """Ends one client; what it saw counts on."""
        with self._changing:
            counts = self._clients.pop(found).end()
            self._ended.append((found, counts))
        return counts

    def under_way(self, to: str) -> int:
        """How many connections to a service clients have open."""
        return sum(client.counts().open for each, client in self._clients.items() if each.to == to)

    def finish(self) -> Counts:
        """Ends all clients; what they saw together."""
        self._period(None)
        for each in list(self._clients):
            self.end(each)
        return reduce(Counts.__and__, (counts for _, counts in self._ended))

    def failures(self) -> list[str]:
        """Of clients that have ended, by service: more than a step has cost."""
        failed, errors = Counter[str](), Counter[str]()
        for each, counts in self._ended:
            failed[each.to] += counts.failed
            errors += counts.errors
        return [
            f"{count} to {name} failed: {dict(errors)}"
            for name, count in failed.items()
            if count > self.may_fail[name]
        ]

    def _period(self, allowed: set[str] | None) -> None:
        """Judges the answers since the last call; from now on those of `allowed` are right.

        A connection that stays is its endpoint's for good, and an Envoy's news are later than the kernel's.
        """
        counted = [*self._ended, *((each, client.counts()) for each, client in self._clients.items())]
        judged = [counts.answers for each, counts in counted if each.kind != "keep" and each.to != "shop"]
        answers = sum(judged, Counter[str]())
        if self._allowed is not None:
            since = answers - self._answers
            bad = {name: n for name, n in since.items() if name not in self._allowed | {"refused"}}
            if bad:
                self.wrong += sum(bad.values())
                self.notes.append(f"answers of {bad} while {sorted(self._allowed)} serve")
        self._allowed, self._answers = allowed, answers


@contextlib.contextmanager
def stage(mesh: Mesh, chance: random.Random, rate: float) -> Iterator[Stage]:
    """Nothing of it is left, whatever happened."""
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    found = Stage(directory, mesh, chance, rate)
    try:
        with found.cleanups:
            found.prepare()
            found.start()
            yield found
    finally:
        if running(found.node.run_dir) is None:
            found.node.config.mkdir(exist_ok=True)
        found.node.end()
        shutil.rmtree(directory, ignore_errors=True)


def wait_until(
    what: Callable[[], Any], because: str | Callable[[], str], deadline_s: float = SETTLE_DEADLINE_S
) -> Any:
    """The first true value; who cannot be asked just now is asked again. HoldsNotError at the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        with contextlib.suppress(AssertionError, OSError, KeyError, click.ClickException):
            if found := what():
                return found
        if time.monotonic() > end:
            said = because if isinstance(because, str) else because()
            raise HoldsNotError(f"waited {deadline_s:g} s for {said}")
        time.sleep(0.02)


def _pod(each: Pod, app: str) -> Object:
    return pod(each.name, str(each.address4), str(each.address6), app=app)
