"""Where the proxy listens in one pod: a few ports, each for the questions that are meant for one server."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Sequence
from typing import Final

from pykmesh.kernel.netns import run_in
from pykmesh.kernel.records import DNS_KEY, DNS_LISTENER, DNS_SLOTS, port_bytes

TRIES: Final = 8
BACKLOG: Final = 64
_LOOPBACK: Final = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


class Slot:
    """UDP and TCP at one port of one slot in one network namespace. `used_at`: when a question came last."""

    def __init__(self, key: bytes, udp: socket.socket, tcp: socket.socket) -> None:
        self.key = key
        self.udp = udp
        self.tcp = tcp
        self.port = int(udp.getsockname()[1])
        self.used_at = time.monotonic()

    def value(self, beat_ns: int) -> bytes:
        """What the programs read."""
        return DNS_LISTENER.pack(beat_ns, port_bytes(self.port), self.udp.family == socket.AF_INET6)

    def close(self) -> None:
        self.udp.close()
        self.tcp.close()


def listen(netns_fd: int, cookie: int, wanted: Sequence[tuple[int, int]]) -> list[Slot]:
    """Opens slots, by number, at the ports wanted or, where these are taken or 0, at others.

    The first half are IPv4's. A pod without the loopback address of a family has none of it. OSError.
    """

    def inside() -> list[Slot]:
        with contextlib.ExitStack() as undo:
            slots = []
            for number, port in wanted:
                family = socket.AF_INET if number < DNS_SLOTS // 2 else socket.AF_INET6
                with contextlib.suppress(_NoSuchFamilyError):
                    slots.append(Slot(DNS_KEY.pack(cookie, number), *_pair(family, port)))
                    undo.callback(slots[-1].close)
            undo.pop_all()
        return slots

    return run_in(netns_fd, inside)


class _NoSuchFamilyError(Exception):
    """Neither kernel nor namespace have the family's loopback address."""


def _pair(family: int, wanted: int) -> tuple[socket.socket, socket.socket]:
    """UDP and TCP at a port that is free for both."""
    for port in (wanted, *[0] * TRIES):
        with contextlib.ExitStack() as undo:
            try:
                udp = undo.enter_context(_bound(family, socket.SOCK_DGRAM, port))
                tcp = undo.enter_context(_bound(family, socket.SOCK_STREAM, udp.getsockname()[1]))
                tcp.listen(BACKLOG)
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise _NoSuchFamilyError from error
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            undo.pop_all()
            return udp, tcp
    raise OSError(errno.EADDRINUSE, "no port is free for UDP and TCP")


def _bound(family: int, kind: int, port: int) -> socket.socket:
    found = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if kind == socket.SOCK_STREAM:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((_LOOPBACK[socket.AddressFamily(family)], port))
    except BaseException:
        found.close()
        raise
    return found
