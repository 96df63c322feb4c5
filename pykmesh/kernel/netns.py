"""Acting inside a network namespace, in a thread that ends with it: no process is made for it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from pykmesh.kernel import cgroups, libbpf
from pykmesh.kernel.layout import COOKIE_OBJECT

CLONE_NEWNET: Final = 0x40000000
SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h, since kernel 5.14
_CONNECT4: Final = 10  # BPF_CGROUP_INET4_CONNECT
_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


def run_in(netns_fd: int, act: Callable[[], _T]) -> _T:
    """What `act` returns or raises; OSError when the namespace cannot be entered."""
    found: list[_T] = []
    failed: list[BaseException] = []

    def inside() -> None:
        try:
            _enter(netns_fd)
            found.append(act())
        except BaseException as error:  # noqa: BLE001  (handed to the caller's thread)
            failed.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def own_cookie() -> int:
    """Of the namespace that the calling thread is in. OSError that says so where it cannot be known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
        return _asker().ask(probe)


class _Asker:
    """Before kernel 5.14: by a program (bpf/cookie.bpf.c) that sees a socket connect."""

    def __init__(self) -> None:
        self._object = libbpf.BpfObject(str(COOKIE_OBJECT))
        self._object.load()
        self._program = self._object.program_fd("pykmesh_cookie")
        self._cookies = self._object.map_fd("cookies")

    def ask(self, probe: socket.socket) -> int:
        """`probe`: a datagram socket, which is connected to a drawn address of loopback and sends nothing.

        The program stands on this process's own cgroup meanwhile. OSError.
        """
        host = bytes([127, *secrets.token_bytes(3)])
        port = 1 + secrets.randbelow(65535)
        key = host + struct.pack(">HH", port, 0)
        libbpf.update(self._cookies, key, bytes(8))
        try:
            own = cgroups.of_process(cgroups.find_root())
            with (
                libbpf.closing(os.open(own, os.O_RDONLY)) as cgroup,
                libbpf.closing(libbpf.link_create(self._program, cgroup, _CONNECT4)),
                contextlib.suppress(OSError),  # no route: it was asked all the same
            ):
                probe.connect((socket.inet_ntoa(host), port))
            found = int.from_bytes(libbpf.lookup(self._cookies, key, 8) or b"", "little")
        finally:
            libbpf.delete(self._cookies, key)
        if not found:
            raise OSError(errno.ENOPROTOOPT, "the kernel does not tell the network namespace's cookie")
        return found


@functools.cache
def _asker() -> _Asker:
    return _Asker()


def socket_in(netns_fd: int | None, family: int, kind: int) -> socket.socket:
    """A socket of a network namespace, which it stays in. The calling thread is back when this returns.

    None: of this process's own, which needs no privilege.
    Three system calls, for one socket at a time; `run_in` is for all that takes longer. OSError when the
    namespace cannot be entered, RuntimeError when the thread cannot come back: the process must end.
    """
    kind |= socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    if netns_fd is None:
        return socket.socket(family, kind)
    own = _own_namespace()
    _enter(netns_fd)
    try:
        return socket.socket(family, kind)
    finally:
        try:
            _enter(own)
        except OSError as error:
            raise RuntimeError("the thread is in a network namespace that it cannot leave") from error


def _enter(netns_fd: int) -> None:
    if _libc.setns(netns_fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"enter the network namespace: {os.strerror(number)}")


@functools.cache
def _own_namespace() -> int:
    """The process's own, as its main thread has it."""
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
