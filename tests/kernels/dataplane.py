"""What the programs do, looked at one by one in one process: quick enough for an emulated machine.

    python -m tests.kernels.dataplane TRAFFIC

`TRAFFIC` is the program of `tests/chaos/traffic.c`. Prints one JSON line for each look: `look`, `found`
("yes", or what else), `holds`. It is the services' own code without the processes around it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import ipaddress
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pykmesh.contracts.bulk import decode_addresses
from pykmesh.contracts.enrollment import EnrollmentError
from pykmesh.demo.counted import Counted
from pykmesh.demo.pods import Pod, PodNetwork
from pykmesh.kernel import cgroups, pins
from pykmesh.kernel.hooks import HOOKS, Programs, ProgramSettings, can_set_retval
from pykmesh.kernel.ring import RingReader
from pykmesh.proto import workload_pb2
from services.bpf_loader.enrollment import Enrollment
from services.map_writer.desired import Rules
from services.map_writer.mesh import Mesh, Touched
from services.map_writer.planner import Planner
from services.map_writer.writer import Maps

NAME = "kernels"
VIP4, VIP6, EMPTY4 = "10.96.0.10", "fd96::10", "10.96.0.30"
PORT, UDP_PORT = 8080, 9090
SIZES = {"services": 1024, "endpoints": 1024, "addresses": 1024, "ranges": 64, "pods": 64, "flows": 1 << 20}
PATIENCE_S = 60.0
HANGS_S = 240.0
"""Then it says where it is: before who booted the kernel ends it."""
END_DEADLINE_S = 90.0
"""Of a client: it waits for what is under way, TRAFFIC_TIMEOUT_S at most."""
STEADY_S = 2.0
PEER = """
import socket
for host in ("{vip4}", "{vip6}", "::ffff:{vip4}"):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    s = socket.socket(family); s.settimeout(20); s.connect((host, 80)); print(*s.getpeername()[:2]); s.close()
"""


class Look(NamedTuple):
    look: str
    found: str
    holds: bool


class Writer:
    """map_writer's own planning and writing, without the bus."""

    def __init__(self, pin_dir: Path) -> None:
        self._maps, self._mesh = Maps(pin_dir), Mesh()
        self._planner = Planner(self._maps.read(), self._maps.limits, Rules())

    def say(self, *messages: workload_pb2.Address) -> None:
        touched = Touched()
        values = [message.SerializeToString() for message in messages]
        for message, address in zip(messages, decode_addresses(values), strict=True):
            found = message.service if message.HasField("service") else message.workload
            name = found.uid if message.HasField("workload") else f"{found.namespace}/{found.hostname}"
            self._mesh.put(name, address, touched)
        for step in self._planner.plan(self._mesh, touched):
            self._maps.apply(step)

    def close(self) -> None:
        self._maps.close()


def service(name: str, *addresses: str) -> workload_pb2.Address:
    message = workload_pb2.Address()
    found = message.service
    found.name, found.namespace, found.hostname = name, "shop", f"{name}.shop"
    for address in addresses:
        found.addresses.add(address=ipaddress.ip_address(address).packed)
    for port, target in ((80, PORT), (90, UDP_PORT)):
        found.ports.add(service_port=port, target_port=target)
    return message


def workload(pod: Pod, *services: str) -> workload_pb2.Address:
    message = workload_pb2.Address()
    found = message.workload
    found.uid, found.name, found.namespace = pod.name, pod.name, "shop"
    found.addresses.extend(ipaddress.ip_address(str(a)).packed for a in (pod.address4, pod.address6))
    for each in services:
        ports = found.services[f"shop/{each}.shop"].ports
        ports.add(service_port=80, target_port=PORT)
        ports.add(service_port=90, target_port=UDP_PORT)
    return message


class Bench:
    """An enrolled client, two endpoints, and the maps that say so."""

    def __init__(self, pin_dir: Path, traffic: str, network: PodNetwork) -> None:
        self.pin_dir, self.traffic = pin_dir, traffic
        self.settings = ProgramSettings(NAME, 0, can_set_retval(), has_telemetry=True)
        self.programs = self.load()
        self.enrollment = self._enrollment()
        self.writer = Writer(pin_dir)
        self.client = network.add("client", 10)
        self.web = [network.add(f"web-{n}", 20 + n) for n in (1, 2)]

    def say_what_serves(self) -> None:
        for each in self.web:
            words = ("serve", each.name, str(PORT), str(UDP_PORT))
            Counted(each, self.traffic, *words, start_deadline_s=PATIENCE_S)
        served = (workload(each, "web") for each in self.web)
        self.writer.say(service("web", VIP4, VIP6), service("empty", EMPTY4), *served)

    def close(self) -> None:
        self.writer.close()
        self.enrollment.close()
        self.programs.close()

    def load(self) -> Programs:
        return Programs(pins.maps_dir(self.pin_dir), SIZES, self.settings)

    def _enrollment(self) -> Enrollment:
        return Enrollment(self.pin_dir, cgroups.find_root(), NAME, "", self.programs)

    def again(self) -> int:
        """As a loader that starts; how many links it gave its programs."""
        before, self.programs = (self.enrollment, self.programs), self.load()
        self.enrollment = self._enrollment()
        updated = self.enrollment.adopt()
        before[0].close()
        before[1].close()
        return updated

    def enroll(self) -> None:
        with contextlib.ExitStack() as opened:
            fds = [os.open(path, os.O_RDONLY) for path in (self.client.cgroup, self.client.netns)]
            for fd in fds:
                opened.callback(os.close, fd)
            self.enrollment.enroll(*fds)

    def client_of(self, *words: str) -> Counted:
        return Counted(self.client, self.traffic, *words, start_deadline_s=PATIENCE_S)

    def tried(self, *words: str) -> dict[str, object]:
        client = self.client_of(*words)
        time.sleep(STEADY_S)
        return client.end(END_DEADLINE_S)


def looks(bench: Bench) -> Iterator[tuple[str, Callable[[], tuple[str, bool]]]]:
    """In this order: each builds on those before."""

    def enrolled() -> tuple[str, bool]:
        bench.enroll()
        return "yes", len(bench.enrollment.shown) == 1

    def connects(address: str) -> Callable[[], tuple[str, bool]]:
        def look() -> tuple[str, bool]:
            found = bench.tried("connect", address, "80", "50")
            return _told(found, answers={"web-1", "web-2"})

        return look

    def datagrams() -> tuple[str, bool]:
        found = [bench.tried("datagrams", address, "90", "20") for address in (VIP4, VIP6)]
        told = [_told(each, answers={"web-1", "web-2"}) for each in found]
        return next((what for what, holds in told if not holds), "yes"), all(holds for _, holds in told)

    def refused() -> tuple[str, bool]:
        found = bench.tried("refused", EMPTY4, "80", "20")
        if found["connections"] == found["failed"] and not can_set_retval():
            return "with EPERM", found["errors"] == {"Operation not permitted": found["failed"]}
        return _told(found, answers={"refused"}, yes="with ECONNREFUSED")

    def peers() -> tuple[str, bool]:
        said = bench.client.run(
            sys.executable, "-S", "-c", PEER.format(vip4=VIP4, vip6=VIP6), timeout_s=PATIENCE_S
        )
        wanted = [f"{VIP4} 80", f"{VIP6} 80", f"::ffff:{VIP4} 80"]
        holds = said.stdout.splitlines() == wanted
        return "yes" if holds else said.stdout + said.stderr, holds

    def moves() -> tuple[str, bool]:
        client = bench.client_of("connect", VIP4, "80", "50")
        bench.writer.say(workload(bench.web[1]))
        time.sleep(0.5)
        before = client.counts()
        time.sleep(STEADY_S)
        after = client.end(END_DEADLINE_S)
        moved = before["answers"].get("web-2", 0) == after["answers"].get("web-2", 0)
        bench.writer.say(workload(bench.web[1], "web"))
        return _told(after, answers=set(after["answers"])) if moved else ("web-2 is still asked", False)

    def exchanged() -> tuple[str, bool]:
        kept = bench.client_of("keep", VIP4, "80", "10", "100")
        client = bench.client_of("connect", VIP6, "80", "50")
        updated = bench.again()
        time.sleep(STEADY_S)
        told = [_told(each.end(END_DEADLINE_S), answers={"web-1", "web-2"}) for each in (kept, client)]
        holds = all(holds for _, holds in told) and updated == len(HOOKS)
        return next((what for what, good in told if not good), "yes" if holds else str(updated)), holds

    def pinned_again() -> tuple[str, bool]:
        directory = pins.maps_dir(bench.pin_dir)
        before = {path.name for path in directory.iterdir()}
        for path in directory.iterdir():
            path.unlink()
        again = bench.programs.pin_again(directory)
        return "yes", {path.name for path in directory.iterdir()} == before and len(again) == len(before)

    def recorded() -> tuple[str, bool]:
        with RingReader(pins.maps_dir(bench.pin_dir)) as ring:
            taken = len(ring.take(1 << 20))
        return ("yes" if taken > 100 else f"{taken} records"), taken > 100

    def left() -> tuple[str, bool]:
        fd = os.open(bench.client.cgroup, os.O_RDONLY)
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, fd)
            bench.enrollment.unenroll(fd)
        return "yes", not list(pins.links_dir(bench.pin_dir).iterdir())

    yield "pods are enrolled", enrolled
    yield "TCP over IPv4 reaches both endpoints", connects(VIP4)
    yield "TCP over IPv6 reaches both endpoints", connects(VIP6)
    yield "getpeername shows the service (IPv4, IPv6, v4-mapped)", peers
    yield "datagrams, and answers from the service's address", datagrams
    yield "a service without endpoints is refused", refused
    yield "an endpoint that goes gets no new connection, none fails", moves
    yield "programs are exchanged under traffic, none fails", exchanged
    yield "maps whose pins were removed are pinned again", pinned_again
    yield "closed connections are recorded", recorded
    yield "a pod that leaves has no program left", left


def _told(found: dict[str, object], answers: set[str], yes: str = "yes") -> tuple[str, bool]:
    holds = not found["failed"] and bool(found["requests"]) and set(found["answers"]) == answers  # type: ignore[call-overload]
    return (yes if holds else json.dumps(found)), holds


def look_at_all(traffic: str, network: PodNetwork, pin_dir: Path) -> Iterator[Look]:
    """What comes after something that does not hold is looked at too, but where no pod can be enrolled."""
    pins.prepare(pin_dir)
    with contextlib.ExitStack() as left:
        left.callback(pins.uninstall, pin_dir)
        left.callback(network.remove)
        bench = Bench(pin_dir, traffic, network)
        left.callback(bench.close)
        yield Look("programs load", bench.programs.object, holds=True)
        bench.say_what_serves()
        for name, look in looks(bench):
            try:
                yield Look(name, *look())
            except EnrollmentError as error:
                yield Look(name, f"no: {error}", holds=False)
                return
            except Exception as error:  # noqa: BLE001  (what it is is what is told)
                yield Look(name, f"{type(error).__name__}: {error}", holds=False)


def main(traffic: str) -> int:
    with contextlib.suppress(ValueError):  # before 5.11 maps count as locked memory
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    held = True
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    with tempfile.TemporaryDirectory() as made:
        network = PodNetwork(f"k-{os.getpid()}", cgroups.find_root(), "10.97.0", "fd97:")
        print(json.dumps({"kernel": platform.release()}), flush=True)  # noqa: T201
        with network:
            for look in look_at_all(traffic, network, Path(made) / "pins"):
                held &= look.holds
                print(json.dumps(look._asdict()), flush=True)  # noqa: T201
    return not held


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
