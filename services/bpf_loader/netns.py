"""What a network namespace is known by: its cookie, and the addresses of the pod in it."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from typing import NamedTuple

from pyroute2 import IPRoute

from pykmesh.kernel.records import NO_IP, Ip, ip_from_text

SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
CLONE_NEWNET = 0x40000000
RT_SCOPE_UNIVERSE = 0
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace(NamedTuple):
    """The first global address of each family, zero when there is none."""

    cookie: int
    address4: Ip
    address6: Ip


def inspect(netns_fd: int) -> Namespace:
    """Reads a namespace from inside, in a thread that ends with it. Raises OSError."""
    found: list[Namespace | OSError] = []

    def read() -> None:
        try:
            if _libc.setns(netns_fd, CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"enter the network namespace: {os.strerror(number)}")
            found.append(_read_here())
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    result = found[0]
    if isinstance(result, OSError):
        raise result
    return result


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
