"""Where the proxy listens in one pod: a few ports, each for the questions that are meant for one server."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from pykmesh.kernel.netns import run_in
from pykmesh.kernel.records import DNS_KEY, DNS_LISTENER, port_bytes

TRIES: Final = 8
BACKLOG: Final = 64
_LOOPBACK: Final = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


class Pair(NamedTuple):
    """UDP and TCP at one port of one family."""

    udp: socket.socket
    tcp: socket.socket

    @property
    def port(self) -> int:
        return int(self.udp.getsockname()[1])


class Ports(NamedTuple):
    """0: not listened on."""

    v4: int
    v6: int


NO_PORTS: Final = Ports(0, 0)


class Slot:
    """The listening sockets of one slot in one network namespace. `used_at`: when a question came last."""

    def __init__(self, key: bytes, pairs: list[Pair]) -> None:
        self.key = key
        self.pairs = pairs
        self.used_at = time.monotonic()

    @property
    def ports(self) -> Ports:
        by_family = {pair.udp.family: pair.port for pair in self.pairs}
        return Ports(by_family.get(socket.AF_INET, 0), by_family.get(socket.AF_INET6, 0))

    def value(self, beat_ns: int) -> bytes:
        """What the programs read."""
        ports = self.ports
        return DNS_LISTENER.pack(beat_ns, port_bytes(ports.v4), port_bytes(ports.v6))

    def close(self) -> None:
        for pair in self.pairs:
            pair.udp.close()
            pair.tcp.close()


def listen(netns_fd: int, cookie: int, wanted: Sequence[tuple[int, Ports]]) -> list[Slot]:
    """Opens slots, by number, at the ports wanted or, where these are taken or 0, at others.

    A pod without loopback addresses of a family is not listened to in that family. OSError.
    """

    def inside() -> list[Slot]:
        with contextlib.ExitStack() as undo:
            slots = []
            for number, ports in wanted:
                slot = Slot(DNS_KEY.pack(cookie, number), [])
                undo.callback(slot.close)
                for family, port in ((socket.AF_INET, ports.v4), (socket.AF_INET6, ports.v6)):
                    with contextlib.suppress(_NoSuchFamilyError):
                        slot.pairs.append(_pair(family, port))
                slots.append(slot)
            undo.pop_all()
        return slots

    return run_in(netns_fd, inside)


class _NoSuchFamilyError(Exception):
    """Neither kernel nor namespace have the family's loopback address."""


def _pair(family: int, wanted: int) -> Pair:
    """A port that is free for both."""
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
            return Pair(udp, tcp)
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
