"""A mesh of the tests' own, by the command line that users have, and pods to try it from."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pykmesh.cli.show_commands import status_of
from pykmesh.demo.pods import Pod, PodNetwork
from pykmesh.kernel import pins
from pykmesh.kernel.cgroups import find_root
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import (
    ENDPOINT_KEY,
    ENDPOINT_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    ip_to_text,
    port_number,
)
from pykmesh.node.behind import ready_deadline_s
from pykmesh.node.instance import Instance, running
from services.map_writer.desired import PortId

DEADLINE_S = 30.0


def until(what: Callable[[], Any], because: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first true value of `what`; fails with `because` at the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < end, f"{because}: still {found!r} after {deadline_s} s"
        time.sleep(0.05)


class Node:
    """One instance with a configuration folder and a network of pods."""

    def __init__(self, directory: Path, *options: str, subnet: int = 0) -> None:
        self.name = f"t-{secrets.token_hex(3)}"
        self.directory = directory
        self.config = directory / "config"
        self.config.mkdir()
        self.run_dir = directory / "run"
        self.pin_dir = directory / "bpf" / "mesh"
        self.options = list(options) or ["--config-dir", str(self.config)]
        self.network = PodNetwork(self.name, find_root(), f"10.{100 + subnet}.0", f"fd{subnet:02x}:")

    @property
    def place(self) -> list[str]:
        """What tells the command line which instance is meant."""
        return ["--instance", self.name, "--run-dir", str(self.run_dir), "--pin-dir", str(self.pin_dir)]

    def cli(
        self, *words: str, check: bool = True, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-m", "pykmesh", *self.place, *words],
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if check:
            assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}\n{self.logs()}"
        return result

    def json(self, *words: str) -> Any:
        return json.loads(self.cli(*words, "-o", "json").stdout)

    def logs(self) -> str:
        files = sorted((self.run_dir / "logs").glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files)

    def start(self, *extra: str) -> None:
        """A node whose folder is empty starts with an empty mesh."""
        if not list(self.config.iterdir()):
            self.write("empty", "# nothing yet\n")
        timeout_s = ready_deadline_s() + 30
        self.cli("up", "-d", "--free-ports", *self.options, *extra, timeout_s=timeout_s)

    @property
    def instance(self) -> Instance:
        found = running(self.run_dir)
        assert found is not None
        return found

    def pid_of(self, process: str) -> int:
        """The process itself, once it runs."""

        def found() -> int | None:
            return next((pid for pid, name in self.children().items() if name == process), None)

        return int(until(found, f"{process} to run"))

    def fork_server(self) -> int:
        return next(pid for pid, name in _below(self.instance.pid).items() if name == "fork_server")

    def children(self) -> dict[int, str]:
        """What its fork server started, by the commands that are shown."""
        servers = [pid for pid, name in _below(self.instance.pid).items() if name == "fork_server"]
        return {pid: name for server in servers for pid, name in _below(server).items()}

    def kill(self, process: str) -> None:
        """It is gone when this returns: what is asked next is asked of the one after it."""
        pid = self.pid_of(process)
        os.kill(pid, signal.SIGKILL)
        until(lambda: pid not in self.children(), f"{process} to end")

    def status(self) -> dict[str, Any]:
        """What `pykmesh status -o json` shows: asked for again and again, without a process each time."""
        return status_of(self.instance)

    def until_ready(self) -> None:
        until(lambda: self.status()["ready"], "every process ready")

    def write(self, name: str, text: str) -> None:
        """A file of the configuration folder, there at once and whole."""
        temporary = self.directory / "new.yaml"
        temporary.write_text(text)
        temporary.rename(self.config / f"{name}.yaml")

    def endpoints(self, service: str, port: int | None = None) -> set[str]:
        """Where the programs send connections to a service, as address:port."""
        found = set()
        maps_dir = pins.maps_dir(self.pin_dir)
        with PinnedMap(maps_dir, "services") as services, PinnedMap(maps_dir, "endpoints") as endpoints:
            for key, value in services.items():
                at = port_number(SERVICE_KEY.unpack(key)[2])
                list_id, count, *_ = SERVICE_VALUE.unpack(value)
                own = {PortId(service, at, family, way).id for family in (4, 6) for way in (False, True)}
                if port not in (None, at) or list_id not in own:
                    continue
                slots = (endpoints.get(ENDPOINT_KEY.pack(list_id, slot)) for slot in range(count))
                for _, ip, own_port in map(ENDPOINT_VALUE.unpack, filter(None, slots)):
                    found.add(f"{ip_to_text(ip)}:{port_number(own_port)}")
        return found

    def raw_endpoints(self) -> set[str]:
        """What the kernel holds for all services together, whether map_writer can name them or not."""
        entries = self.json("get", "endpoints", "--from", "bpf")["endpoints"]
        return {f"{e['endpoint']}:{e['endpoint_port']}" for e in entries}

    def until_endpoints(self, service: str, expected: set[str], port: int | None = None) -> None:
        until(lambda: self.endpoints(service, port) == expected, f"{service} to have {expected}")

    def enroll(self, pod: Pod) -> None:
        self.cli("enroll", "--cgroup", str(pod.cgroup), "--netns", str(pod.netns))

    def end(self) -> None:
        self.network.remove()
        if running(self.run_dir) is not None:
            self.cli("down", check=False)
        self.cli("uninstall", check=False)
        subprocess.run(["umount", str(self.pin_dir)], check=False, capture_output=True)


def serve(pod: Pod, *words: str) -> subprocess.Popen[str]:
    """An endpoint in a pod, listening when this returns."""
    process = pod.spawn(
        sys.executable, "-m", "pykmesh.demo.endpoint", pod.name, *words, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def python(pod: Pod, code: str, timeout_s: float = 20.0) -> str:
    """What a client in the pod prints."""
    result = pod.run(sys.executable, "-S", "-c", code, timeout_s=timeout_s)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def service_secret_of(node: Node) -> bytes:
    """What IPv6 services' addresses are hashed with, for its waypoints."""
    with PinnedMap(pins.maps_dir(node.pin_dir), "service_secrets") as held:
        return held.get(bytes(4)) or b""


def with_resolv_conf(path: Path, *words: str) -> list[str]:
    """A program for which this file is /etc/resolv.conf."""
    command = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
    return ["unshare", "--mount", "bash", "-c", command, str(path), *words]


# Resolves again and again until told to end; what failed is counted.
LOOK_UP_ON = """
import signal, socket, sys, time
going = True
def end(*_):
    global going; going = False
signal.signal(signal.SIGTERM, end)
asked, failed = 0, []
print("ready", flush=True)
while going:
    for name in sys.argv[1:]:
        try: socket.getaddrinfo(name, 80, socket.AF_INET)
        except OSError as error: failed.append(f"{name}: {error}")
        asked += 1
    time.sleep(0.01)
print(asked, failed, flush=True)
"""


def look_up_on(pod: Pod, resolv_conf: Path, *names: str) -> subprocess.Popen[str]:
    """Looks names up, one after another and again, until `looked_up`."""
    command = with_resolv_conf(resolv_conf, sys.executable, "-c", LOOK_UP_ON, *names)
    process = pod.spawn(*command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def looked_up(process: subprocess.Popen[str]) -> tuple[int, str]:
    """How often, and what failed, as a list in text."""
    process.send_signal(signal.SIGTERM)
    asked, failed = process.communicate(timeout=30)[0].split(" ", 1)
    return int(asked), failed.strip()


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Tells a prober or endpoint to end; what it counted."""
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def probe(pod: Pod, host: str, port: int) -> subprocess.Popen[str]:
    """A client that connects every 10 ms until `finish`."""
    process = pod.spawn(
        sys.executable, "-m", "pykmesh.demo.prober", host, str(port), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _below(parent: int) -> dict[int, str]:
    """A process's children, by what they run."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            its_parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes().decode().replace("\0", " ").split()
            if its_parent == parent and len(words) > 2:
                module = words[2].rpartition(".")[2] if words[1] == "-m" else "nats"
                found[int(entry.name)] = module.replace("controlplane", "control_plane")
    return found
