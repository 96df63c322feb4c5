"""The cgroups in which waypoints' Envoys run: connections there are told what they are for (bpf/waypoint.h).

As with pods the truth is in the kernel: a directory of pinned links for each cgroup, named after its id.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from pykmesh.contracts.enrollment import EnrollmentError
from pykmesh.kernel import cgroups, pins
from pykmesh.kernel.hooks import WAYPOINT_HOOKS, Programs
from services.bpf_loader import pinned

log = structlog.get_logger(__name__)


class Waypoints:
    """Blocks, and is not for concurrent use."""

    def __init__(self, pin_dir: Path, programs: Programs) -> None:
        self._links = pins.waypoints_dir(pin_dir)
        self._programs = programs

    def adopt(self) -> int:
        """Gives the links that are there the programs loaded now; returns how many."""
        self.sweep()
        found = pins.read_links(self._links).cgroups
        return sum(
            pinned.adopt(each.path / hook.program, hook, self._programs)
            for each in found
            for hook in WAYPOINT_HOOKS
        )

    def sweep(self) -> None:
        """Clears what is left of cgroups that were removed."""
        for each in pins.read_links(self._links).cgroups:
            if not any(pinned.is_attached(each.path / hook.program) for hook in WAYPOINT_HOOKS):
                pins.remove_links(each.path)
                log.info("waypoint_cgroup_vanished", cgroup_id=each.cgroup_id)

    def enroll(self, cgroup_fd: int) -> None:
        """Again is no error. EnrollmentError when the kernel refuses."""
        cgroup_id = cgroups.id_of(cgroup_fd)
        found = pins.cgroup_links(self._links, cgroup_id, None)
        try:
            found.path.mkdir(exist_ok=True)
            attached = pinned.attach_missing(found.path, WAYPOINT_HOOKS, self._programs, cgroup_fd)
        except OSError as error:
            raise EnrollmentError(f"cgroup {cgroup_id}: {error.strerror or error}") from error
        if attached:
            log.info("waypoint_cgroup_enrolled", cgroup_id=cgroup_id)
