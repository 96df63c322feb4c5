"""The unix socket that enrolment comes by: peer credentials checked, descriptors received, one reply."""

from __future__ import annotations

import array
import os
import socket
import struct
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
import structlog

from pykmesh.contracts.enrollment import (
    INSTANCES_MAX,
    MESSAGE_BYTES,
    NAMESPACES_MAX,
    TIMEOUT_S,
    Action,
    EnrollmentError,
    Reply,
    Request,
)
from pykmesh.kernel.cgroups import CgroupError
from services.bpf_loader.enrollment import Enrollment
from services.bpf_loader.waypoints import Waypoints

log = structlog.get_logger(__name__)

DESCRIPTORS_MAX = INSTANCES_MAX


class Door:
    """Serves one request at a time, in turn with all else that has `turn`: enrolment is for one at once."""

    def __init__(self, path: Path, enrollment: Enrollment, waypoints: Waypoints, turn: anyio.Lock) -> None:
        self._path = path
        self._enrollment = enrollment
        self._waypoints = waypoints
        self._turn = turn

    async def serve(self) -> None:
        """Runs until cancelled. OSError when the socket cannot be made."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(16)
            listener.setblocking(False)
            async with anyio.create_task_group() as tasks:
                while True:
                    await anyio.wait_readable(listener)
                    connection, _ = listener.accept()
                    tasks.start_soon(self._answer, connection)

    async def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.setblocking(False)
            try:
                with anyio.fail_after(TIMEOUT_S):
                    await anyio.wait_readable(connection)
                    reply, handed_out = await self._handle(connection)
                    try:
                        socket.send_fds(connection, [msgspec.json.encode(reply)], handed_out)
                    finally:
                        for fd in handed_out:
                            os.close(fd)
            except (OSError, TimeoutError) as error:
                log.warning("enrollment_connection_lost", error=str(error))

    async def _handle(self, connection: socket.socket) -> tuple[Reply, list[int]]:
        """The reply, and the descriptors that go with it."""
        data, ancillary, _, _ = connection.recvmsg(
            MESSAGE_BYTES, socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
        )
        descriptors = _descriptors(ancillary)
        try:
            if not _is_trusted(connection):
                return Reply(error="only root, or the loader's own user, may enroll"), []
            request = msgspec.json.decode(data, type=Request)
            async with self._turn:
                return await anyio.to_thread.run_sync(self._act, request, descriptors)
        except (EnrollmentError, CgroupError, msgspec.MsgspecError) as error:
            return Reply(error=str(error)), []
        except OSError as error:
            return Reply(error=f"{request.action}: {error.strerror or error}"), []
        finally:
            for fd in descriptors:
                os.close(fd)

    def _act(self, request: Request, descriptors: list[int]) -> tuple[Reply, list[int]]:
        if request.action is Action.NAMESPACES:
            found = self._enrollment.namespaces(request.cookies[:NAMESPACES_MAX])
            return Reply(namespaces=[*found]), [*found.values()]
        return self._enroll(request, descriptors), []

    def _enroll(self, request: Request, descriptors: list[int]) -> Reply:
        if request.action is Action.LIST:
            return Reply(enrolled=self._enrollment.enrolled())
        if request.action is Action.FRONT:
            if request.front is None:
                raise EnrollmentError(f"{request.action}: expected a front")
            return Reply(missing=self._waypoints.put_front(request.front, descriptors))
        if request.action is Action.FRONTS_ALONE:
            self._waypoints.keep_fronts(request.fronts)
            return Reply()
        if len(descriptors) != 1 + request.has_netns:
            raise EnrollmentError(f"{request.action}: {len(descriptors)} descriptors came")
        if request.action is Action.ENROLL_WAYPOINT:
            self._waypoints.enroll(descriptors[0], descriptors[1] if request.has_netns else None)
            return Reply()
        if request.action is Action.UNENROLL:
            self._enrollment.unenroll(descriptors[0])
            return Reply()
        namespace = descriptors[1] if request.has_netns else None
        return Reply(enrolled=[self._enrollment.enroll(descriptors[0], namespace)])


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _is_trusted(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())
