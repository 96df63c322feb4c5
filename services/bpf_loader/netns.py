"""What a network namespace is known by: its cookie, and the addresses of the pod in it."""

from __future__ import annotations

import socket
from typing import NamedTuple

from pyroute2 import IPRoute

from pykmesh.kernel.netns import run_in
from pykmesh.kernel.records import NO_IP, Ip, ip_from_text

SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
RT_SCOPE_UNIVERSE = 0


class Namespace(NamedTuple):
    """The first global address of each family, zero when there is none."""

    cookie: int
    address4: Ip
    address6: Ip


def inspect(netns_fd: int) -> Namespace:
    """Reads a namespace from inside. Raises OSError."""
    return run_in(netns_fd, _read_here)


def own_cookie() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")


def _read_here() -> Namespace:
    first = {socket.AF_INET: NO_IP, socket.AF_INET6: NO_IP}
    with IPRoute() as netlink:
        for message in netlink.get_addr():
            family, scope = message["family"], message["scope"]
            if scope == RT_SCOPE_UNIVERSE and first.get(family) == NO_IP:
                first[family] = ip_from_text(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
    return Namespace(own_cookie(), first[socket.AF_INET], first[socket.AF_INET6])
