"""The cgroups in which waypoints' Envoys run, and the fronts behind which they listen (bpf/waypoint.h).

As with pods the truth is in the kernel: a directory of pinned links for each cgroup, named after its id, and
the maps `fronts` and `listeners`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from functools import cached_property
from pathlib import Path
from typing import Final

import structlog

from pykmesh.contracts.enrollment import INSTANCES_MAX, EnrollmentError, Front
from pykmesh.kernel import cgroups, libbpf, pins
from pykmesh.kernel.hooks import FRONT_HOOK, READING_HOOK, WAYPOINT_HOOKS, Programs
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import FRONT_KEY, FRONT_VALUE, ip_from_text, ip_to_text
from services.bpf_loader import pinned

log = structlog.get_logger(__name__)

COOKIE_BYTES: Final = 8
_TCP_SAVE_SYN: Final = 27  # linux/tcp.h
_HOOKS: Final = (*WAYPOINT_HOOKS, FRONT_HOOK)


class Waypoints:
    """Blocks, and is not for concurrent use."""

    def __init__(self, pin_dir: Path, programs: Programs) -> None:
        self._links = pins.waypoints_dir(pin_dir)
        self._maps = pins.maps_dir(pin_dir)
        self._programs = programs
        self._held = pinned.Held()

    @cached_property
    def _fronts(self) -> PinnedMap:
        return PinnedMap(self._maps, "fronts")

    @cached_property
    def _listeners(self) -> PinnedMap:
        return PinnedMap(self._maps, "listeners")

    def exchange(self) -> int:
        """Gives the links that are there the programs loaded now; returns how many."""
        found = pins.read_links(self._links).cgroups
        return sum(
            pinned.adopt(each.path / hook.program, hook, self._programs) for each in found for hook in _HOOKS
        )

    def read_both(self, root: Path) -> None:
        """Before an `exchange` for other maps: what was noted in those of before is read until `read_one`.

        Pinned, so that whoever is ended in between drops none of it either.
        """
        found = pins.read_links(self._links).cgroups
        paths = cgroups.paths_of(root, [each.cgroup_id for each in found])
        for each in (each for each in found if each.cgroup_id in paths):
            try:
                with libbpf.closing(os.open(paths[each.cgroup_id], os.O_RDONLY | os.O_DIRECTORY)) as fd:
                    pinned.double(each.path / READING_HOOK.program, READING_HOOK, fd)
            except OSError as error:  # a cgroup that went just now, no room for another program
                log.warning("notes_of_before_not_read", cgroup=str(paths[each.cgroup_id]), error=str(error))

    def read_one(self) -> None:
        """What was noted before an `exchange` has been read."""
        for each in pins.read_links(self._links).cgroups:
            if pinned.remove_double(each.path / READING_HOOK.program):
                log.info("notes_of_before_read", waypoint_cgroup_id=each.cgroup_id)

    def sweep(self) -> None:
        """Clears what is left of cgroups that were removed; pins again what somebody unpinned."""
        found = pins.read_links(self._links).cgroups
        gone = self._held.without({each.cgroup_id for each in found})
        found += [pins.cgroup_links(self._links, cgroup_id, None) for cgroup_id in gone]
        for each in found:
            try:
                self._pin_again(each)
            except OSError as error:  # it stays attached, and is tried again
                log.warning("links_not_made_again", path=str(each.path), error=str(error))
                continue
            self._held.hold(each.cgroup_id, each.path, _HOOKS)
            if not any(pinned.is_attached(each.path / hook.program) for hook in WAYPOINT_HOOKS):
                pins.remove_links(each.path)
                log.info("waypoint_cgroup_vanished", cgroup_id=each.cgroup_id)
        self._held.keep({each.cgroup_id for each in found})

    def _pin_again(self, links: pins.CgroupLinks) -> None:
        """What is attached and has lost its pin. OSError."""
        links.path.mkdir(exist_ok=True)
        if again := self._held.pin_again(links.cgroup_id, links.path, _HOOKS):
            log.warning("hooks_pinned_again", waypoint_cgroup_id=links.cgroup_id, hooks=again)

    def enroll(self, cgroup_fd: int, netns_fd: int | None) -> None:
        """Again is no error. Without the namespace there are no fronts. EnrollmentError."""
        cgroup_id = cgroups.id_of(cgroup_fd)
        found = pins.cgroup_links(self._links, cgroup_id, None)
        try:
            self._pin_again(found)
            attached = pinned.attach_missing(found.path, WAYPOINT_HOOKS, self._programs, cgroup_fd)
            if netns_fd is not None:
                attached += self._attach_front(found, netns_fd)
        except OSError as error:
            raise EnrollmentError(f"cgroup {cgroup_id}: {error.strerror or error}") from error
        if attached:
            log.info("waypoint_cgroup_enrolled", cgroup_id=cgroup_id, programs=attached)
        self._held.hold(cgroup_id, found.path, _HOOKS)

    def _attach_front(self, links: pins.CgroupLinks, netns_fd: int) -> list[str]:
        """Waypoints may have moved to another namespace since."""
        pin = links.path / FRONT_HOOK.program
        if pinned.target(pin) not in (0, os.fstat(netns_fd).st_ino):
            self._held.drop(links.cgroup_id, FRONT_HOOK)
            pin.unlink()
        return pinned.attach_missing(links.path, (FRONT_HOOK,), self._programs, netns_fd)

    def put_front(self, front: Front, listening: list[int]) -> list[int]:
        """Sockets first: an instance that a front names is one that takes connections.

        Returns the instances whose sockets the kernel does not have. EnrollmentError.
        """
        if len(listening) != len(front.listening):
            raise EnrollmentError(f"front: {len(listening)} descriptors came, not {len(front.listening)}")
        if len(front.instances) > INSTANCES_MAX:
            raise EnrollmentError(f"front: {len(front.instances)} instances, more than {INSTANCES_MAX}")
        try:
            key = FRONT_KEY.pack(ip_from_text(front.address), front.port)
            for port, socket_fd in zip(front.listening, listening, strict=True):
                _keep_syns(socket_fd)
                self._listeners.put(_port(port), socket_fd.to_bytes(8, "little"))
            if front.instances:
                ports = b"".join(port.to_bytes(2, "little") for port in front.instances)
                self._fronts.put(key, FRONT_VALUE.pack(len(front.instances), ports))
            else:
                self._fronts.remove(key)
        except (ValueError, OverflowError, struct.error, OSError) as error:
            is_full = isinstance(error, OSError) and error.errno == errno.E2BIG
            why = "no room for more fronts, or listening sockets, on this node" if is_full else error
            raise EnrollmentError(f"front {front.address}:{front.port}: {why}") from error
        return [port for port in front.instances if not self._has_listener(port)]

    def keep_fronts(self, fronts: list[tuple[str, int]]) -> None:
        """These alone. EnrollmentError."""
        try:
            kept = {FRONT_KEY.pack(ip_from_text(address), port) for address, port in fronts}
            for key in [key for key, _ in self._fronts.items() if key not in kept]:
                self._fronts.remove(key)
                address, port = FRONT_KEY.unpack(key)
                log.info("front_removed", address=ip_to_text(address), port=port)
        except (ValueError, struct.error, libbpf.KernelError) as error:
            raise EnrollmentError(f"fronts: {error}") from error

    def _has_listener(self, port: int) -> bool:
        return libbpf.lookup(self._listeners.fd, _port(port), COOKIE_BYTES) is not None


def _keep_syns(socket_fd: int) -> None:
    """What other nodes say is in the SYN (bpf/handoff_option.h). Of what listens already, too."""
    with socket.socket(fileno=os.dup(socket_fd)) as listening:
        listening.setsockopt(socket.IPPROTO_TCP, _TCP_SAVE_SYN, 1)


def _port(number: int) -> bytes:
    return number.to_bytes(4, "little")
