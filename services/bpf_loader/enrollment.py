"""Which cgroups are enrolled. The truth is in the kernel: pinned links and the map of pods.

Invariant: a cgroup has all hooks or none. Attaching goes in the order of `HOOKS` and is taken back
when a hook fails; the pod's entry is written before the first hook and removed after the last.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import structlog

from pykmesh.contracts.enrollment import Enrolled, EnrollmentError
from pykmesh.kernel import cgroups, libbpf, pins
from pykmesh.kernel.hooks import HOOKS, Hook, Programs
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import NO_IP, POD_KEY, POD_VALUE, Ip, ip_to_text, network_id
from services.bpf_loader import netns

log = structlog.get_logger(__name__)


class Pod(NamedTuple):
    """An entry of the map of pods, without its network."""

    cookie: int
    address4: Ip
    address6: Ip
    cgroup_id: int


class Enrollment:
    """Enrols cgroups with the programs that are loaded now. Not for concurrent use."""

    def __init__(
        self, pin_dir: Path, cgroup_root: Path, instance: str, network: str, programs: Programs
    ) -> None:
        self._links = pins.links_dir(pin_dir)
        self._root = cgroup_root
        self._instance = instance
        self._network = network_id(network)
        self._programs = programs
        self._pods = PinnedMap(pins.maps_dir(pin_dir), "pods")

    def adopt(self) -> int:
        """Gives the links that are there the programs loaded now; clears what is left of cgroups gone.

        Returns how many links were updated. Each is replaced in one step: nothing is detached.
        """
        self.sweep()
        updated = 0
        for directory in self._links.glob("*"):
            for hook in HOOKS:
                updated += self._adopt_link(directory / hook.program, hook)
        return updated

    def _adopt_link(self, pin: Path, hook: Hook) -> int:
        if not pin.exists():
            self._attach(int(pin.parent.name), hook)
            return 1
        with libbpf.closing(libbpf.obj_get(str(pin))) as fd:
            attach_type = libbpf.link_info(fd)[2]
            if attach_type != hook.attach_type:
                raise libbpf.KernelError(
                    22, f"{pin} is attached as type {attach_type}, not {hook.attach_type}"
                )
            libbpf.link_update(fd, self._programs.fds[hook])
        return 1

    def _attach(self, cgroup_id: int, hook: Hook) -> None:
        path = cgroups.path_of(self._root, cgroup_id)
        if path is None:
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        with libbpf.closing(fd):
            self._attach_fd(fd, cgroup_id, hook)

    def _attach_fd(self, cgroup_fd: int, cgroup_id: int, hook: Hook) -> None:
        with libbpf.closing(
            libbpf.link_create(self._programs.fds[hook], cgroup_fd, hook.attach_type)
        ) as link:
            libbpf.obj_pin(link, str(self._links / str(cgroup_id) / hook.program))

    def sweep(self) -> int:
        """Clears what is left of enrolled cgroups that were removed. Returns how many."""
        gone = [directory for directory in self._links.glob("*") if self._is_gone(directory)]
        for directory in gone:
            pins.remove_links(directory)
            self._forget_pod(int(directory.name))
            log.info("cgroup_vanished", cgroup_id=int(directory.name))
        return len(gone)

    @staticmethod
    def _is_gone(directory: Path) -> bool:
        for pin in directory.glob("*"):
            with libbpf.closing(libbpf.obj_get(str(pin))) as fd:
                return libbpf.link_info(fd)[1] == 0
        return True

    def enroll(self, cgroup_fd: int, netns_fd: int | None) -> Enrolled:
        """Raises EnrollmentError; then nothing has changed. Enrolling again refreshes the pod's addresses."""
        cgroup_id, path = cgroups.id_of(cgroup_fd), self._path(cgroup_fd)
        directory = self._links / str(cgroup_id)
        if not directory.exists():
            self._check_free(path)
        self._remember_pod(cgroup_id, netns_fd, path)
        directory.mkdir(exist_ok=True)
        missing = [hook for hook in HOOKS if not (directory / hook.program).exists()]
        try:
            for hook in missing:
                self._attach_fd(cgroup_fd, cgroup_id, hook)
        except OSError as error:
            self._take_back(cgroup_id)
            raise EnrollmentError(f"cgroup {path}: {error.strerror or error}") from error
        log.info("cgroup_enrolled", cgroup=str(path), cgroup_id=cgroup_id)
        return self._describe(cgroup_id)

    def _path(self, cgroup_fd: int) -> Path:
        path = Path(f"/proc/self/fd/{cgroup_fd}").readlink()
        if path != self._root and self._root not in path.parents:
            found = cgroups.path_of(self._root, cgroups.id_of(cgroup_fd))
            if found is None:
                raise EnrollmentError(f"{path} is no cgroup below {self._root}")
            path = found
        return path

    def _check_free(self, path: Path) -> None:
        if cgroups.contains(path, cgroups.of_process(self._root)):
            raise EnrollmentError(f"cgroup {path} holds the mesh's own processes; it cannot be enrolled")
        for standing in cgroups.standing_around(self._root, path):
            if standing.instance == self._instance:
                raise EnrollmentError(
                    f"cgroup {path}: {standing.path} is enrolled already; they would act twice"
                )
            raise EnrollmentError(
                f"cgroup {path}: programs of instance {standing.instance!r} stand on {standing.path}; "
                f"unenroll it there first"
            )

    def _remember_pod(self, cgroup_id: int, netns_fd: int | None, path: Path) -> None:
        if netns_fd is None:
            netns_fd = self._netns_of_first_process(path)
        if netns_fd is None:
            log.warning("pod_without_namespace", cgroup=str(path), effect="its flows have no source")
            return
        try:
            found = netns.inspect(netns_fd)
        except OSError as error:
            raise EnrollmentError(f"cgroup {path}: {error.strerror}") from error
        finally:
            os.close(netns_fd)
        if found.cookie == netns.own_cookie():
            log.info("pod_on_host_network", cgroup=str(path))
            return
        value = POD_VALUE.pack(found.address4, found.address6, self._network, cgroup_id)
        self._pods.put(POD_KEY.pack(found.cookie), value)

    @staticmethod
    def _netns_of_first_process(path: Path) -> int | None:
        for pid in (path / "cgroup.procs").read_text().split():
            try:
                return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            except OSError:
                continue
        return None

    def unenroll(self, cgroup_fd: int) -> None:
        """Raises EnrollmentError when it is not enrolled."""
        cgroup_id = cgroups.id_of(cgroup_fd)
        if not (self._links / str(cgroup_id)).exists():
            raise EnrollmentError(f"cgroup {self._path(cgroup_fd)} is not enrolled")
        self._take_back(cgroup_id)
        log.info("cgroup_unenrolled", cgroup_id=cgroup_id)

    def _take_back(self, cgroup_id: int) -> None:
        pins.remove_links(self._links / str(cgroup_id))
        self._forget_pod(cgroup_id)

    def _forget_pod(self, cgroup_id: int) -> None:
        for pod in self._pods_now():
            if pod.cgroup_id == cgroup_id:
                self._pods.remove(POD_KEY.pack(pod.cookie))

    def _pods_now(self) -> list[Pod]:
        found = []
        for key, value in self._pods.items():
            address4, address6, _, cgroup_id = POD_VALUE.unpack(value)
            found.append(Pod(POD_KEY.unpack(key)[0], address4, address6, cgroup_id))
        return found

    def list(self) -> list[Enrolled]:
        return [self._describe(int(directory.name)) for directory in sorted(self._links.glob("*"))]

    def _describe(self, cgroup_id: int) -> Enrolled:
        path = cgroups.path_of(self._root, cgroup_id)
        pod = next((p for p in self._pods_now() if p.cgroup_id == cgroup_id), None)
        return Enrolled(
            cgroup_id=cgroup_id,
            path=str(path) if path else None,
            programs=len(list((self._links / str(cgroup_id)).glob("*"))),
            netns_cookie=pod.cookie if pod else None,
            address4=ip_to_text(pod.address4) if pod and pod.address4 != NO_IP else None,
            address6=ip_to_text(pod.address6) if pod and pod.address6 != NO_IP else None,
        )
