"""What a network namespace is known by: its cookie, and the addresses of the pod in it."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Final, NamedTuple

from pykmesh.kernel import cgroups
from pykmesh.kernel.netns import own_cookie, run_in
from pykmesh.kernel.records import NO_IP, Ip, ip_from_text

RT_SCOPE_UNIVERSE = 0


class Namespace(NamedTuple):
    """The first global address of each family, zero when there is none."""

    cookie: int
    address4: Ip
    address6: Ip


HOST: Final = Namespace(0, NO_IP, NO_IP)
"""The loader's own, which is no pod's."""


def inspect(netns_fd: int) -> Namespace:
    """Reads a namespace from inside; HOST for the one that the loader is in. Raises OSError."""
    if _is_own(netns_fd):
        return HOST
    return run_in(netns_fd, _read_here)


def _is_own(netns_fd: int) -> bool:
    return os.path.samestat(os.fstat(netns_fd), Path("/proc/self/ns/net").stat())


def of_first_process(cgroup: Path) -> int | None:
    """A descriptor of the namespace of a cgroup's first process; None while there is none."""
    for pid in _processes(cgroup):
        try:
            return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        except OSError:
            continue
    return None


def of_cookie(cgroup: Path, cookie: int) -> int | None:
    """A descriptor of the namespace of a cookie, by the processes of a cgroup and those below it."""
    seen: set[int] = set()
    for inner in cgroups.with_descendants(cgroup):
        for pid in _processes(inner):
            with contextlib.ExitStack() as opened:
                try:
                    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
                except OSError:
                    continue
                opened.callback(os.close, fd)
                number = os.fstat(fd).st_ino
                if number not in seen and run_in(fd, own_cookie) == cookie:
                    opened.pop_all()
                    return fd
                seen.add(number)
    return None


def _processes(cgroup: Path) -> list[str]:
    """None of a cgroup that went, or that holds threads of processes that are elsewhere."""
    try:
        return (cgroup / "cgroup.procs").read_text().split()
    except OSError:
        return []


def _read_here() -> Namespace:
    from pyroute2 import IPRoute  # noqa: PLC0415  (a fifth of the start, and programs come first)

    first = {socket.AF_INET: NO_IP, socket.AF_INET6: NO_IP}
    with IPRoute() as netlink:
        for message in netlink.get_addr():
            family, scope = message["family"], message["scope"]
            if scope == RT_SCOPE_UNIVERSE and first.get(family) == NO_IP:
                first[family] = ip_from_text(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
    return Namespace(own_cookie(), first[socket.AF_INET], first[socket.AF_INET6])
