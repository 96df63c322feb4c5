"""Where connections to a waypoint come in: one address, and behind it the instances, given out by the kernel.

The port is held here, by a socket that takes nothing: while no instance listens the kernel drops what begins
a connection instead of refusing it, and the client's own retransmission finds an instance a second later.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pykmesh.kernel.netns import socket_in

_LISTENING: Final = "0A"  # TCP_LISTEN, as /proc/net/tcp has it
_PIDFD_GETFD: Final = 438  # the same number on every architecture
_SO_MEMINFO: Final = 55
_MEMINFO_DROPS: Final = 8  # the ninth number (include/uapi/linux/sock_diag.h)
_UNACKED_AT: Final = 24  # of a listener, in struct tcp_info: connections that wait to be accepted
_FILL_S: Final = 1.0
_POLL_S: Final = 0.005
_libc = ctypes.CDLL(None, use_errno=True)


class FrontError(Exception):
    """A port that cannot be held; the text says why."""


class Front:
    """A port held on every address of a network namespace. `close` gives it up."""

    def __init__(self, address: str, port: int, netns: Path | None) -> None:
        """Raises FrontError; its `__cause__` is the OSError."""
        self.address = address
        self.port = port
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        loopback, wildcard = ("::1", "::") if family == socket.AF_INET6 else ("127.0.0.1", "0.0.0.0")  # noqa: S104
        with contextlib.ExitStack() as undo:
            try:
                namespace = os.open(netns, os.O_RDONLY) if netns else None
                if namespace is not None:
                    undo.callback(os.close, namespace)
                self._holder = socket_in(namespace, family, socket.SOCK_STREAM)
                undo_sockets = undo.enter_context(contextlib.ExitStack())
                undo_sockets.callback(self._holder.close)
                # Connections that go on from before this process hold the port too.
                self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    self._holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                self._holder.bind((wildcard, port))
                self._holder.listen(0)
                self._filler = socket_in(namespace, family, socket.SOCK_STREAM)
                undo_sockets.callback(self._filler.close)
                with contextlib.suppress(BlockingIOError):
                    self._filler.connect((loopback, port))
                self._wait_until_full()
                undo_sockets.pop_all()
            except OSError as error:
                raise FrontError(f"port {port} for a waypoint: {error.strerror or error}") from error

    def _wait_until_full(self) -> None:
        """One connection that nobody accepts is all that there is room for."""
        end = time.monotonic() + _FILL_S
        while not struct.unpack_from(
            "I", self._holder.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), _UNACKED_AT
        )[0]:
            if time.monotonic() > end:
                raise OSError(
                    errno.ETIMEDOUT, "its own connection did not come in; is the loopback device up?"
                )
            time.sleep(_POLL_S)

    @property
    def turned_away(self) -> int:
        """How many beginnings of connections found no instance."""
        found: int = struct.unpack("9I", self._holder.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))[
            _MEMINFO_DROPS
        ]
        return found

    def close(self) -> None:
        self._filler.close()
        self._holder.close()


@contextlib.contextmanager
def listening_socket(pid: int, pidfd: int, port: int) -> Iterator[int]:
    """A descriptor of the socket at which a process listens, for as long as it takes to hand it on.

    Whoever holds it keeps it listening also when the process is gone. OSError when there is none.
    """
    inodes = _listening_at(pid, port)
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(entry.readlink()) not in inodes:
                continue
            fd = _libc.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0)
            if fd < 0:
                number = ctypes.get_errno()
                raise OSError(number, f"take the socket of process {pid}: {os.strerror(number)}")
            try:
                yield fd
            finally:
                os.close(fd)
            return
    raise OSError(errno.ENOENT, f"process {pid} does not listen at port {port}")


def _listening_at(pid: int, port: int) -> set[str]:
    """Sockets of the process's network namespace, as links in /proc/PID/fd name them."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
    return found
