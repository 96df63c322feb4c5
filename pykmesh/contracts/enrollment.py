"""Enrolment over the loader's own unix socket, which works without the bus.

One request and one reply a connection, JSON, with the cgroup's and the network namespace's
descriptors passed beside it.
"""

from __future__ import annotations

import os
import socket
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

MESSAGE_BYTES: Final = 1 << 20
TIMEOUT_S: Final = 10.0
INSTANCES_MAX: Final = 32
"""Instances of one waypoint on a node (bpf/mesh_types.h, FRONT_INSTANCES_MAX)."""
NAMESPACES_MAX: Final = 64
"""Descriptors of namespaces in one reply; the kernel lets 253 come with a message (SCM_MAX_FD)."""


class Action(StrEnum):
    ENROLL = "enroll"
    UNENROLL = "unenroll"
    LIST = "list"
    NAMESPACES = "namespaces"
    ENROLL_WAYPOINT = "enroll-waypoint"
    FRONT = "front"
    FRONTS_ALONE = "fronts-alone"


class Front(msgspec.Struct, frozen=True):
    """Where connections to a waypoint come in, and the ports that its instances listen at; none: no front."""

    address: str
    port: int
    instances: list[int] = []
    listening: list[int] = []
    """The instances whose listening sockets follow as descriptors, in their order."""


class Request(msgspec.Struct, frozen=True):
    """Descriptors follow in the order cgroup, network namespace; LIST and NAMESPACES take none.

    With FRONT come listening sockets.
    """

    action: Action
    has_netns: bool = False
    cookies: list[int] = []
    """Of NAMESPACES: which ones, at most NAMESPACES_MAX."""
    front: Front | None = None
    fronts: list[tuple[str, int]] = []
    """Of FRONTS_ALONE: addresses and ports of those that there shall be; all others are taken away."""


class Enrolled(msgspec.Struct, frozen=True):
    """One enrolled cgroup. `path` is None when the cgroup is gone, the addresses when it has none."""

    cgroup_id: int
    path: str | None
    programs: int
    netns_cookie: int | None = None
    address4: str | None = None
    address6: str | None = None


class Reply(msgspec.Struct, frozen=True):
    """`error` is empty when it was done."""

    error: str = ""
    enrolled: list[Enrolled] = []
    namespaces: list[int] = []
    """The cookies of the network namespaces whose descriptors follow, in their order."""
    missing: list[int] = []
    """Of a front's instances, those whose listening sockets the kernel does not have."""


class EnrollmentError(Exception):
    """The loader refused, or is not there; the text is for the user."""


def ask(path: Path, request: Request, descriptors: list[int]) -> Reply:
    """Asks the loader; raises EnrollmentError with what it said."""
    reply, received = _ask(path, request, descriptors)
    for fd in received:
        os.close(fd)
    return reply


def ask_for_namespaces(path: Path, cookies: list[int]) -> dict[int, int]:
    """Descriptors of enrolled pods' network namespaces, by cookie, for the caller to close.

    Those in which no process of the pod runs are missing, and all after the first NAMESPACES_MAX.
    Raises EnrollmentError.
    """
    request = Request(Action.NAMESPACES, cookies=cookies[:NAMESPACES_MAX])
    reply, received = _ask(path, request, [])
    return dict(zip(reply.namespaces, received, strict=True))


def ask_for_front(path: Path, front: Front, descriptors: list[int]) -> list[int]:
    """Who takes a front's connections from now on. Returns the instances whose sockets are still missing.

    Raises EnrollmentError.
    """
    return ask(path, Request(Action.FRONT, front=front), descriptors).missing


def ask_for_fronts_alone(path: Path, fronts: list[tuple[str, int]]) -> None:
    """Takes all other fronts away. Raises EnrollmentError."""
    ask(path, Request(Action.FRONTS_ALONE, fronts=fronts), [])


def _ask(path: Path, request: Request, descriptors: list[int]) -> tuple[Reply, list[int]]:
    """The caller closes what was received; after an error nothing is left open."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(TIMEOUT_S)
        try:
            connection.connect(str(path))
            socket.send_fds(connection, [msgspec.json.encode(request)], descriptors)
            data, received, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, NAMESPACES_MAX)
        except (OSError, TimeoutError) as error:
            raise EnrollmentError(
                f"bpf_loader at {path}: {error.strerror or error}; is the mesh up?"
            ) from error
    try:
        reply = msgspec.json.decode(data, type=Reply)
        if reply.error:
            raise EnrollmentError(reply.error)
        if len(received) != len(reply.namespaces):
            raise EnrollmentError(f"bpf_loader at {path}: {len(received)} descriptors came")
    except (msgspec.MsgspecError, EnrollmentError) as error:
        for fd in received:
            os.close(fd)
        if isinstance(error, EnrollmentError):
            raise
        raise EnrollmentError(f"bpf_loader at {path} answered {data[:80]!r}") from error
    return reply, received


def ask_for_cgroup(path: Path, action: Action, cgroup: Path, netns: Path | None) -> Reply:
    """Opens the cgroup and the namespace and asks; both are named in the error when they cannot be opened."""
    descriptors: list[int] = []
    try:
        for target in (cgroup, netns):
            if target is None:
                continue
            try:
                descriptors.append(os.open(target, os.O_RDONLY))
            except OSError as error:
                raise EnrollmentError(f"{target}: {error.strerror}") from error
        return ask(path, Request(action, netns is not None), descriptors)
    finally:
        for fd in descriptors:
            os.close(fd)
