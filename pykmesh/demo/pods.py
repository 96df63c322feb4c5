"""Pods without a cluster: a network namespace with veth on a bridge, and a cgroup, each.

It owns what it makes, under names of its own, and removes all of it, whatever happened meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from pyroute2 import IPRoute, netns

from pykmesh.kernel.netns import run_in

NETNS_DIR: Final = Path("/run/netns")
BRIDGE: Final = "mesh0"
PREFIX4, PREFIX6 = 24, 64
REMOVE_DEADLINE_S: Final = 5.0


class Pod:
    """One pod. `spawn` runs programs in it; they end with it."""

    def __init__(
        self, name: str, namespace: str, cgroup: Path, address4: str | None, address6: str | None
    ) -> None:
        self.name = name
        self.netns = NETNS_DIR / namespace
        self.cgroup = cgroup
        self.address4 = address4
        self.address6 = address6
        self._processes: list[subprocess.Popen[Any]] = []

    def command(self, *words: str) -> list[str]:
        """What runs a program in the pod's cgroup and network namespace."""
        join = 'echo $$ > "$0" && exec nsenter --net="$1" -- "${@:2}"'
        return ["bash", "-c", join, str(self.cgroup / "cgroup.procs"), str(self.netns), *words]

    def spawn(self, *words: str, **options: Any) -> subprocess.Popen[Any]:
        process = subprocess.Popen(self.command(*words), start_new_session=True, **options)
        self._processes.append(process)
        return process

    def run(self, *words: str, timeout_s: float = 20.0) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end; its output is captured, its exit status is for the caller to read."""
        return subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
            for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
                stream.close()
        self._processes.clear()


class PodNetwork:
    """Pods on a bridge in a namespace of its own. Use as a context manager."""

    def __init__(self, prefix: str, cgroup_root: Path, subnet4: str, subnet6: str) -> None:
        """`subnet4` such as "10.99.0", `subnet6` such as "fd99:" (the first three or four parts)."""
        self._prefix = prefix
        self._subnets = (subnet4, subnet6)
        self.cgroup = cgroup_root / prefix
        self.pods: dict[str, Pod] = {}

    def __enter__(self) -> Self:
        self.remove()
        try:
            _create_netns(self._name("bridge"))
            self._in("bridge", _make_bridge)
            self.cgroup.mkdir(exist_ok=True)
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _name(self, pod: str) -> str:
        return f"{self._prefix}-{pod}"

    def _in(self, pod: str, act: Callable[[IPRoute], None]) -> None:
        """Netlink inside a pod's namespace."""

        def inside() -> None:
            with IPRoute() as link:
                act(link)

        fd = os.open(NETNS_DIR / self._name(pod), os.O_RDONLY)
        try:
            run_in(fd, inside)
        finally:
            os.close(fd)

    def add(self, name: str, host: int, *, v4: bool = True, v6: bool = True) -> Pod:
        """A pod with the addresses `<subnet>.host` and `<subnet6>::host`."""
        namespace = self._name(name)
        address4 = f"{self._subnets[0]}.{host}" if v4 else None
        address6 = f"{self._subnets[1]}:{host:x}" if v6 else None
        cgroup = self.cgroup / name
        cgroup.mkdir()
        _create_netns(namespace)
        pod = self.pods[name] = Pod(name, namespace, cgroup, address4, address6)
        self._in("bridge", lambda link: _make_port(link, f"p{host}", namespace))
        self._in(name, lambda link: _make_interface(link, address4, address6))
        return pod

    def remove(self) -> None:
        """Everything under this prefix, also what an earlier run left."""
        for pod in self.pods.values():
            pod.end()
        self.pods.clear()
        for path in NETNS_DIR.glob(f"{self._prefix}-*"):
            netns.remove(path.name)
        for cgroup in [*self.cgroup.glob("*/"), self.cgroup]:
            _remove_cgroup(cgroup)


_IFA_F_NODAD = 2
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


def _create_netns(name: str) -> None:
    """An interruption waits: pyroute2 has a child make it, which would go on after we removed everything."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        netns.create(name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _make_bridge(link: IPRoute) -> None:
    link.link("add", ifname=BRIDGE, kind="bridge")
    link.link("set", index=_index(link, BRIDGE), state="up")
    link.link("set", index=_index(link, "lo"), state="up")


def _make_port(link: IPRoute, port: str, namespace: str) -> None:
    """A veth on the bridge; its other end is the namespace's eth0."""
    link.link("add", ifname=port, kind="veth", peer={"ifname": "eth0", "net_ns_fd": namespace})
    link.link("set", index=_index(link, port), master=_index(link, BRIDGE), state="up")


def _make_interface(link: IPRoute, address4: str | None, address6: str | None) -> None:
    eth0 = _index(link, "eth0")
    link.link("set", index=_index(link, "lo"), state="up")
    link.link("set", index=eth0, state="up")
    if address4:
        link.addr("add", index=eth0, address=address4, prefixlen=PREFIX4)
        link.route("add", dst="0.0.0.0/0", oif=eth0, scope="link")
    if address6:
        link.addr("add", index=eth0, address=address6, prefixlen=PREFIX6, flags=_IFA_F_NODAD)
        link.route("add", dst="::/0", oif=eth0)


def _index(link: IPRoute, name: str) -> int:
    found: int = link.link_lookup(ifname=name)[0]
    return found


def _remove_cgroup(path: Path) -> None:
    """A cgroup empties a moment after its last process; what lives in it is ended."""
    deadline = time.monotonic() + REMOVE_DEADLINE_S
    while path.exists():
        for pid in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
