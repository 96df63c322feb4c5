"""The demo: a mesh on this node, real traffic through it, and what breaks it not.

Everything that it says was seen: by the clients, by the endpoints' own counts, by the kernel's maps.
It removes all that it made, also when it is interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec

from pykmesh.cli import get_sources
from pykmesh.demo import manifests
from pykmesh.demo.counted import Counted, module
from pykmesh.demo.pods import Pod, PodNetwork
from pykmesh.kernel import pins
from pykmesh.kernel.cgroups import find_root
from pykmesh.node.ask import fetch, supervised
from pykmesh.node.behind import Behind
from pykmesh.node.instance import Instance, command, running

INSTANCE: Final = "demo"
PROCESSES: Final = (
    "xds_client",
    "map_writer",
    "bpf_loader",
    "telemetry",
    "waypoint_mgr",
    "control_plane",
    "nats",
)
ENDS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REQUESTS: Final = 100
INTERRUPT_AGAIN_S: Final = 0.5
EFFECT_DEADLINE_S: Final = 30.0
FLOWS_SHOWN: Final = 6
FLOWS_COME_S: Final = 0.3
"""So long after its end a flow has been shown."""
STEADY_S: Final = 0.6


class Step(msgspec.Struct):
    """What was tried, what should come of it, and what did."""

    name: str
    expected: str
    saw: str = ""
    ok: bool = False


class DemoError(Exception):
    """The demo cannot be run; the text says why."""


class Say(NamedTuple):
    """Where the story goes: standard output, or standard error when that is for the JSON."""

    stream: Any
    colour: bool

    def line(self, text: str = "") -> None:
        print(text, file=self.stream, flush=True)

    def step(self, step: Step) -> None:
        mark = "ok" if step.ok else "FAILED"
        shown = f"\x1b[{32 if step.ok else 31}m{mark}\x1b[0m" if self.colour else mark
        self.line(
            f"  [{shown}] {step.name}: {step.saw}" + ("" if step.ok else f" (expected {step.expected})")
        )


class Demo:
    """One run."""

    def __init__(self, instance: Instance, say: Say) -> None:
        self._say = say
        self.instance = instance
        self._folder = self.instance.run_dir / "config"
        self._mark = self.instance.run_dir / "demo"
        """Says that what this instance has is a demo's, which locks it while it is at work."""
        self._owns: int | None = None
        self._network = PodNetwork(f"pykmesh-{instance.name}", find_root(), "10.98.0", "fd98:")
        self.steps: list[Step] = []
        self._endpoints: dict[str, Counted] = {}
        self._web: list[Pod] = []
        self._flows_to_show = 0
        self._behind: Behind | None = None

    # -- making and removing

    def prepare(self) -> None:
        self._own()
        if running(self.instance.run_dir) is not None:
            self._disown()
            raise DemoError(f"a demo runs already: {command(self.instance, 'demo --remove')} takes it away")
        self._clear()
        self._say.line("Making pods: network namespaces on a bridge, a cgroup each")
        network = self._network.__enter__()
        self.client = network.add("client", 10)
        self._web = [network.add(name, 20 + i) for i, name in enumerate(("web-v1-a", "web-v1-b", "web-v2-a"))]
        echo = network.add("echo-a", 30)
        waypoint = network.add("waypoint", 40)
        for pod in self._web:
            self._endpoints[pod.name] = Counted(
                pod, *module("endpoint"), pod.name, "--http", str(manifests.HTTP_PORT)
            )
        self._endpoints[echo.name] = Counted(
            echo, *module("endpoint"), echo.name, "--udp", str(manifests.UDP_PORT)
        )
        self._folder.mkdir(parents=True)
        manifests.write_services(self._folder)
        manifests.write(self._folder, "client", [manifests.pod(self.client, "client", "v1")])
        manifests.write(self._folder, "echo", [manifests.pod(echo, "echo", "v1")])
        self._write_web(self._web)
        self._say.line("Starting nats-server, the embedded control plane and the mesh's processes")
        up = [*self._place(), "up", "--free-ports", "--config-dir", str(self._folder)]
        up += ["--waypoint-address", str(waypoint.address4), "--waypoint-netns", str(waypoint.netns)]
        self._behind = Behind(self.instance, up)
        self._behind.until_ready()
        for pod in (self.client, *self._web, echo):
            self._cli("enroll", "--cgroup", str(pod.cgroup), "--netns", str(pod.netns))

    def _write_web(self, pods: list[Pod]) -> None:
        found = [manifests.pod(pod, "web", pod.name.split("-")[1]) for pod in pods]
        manifests.write(self._folder, "web", found)

    def remove(self) -> None:
        """Everything of this demo and of one that was left; DemoError for what is none's."""
        if self._owns is None:
            self._own()
        self._clear()
        self._mark.unlink()
        with contextlib.suppress(OSError):
            self.instance.run_dir.rmdir()
        self._disown()

    def _own(self) -> None:
        """Before anything is touched: an instance that has no mark is somebody's mesh."""
        found = self.instance
        if not self._mark.exists() and (running(found.run_dir) is not None or pins.are_there(found.pin_dir)):
            raise DemoError(
                f"instance {found.name} is no demo's, and stays: choose another --instance, or "
                f"{command(found, 'uninstall')} takes it away"
            )
        found.run_dir.mkdir(parents=True, exist_ok=True)
        self._owns = os.open(self._mark, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._owns, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._disown()
            raise DemoError(f"a demo of instance {found.name} is at work") from error

    def _disown(self) -> None:
        if self._owns is not None:
            os.close(self._owns)
            self._owns = None

    @property
    def is_owner(self) -> bool:
        """What is there is this demo's, to be removed."""
        return self._owns is not None

    def _clear(self) -> None:
        self._network.remove()
        if self._behind is not None:
            self._behind.end()
        elif running(self.instance.run_dir) is not None:
            self._cli("down")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._cli("uninstall")

    def _place(self) -> list[str]:
        """What tells the command line which instance is meant."""
        found = self.instance
        return ["--instance", found.name, "--run-dir", str(found.run_dir), "--pin-dir", str(found.pin_dir)]

    def _cli(self, *words: str) -> None:
        command = [sys.executable, "-m", "pykmesh", *self._place(), *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise DemoError(f"pykmesh {words[0]}: {result.stderr.strip() or result.stdout.strip()}")

    # -- looking

    def _live(self) -> Instance:
        found = running(self.instance.run_dir)
        if found is None:
            raise DemoError("the demo's instance has ended")
        return found

    def show_flows(self) -> None:
        """Prints flows as they end, a few for each step, until the mesh is gone."""
        command = [sys.executable, "-m", "pykmesh", *self._place(), "observe", "-f", "--last", "0"]
        self._observer = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        threading.Thread(target=self._print_flows, daemon=True).start()
        telemetry = self._live().ports.telemetry
        if not _until(lambda: fetch(telemetry, "/status")["observe"]["followers"] > 0):
            raise DemoError("telemetry shows no flows")

    def _print_flows(self) -> None:
        """The clients' side of each flow: the endpoints' side names no service."""
        for line in self._observer.stdout or ():
            if self._flows_to_show > 0 and (line.count("->") > 1 or "refused" in line):
                self._flows_to_show -= 1
                self._say.line(f"      {line.rstrip()}")

    def _section(self, title: str, flows: int) -> None:
        """What comes next, of which so many flows are shown; those of before are shown by then."""
        time.sleep(FLOWS_COME_S)
        self._flows_to_show = flows
        self._say.line(f"\n{title}")

    def _connections(self) -> dict[str, int]:
        return {pod.name: int(self._endpoints[pod.name].counts()["connections"]) for pod in self._web}

    def _in_kernel(self) -> set[str]:
        """Names of the pods that the kernel's maps hold as endpoints of the web service."""
        by_address = {address: pod.name for pod in self._web for address in (pod.address4, pod.address6)}
        entries = get_sources.read(self.instance, "endpoints", "bpf")
        return {by_address[e["endpoint"]] for e in entries if e["service"].startswith("shop/web.")}

    def _is_known(self, vip: str) -> bool:
        """The kernel knows where what is for this address goes: until then it is left alone, or refused."""
        return any(
            vip in e["vips"] and e["endpoints"] for e in get_sources.read(self.instance, "services", "bpf")
        )

    # -- trying

    def _try(self, name: str, expected: str, look: Callable[[], tuple[bool, str]]) -> None:
        step = Step(name, expected)
        self.steps.append(step)
        try:
            step.ok, step.saw = look()
        except Exception as error:  # noqa: BLE001  (a step that breaks is a step that failed, and is told)
            step.saw = f"{type(error).__name__}: {error}"
        self._say.step(step)

    def run(self) -> dict[str, Any]:
        """All steps. Returns the summary."""
        begun = time.monotonic()
        self.show_flows()
        self._section("Traffic to service addresses, from an ordinary client", 2 * FLOWS_SHOWN)
        self._try(
            "curl over IPv4", "an answer of a web endpoint", lambda: self._curl(f"http://{manifests.WEB4}/")
        )
        self._try(
            "curl over IPv6", "an answer of a web endpoint", lambda: self._curl(f"http://[{manifests.WEB6}]/")
        )
        self._try("datagrams over IPv4 and IPv6", "echoes from the service's address", self._echo)
        self._try(
            "a service without endpoints",
            "connection refused at once",
            lambda: self._refused(manifests.EMPTY4, 80),
        )
        self._try(
            "a port that the service does not have",
            "connection refused at once",
            lambda: self._refused(manifests.WEB4, 81),
        )
        self._section("A waypoint (Envoy) for one service, by a Gateway and an HTTPRoute", FLOWS_SHOWN)
        manifests.write(self._folder, "waypoint", manifests.by_waypoint())
        _until(lambda: self._is_known(manifests.SHOP4))
        self._try("a request with a header", "always an answer of v2", self._canary)
        self._try("requests without it", "answers of v1 and v2 by weight", self._split)
        self._section("A client connects every 10 ms from here on", FLOWS_SHOWN)
        prober = Counted(self.client, *module("prober"), manifests.WEB4, "80")
        self._try("every endpoint gets its share", "connections at all three endpoints", self._shares)
        self._section("Scaling web-v2-a away by editing the YAML file", FLOWS_SHOWN)
        self._try(
            "the traffic moves", "no new connection at web-v2-a, none failed", lambda: self._scale(prober)
        )
        self._section("Killing each process in turn (kill -9)", 0)
        for process in PROCESSES:
            self._try(
                f"{process} killed",
                "no connection failed, ready again",
                partial(self._kill, prober, process),
            )
        self._try("a change after all that", "web-v2-a serves again", self._scale_back)
        self._try("the waypoint after all that", "always an answer of v2", self._canary)
        return self._summary(prober, time.monotonic() - begun)

    def _curl(self, url: str) -> tuple[bool, str]:
        result = self.client.run("curl", "-gsS", "--max-time", "5", url)
        answer = result.stdout.strip() or result.stderr.strip()
        return answer in self._endpoints, f"{url} answered by {answer}" if result.stdout else answer

    def _echo(self) -> tuple[bool, str]:
        code = (
            "import socket, sys\n"
            "for family, host in ((socket.AF_INET, sys.argv[1]), (socket.AF_INET6, sys.argv[2])):\n"
            "    s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(3)\n"
            "    s.sendto(b'hello', (host, 7)); data, peer = s.recvfrom(100)\n"
            "    print(data.decode(), 'from', peer[0])\n"
        )
        result = self.client.run(sys.executable, "-S", "-c", code, manifests.ECHO4, manifests.ECHO6)
        wanted = [f"echo-a hello from {address}" for address in (manifests.ECHO4, manifests.ECHO6)]
        return result.stdout.splitlines() == wanted, ", ".join(result.stdout.splitlines()) or result.stderr[
            -200:
        ]

    def _refused(self, address: str, port: int) -> tuple[bool, str]:
        result = self.client.run("curl", "-sS", "--max-time", "5", f"http://{address}:{port}/")
        return result.returncode == 7, result.stderr.strip()

    def _asked(self, *options: str) -> Counter[str]:
        """What many requests to the service with the waypoint are answered, by version."""
        url = f"http://{manifests.SHOP4}/"
        result = self.client.run("curl", "-sS", "--max-time", "5", *options, *[url] * REQUESTS)
        return Counter(line.rpartition("-")[0] for line in result.stdout.splitlines())

    def _canary(self) -> tuple[bool, str]:
        """Each of an Envoy's threads has a route or an endpoint when it comes to it."""
        header = ("-H", f"{manifests.CANARY_HEADER}: yes")
        found = Counter[str]()

        def all_right() -> bool:
            nonlocal found
            found = self._asked(*header)
            return found == {"web-v2": REQUESTS}

        return _until(all_right), f"{_listed(found)} of {REQUESTS}"

    def _split(self) -> tuple[bool, str]:
        """Within five standard deviations: a few runs in a million say wrong for nothing."""
        found = self._asked()
        expected = REQUESTS * manifests.CANARY_WEIGHT / 100
        allowed = 5 * (expected * (1 - manifests.CANARY_WEIGHT / 100)) ** 0.5
        ok = found.total() == REQUESTS and abs(found["web-v2"] - expected) < allowed
        weights = f"{manifests.STABLE_WEIGHT} to {manifests.CANARY_WEIGHT}"
        return ok, f"{_listed(found)} of {REQUESTS}, weighted {weights}"

    def _shares(self) -> tuple[bool, str]:
        before = self._connections()
        time.sleep(STEADY_S)
        gained = _difference(self._connections(), before)
        return all(gained.values()), _listed(gained)

    def _scale(self, prober: Counted) -> tuple[bool, str]:
        failed, left = prober.counts()["failed"], self._web[-1].name
        begun = time.monotonic()
        self._write_web(self._web[:-1])
        if not _until(lambda: left not in self._in_kernel()):
            return False, f"{left} is still in the maps"
        taken = (time.monotonic() - begun) * 1e3
        before = self._connections()
        time.sleep(STEADY_S)
        gained, more = _difference(self._connections(), before), prober.counts()["failed"] - failed
        ok = gained.pop(left) == 0 and all(gained.values()) and more == 0
        since = f"since then {_listed(gained)}, {left} 0; {more} failed"
        return ok, f"out of the kernel's maps {taken:.0f} ms after the edit; {since}"

    def _kill(self, prober: Counted, process: str) -> tuple[bool, str]:
        before = prober.counts()
        pid = self._pid(process)
        os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        ready = _until(lambda: self._pid(process) not in (0, pid) and self._is_ready())
        time.sleep(0.1)
        after = prober.counts()
        made, failed = (after[key] - before[key] for key in ("connections", "failed"))
        state = f"ready again after {time.monotonic() - begun:.1f} s" if ready else "not ready again"
        return bool(ready and made and not failed), f"{made} connections meanwhile, {failed} failed; {state}"

    def _pid(self, process: str) -> int:
        """The process of that name; 0 while there is none."""
        return supervised(self._live()).get(process, {}).get("pid") or 0

    def _is_ready(self) -> bool:
        ports = self._live().ports
        names = [name for name in PROCESSES if name != "nats"]
        try:
            return all(fetch(getattr(ports, name), "/readyz")["ready"] for name in names)
        except OSError:
            return False

    def _scale_back(self) -> tuple[bool, str]:
        self._write_web(self._web)
        name = self._web[-1].name
        _until(lambda: name in self._in_kernel())
        before = self._connections()
        time.sleep(STEADY_S)
        gained = _difference(self._connections(), before)
        return gained[name] > 0, _listed(gained)

    def _summary(self, prober: Counted, seconds: float) -> dict[str, Any]:
        found = prober.end()
        connections = self._connections()
        return {
            "connections": found["connections"],
            "failed": found["failed"],
            "errors": found["errors"],
            "longest_pause_ms": found["longest_pause_ms"],
            "per_endpoint": connections,
            "seconds": round(seconds, 1),
            "ok": all(step.ok for step in self.steps) and found["failed"] == 0,
            "steps": msgspec.to_builtins(self.steps),
        }

    def detach(self) -> None:
        """Leaves everything running."""
        self._observer.kill()
        mesh = f"pykmesh --instance {self.instance.name}"
        self._say.line(f"\nLeft running. Look at it: {mesh} status, {mesh} get services, {mesh} observe -f")
        self._say.line(f"The client's pod: cgroup {self.client.cgroup}, namespace {self.client.netns}")
        self._say.line(f"Take it away: {mesh} demo --remove")


def _difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _until(what: Callable[[], bool]) -> bool:
    end = time.monotonic() + EFFECT_DEADLINE_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if what():
                return True
        time.sleep(0.01)
    return False


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, or a terminal that goes, ends the demo as Ctrl-C does; cleaning up is not interrupted again.

    Python ignores what is raised in some places, such as the callbacks of a fork: then it comes again.
    """

    def stop(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, INTERRUPT_AGAIN_S)
        raise KeyboardInterrupt

    signals = (*ENDS, signal.SIGALRM)
    before = [signal.signal(number, stop) for number in signals]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def run(instance: Instance, *, keep: bool, as_json: bool) -> int:
    """Exit status: 0 when all expectations held, 1 when one did not, 130 when interrupted."""
    stream = sys.stderr if as_json else sys.stdout
    say = Say(stream, stream.isatty())
    demo = Demo(instance, say)
    kept = False
    try:
        with _interruptible():
            demo.prepare()
            summary = demo.run()
        if as_json:
            print(json.dumps(summary, indent=2))
        else:
            _tell(say.line, summary)
        kept = keep
        if keep:
            demo.detach()
        return 0 if summary["ok"] else 1
    except KeyboardInterrupt:
        print("interrupted; cleaning up", file=sys.stderr)
        return 130
    finally:
        if not kept:
            for number in ENDS:
                signal.signal(number, signal.SIG_IGN)
            if demo.is_owner:
                demo.remove()


def _tell(say: Callable[[str], None], summary: dict[str, Any]) -> None:
    verdict = "all expectations held" if summary["ok"] else "NOT all expectations held"
    say(
        f"\n{summary['connections']} connections, {summary['failed']} failed, longest pause "
        f"{summary['longest_pause_ms']:.0f} ms; by endpoint: {_listed(summary['per_endpoint'])}"
    )
    say(f"{verdict} ({summary['seconds']} s)")
