"""Which cgroups are enrolled. The truth is in the kernel: pinned links and the map of pods.

Invariant: a cgroup has all hooks or none. Attaching goes in the order of `HOOKS` and is taken back
when a hook fails; the pod's entry is written before the first hook and removed after the last. What
others take away (a pin, a link) the sweep puts back.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

import structlog

from pykmesh.contracts.enrollment import Enrolled, EnrollmentError
from pykmesh.kernel import cgroups, libbpf, pins
from pykmesh.kernel.hooks import HOOKS, Programs, count_pinned
from pykmesh.kernel.netns import own_cookie
from pykmesh.kernel.pins import CgroupLinks
from pykmesh.kernel.records import NO_IP, ip_to_text, network_id
from services.bpf_loader import netns, pinned
from services.bpf_loader.netns import Namespace
from services.bpf_loader.pods import Pod, Pods

log = structlog.get_logger(__name__)


class Enrollment:
    """Enrols cgroups with the programs that are loaded now.

    Blocks, and is not for concurrent use: callers take turns, in threads. Only `shown`, what was
    enrolled after the last change or sweep, may be read at any time.
    """

    def __init__(
        self, pin_dir: Path, cgroup_root: Path, instance: str, network: str, programs: Programs
    ) -> None:
        self._links = pins.links_dir(pin_dir)
        self._root = cgroup_root
        self._instance = instance
        self._programs = programs
        self._pods = Pods(pins.maps_dir(pin_dir), network_id(network))
        self._held = pinned.Held()
        self._paths: dict[int, Path] = {}
        self._told: set[tuple[str, str]] = set()
        self.shown: list[Enrolled] = []

    def close(self) -> None:
        """What is attached stays."""
        self._pods.close()
        self._held.close()

    def adopt(self) -> int:
        """Goes on from what is there: returns how many links got the programs loaded now."""
        self.complete()
        updated = self.exchange()
        self.mend()
        return updated

    def mend(self) -> None:
        """All else, after an `exchange`: it takes long."""
        self._adopt_cookies()
        self._revive()
        self.sweep()

    def complete(self) -> None:
        """Before an `exchange`, hooks that the release before did not have: what undoes comes first."""
        if not all((each.path / hook.program).exists() for each in self._all_links() for hook in HOOKS):
            self.mend()

    def exchange(self) -> int:
        """Gives the links that are there the programs loaded now, and looks at nothing else.

        Returns how many links were updated. Each is replaced in one step: nothing is detached. What is not
        as it should be is left to `mend`.
        """
        return sum(
            pinned.adopt(each.path / hook.program, hook, self._programs)
            for each in self._all_links()
            for hook in HOOKS
        )

    def _adopt_cookies(self) -> None:
        """Where the entry of a pod was written and its cookie is not in the name of the links yet."""
        cookies = {pod.cgroup_id: cookie for cookie, pod in self._pods.all().items()}
        for each in self._all_links():
            if each.netns_cookie is None and each.cgroup_id in cookies:
                self._name(each, each.cgroup_id, cookies[each.cgroup_id])

    def _revive(self) -> None:
        """Cgroups whose links somebody removed when no loader was there: their pods' entries are left.

        Of a pod with several cgroups that is one of them: of the others nothing is known any more.
        """
        known = {0, *(each.cgroup_id for each in self._all_links())}
        pods = self._pods.all().items()
        lost = {pod.cgroup_id: cookie for cookie, pod in pods if pod.cgroup_id not in known}
        for cgroup_id, path in cgroups.paths_of(self._root, lost).items():
            links = pins.cgroup_links(self._links, cgroup_id, lost[cgroup_id])
            try:
                self._check_free(path)
                links.path.mkdir(exist_ok=True)
                self._mend(links, path)
            except (EnrollmentError, OSError) as error:
                log.warning("cgroup_not_enrolled_again", cgroup=str(path), error=str(error))
            else:
                log.warning("cgroup_enrolled_again", cgroup=str(path), why="its links were gone")

    def sweep(self) -> int:
        """Clears what is left of cgroups that were removed; mends and completes the others.

        Returns how many were cleared. What cannot be mended is told once and tried again next time.
        """
        self._restore()
        names, told = pins.read_links(self._links), set[tuple[str, str]]()
        for stray in names.strays:
            self._tell(told, "links_stray_left", str(stray))
        paths = self._find(names.cgroups)
        gone = 0
        for each in names.cgroups:
            try:
                gone += self._sweep_one(each, paths.get(each.cgroup_id))
            except OSError as error:
                self._tell(told, "cgroup_not_mended", str(each.path), error=str(error))
        self._told = told
        self._settle()
        return gone

    def _restore(self) -> None:
        """Directories of links that somebody removed: who is to be unenrolled is said to the loader."""
        gone = self._held.without({each.cgroup_id for each in self._all_links()})
        cookies = {pod.cgroup_id: cookie for cookie, pod in self._pods.all().items()} if gone else {}
        for cgroup_id in gone:
            again = pins.cgroup_links(self._links, cgroup_id, cookies.get(cgroup_id))
            try:
                again.path.mkdir()
                hooks = self._held.pin_again(cgroup_id, again.path, HOOKS)
            except OSError as error:  # it stays attached, and is tried again
                log.warning("links_not_made_again", path=str(again.path), error=str(error))
            else:
                log.warning("hooks_pinned_again", cgroup_id=cgroup_id, hooks=hooks)

    def _sweep_one(self, links: CgroupLinks, path: Path | None) -> bool:
        """True when the cgroup is gone. Links decide where there are some: the root may hide their cgroup."""
        if path is not None:
            if again := self._held.pin_again(links.cgroup_id, links.path, HOOKS):
                log.warning("hooks_pinned_again", cgroup=str(path), hooks=again)
            self._mend(links, path)
            self._held.hold(links.cgroup_id, links.path, HOOKS)
            self._learn(links, path)
            return False
        if any(pinned.is_attached(links.path / hook.program) for hook in HOOKS):
            return False
        pins.remove_links(links.path)
        log.info("cgroup_vanished", cgroup_id=links.cgroup_id)
        return True

    def _tell(self, told: set[tuple[str, str]], event: str, where: str, **data: str) -> None:
        """Once for as long as it lasts."""
        told.add((event, where))
        if (event, where) not in self._told:
            log.warning(event, path=where, **data)

    def _mend(self, links: CgroupLinks, path: Path) -> None:
        with libbpf.closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY)) as fd:
            if cgroups.id_of(fd) == links.cgroup_id and (attached := self._attach_missing(fd, links)):
                log.warning("hooks_attached_again", cgroup=str(path), hooks=attached)

    def _attach_missing(self, cgroup_fd: int, found: CgroupLinks) -> list[str]:
        return pinned.attach_missing(found.path, HOOKS, self._programs, cgroup_fd)

    def _learn(self, links: CgroupLinks, path: Path) -> None:
        """The namespace of a cgroup that had no process when it was enrolled, or an entry that was lost.

        An entry without an address is read again: the pod may have got one. So is a first process on the
        host's network: it may be about to leave it.
        """
        known = None if links.netns_cookie is None else self._pods.get(links.netns_cookie)
        if known is not None and known.has_address:
            return
        namespace = _namespace(path, None)
        if namespace is None or namespace == netns.HOST:
            return
        if links.netns_cookie not in (None, namespace.cookie):
            return
        if known is not None and (namespace.address4, namespace.address6) == (NO_IP, NO_IP):
            return
        self._remember(links, links.cgroup_id, namespace)
        log.info("pod_namespace_learnt", cgroup=str(path), netns_cookie=namespace.cookie)

    def enroll(self, cgroup_fd: int, netns_fd: int | None) -> Enrolled:
        """Enrolling again refreshes the pod's namespace and addresses. The descriptors stay the caller's.

        Raises EnrollmentError; then nothing has changed, or (a hook failed) the cgroup has no hooks.
        """
        self._restore()
        cgroup_id, path = cgroups.id_of(cgroup_fd), self._path(cgroup_fd)
        before = self._links_of(cgroup_id)
        if before is None:
            self._check_free(path)
        try:
            own_cookie()
            namespace = _namespace(path, netns_fd)
        except OSError as error:
            raise EnrollmentError(f"cgroup {path}: {error.strerror or error}") from error
        links = self._remember(before, cgroup_id, namespace)
        if links.netns_cookie is None:
            known = "none yet" if namespace is None else "the host's"
            log.warning("pod_without_namespace", cgroup=str(path), known=known, effect="flows have no source")
        try:
            self._attach_missing(cgroup_fd, links)
            if before is None:  # another instance's loader may have looked at the same moment
                self._check_free(path, but=cgroups.Standing(path, self._instance))
        except EnrollmentError:
            self._take_back(links)
            raise
        except OSError as error:
            self._take_back(links)
            raise EnrollmentError(f"cgroup {path}: {error.strerror or error}") from error
        self._held.hold(cgroup_id, links.path, HOOKS)
        log.info("cgroup_enrolled", cgroup=str(path), cgroup_id=cgroup_id)
        self._paths[cgroup_id] = path
        self._settle()
        return next(each for each in self.shown if each.cgroup_id == cgroup_id)

    def _path(self, cgroup_fd: int) -> Path:
        path = Path(f"/proc/self/fd/{cgroup_fd}").readlink()
        if path != self._root and self._root not in path.parents:
            found = cgroups.path_of(self._root, cgroups.id_of(cgroup_fd))
            if found is None:
                raise EnrollmentError(f"{path} is no cgroup below {self._root}")
            path = found
        return path

    def _check_free(self, path: Path, *, but: cgroups.Standing | None = None) -> None:
        if cgroups.contains(path, cgroups.of_process(self._root)):
            raise EnrollmentError(f"cgroup {path} holds the mesh's own processes; it cannot be enrolled")
        for standing in cgroups.standing_around(self._root, path):
            if standing == but:
                continue
            if standing.instance == self._instance:
                raise EnrollmentError(
                    f"cgroup {path}: {standing.path} is enrolled already; they would act twice"
                )
            raise EnrollmentError(
                f"cgroup {path}: programs of instance {standing.instance!r} stand on {standing.path}; "
                f"unenroll it there first"
            )

    def _remember(
        self, before: CgroupLinks | None, cgroup_id: int, namespace: Namespace | None
    ) -> CgroupLinks:
        """Writes the pod's entry, then the directory's name; None keeps the namespace known before."""
        if namespace is None:
            return before or self._name(None, cgroup_id, None)
        if namespace != netns.HOST:
            self._pods.put(namespace, cgroup_id)
        return self._name(before, cgroup_id, namespace.cookie or None)

    def _name(self, before: CgroupLinks | None, cgroup_id: int, cookie: int | None) -> CgroupLinks:
        after = pins.cgroup_links(self._links, cgroup_id, cookie)
        if before is None:
            after.path.mkdir()
        elif before != after:
            before.path.rename(after.path)
        return after

    def unenroll(self, cgroup_fd: int) -> None:
        """Raises EnrollmentError when it is not enrolled."""
        self._restore()
        cgroup_id = cgroups.id_of(cgroup_fd)
        links = self._links_of(cgroup_id)
        if links is None:
            raise EnrollmentError(f"cgroup {self._path(cgroup_fd)} is not enrolled")
        self._take_back(links)
        log.info("cgroup_unenrolled", cgroup_id=cgroup_id)

    def _take_back(self, links: CgroupLinks) -> None:
        if links.netns_cookie is not None:
            self._pods.disown(links.netns_cookie, links.cgroup_id)
        pins.remove_links(links.path)
        self._settle()

    def _settle(self) -> None:
        """After any change: the pods' entries follow the names of the links, and so does what is shown."""
        by_cookie, found = defaultdict(set), self._all_links()
        for each in found:
            if each.netns_cookie is not None:
                by_cookie[each.netns_cookie].add(each.cgroup_id)
        if not_restored := self._held.without({each.cgroup_id for each in found}):
            for cookie, pod in self._pods.all().items():
                if pod.cgroup_id in not_restored:
                    by_cookie[cookie].add(pod.cgroup_id)
        self._pods.settle(by_cookie)
        self._held.keep({each.cgroup_id for each in found})
        self.enrolled()

    def namespaces(self, cookies: Collection[int]) -> dict[int, int]:
        """Descriptors of pods' network namespaces by cookie, for the caller to close.

        They are found by the pods' processes: none is kept here, which would keep the namespace itself.
        """
        links = [each for each in self._all_links() if each.netns_cookie in cookies]
        paths, found = self._find(self._all_links()), dict[int, int]()
        for each in links:
            path, cookie = paths.get(each.cgroup_id), each.netns_cookie
            if path is None or cookie is None or cookie in found:
                continue
            if (fd := netns.of_cookie(path, cookie)) is not None:
                found[cookie] = fd
        return found

    def enrolled(self) -> list[Enrolled]:
        """What is enrolled now; `shown` becomes the same."""
        found, pods = self._all_links(), self._pods.all()
        paths = self._find(found)
        self.shown = [_describe(each, paths.get(each.cgroup_id), pods) for each in found]
        return self.shown

    def _all_links(self) -> list[CgroupLinks]:
        return pins.read_links(self._links).cgroups

    def _links_of(self, cgroup_id: int) -> CgroupLinks | None:
        return next((each for each in self._all_links() if each.cgroup_id == cgroup_id), None)

    def _find(self, links: list[CgroupLinks]) -> dict[int, Path]:
        """Where the cgroups are that are not gone: where they were, or found in one walk for all others."""
        ids = {each.cgroup_id for each in links}
        known = {i: path for i, path in self._paths.items() if i in ids and cgroups.is_at(path, i)}
        self._paths = known | cgroups.paths_of(self._root, ids - known.keys())
        return self._paths


def _namespace(cgroup: Path, netns_fd: int | None) -> Namespace | None:
    """The one given, or else that of the cgroup's first process; None while there is none. OSError."""
    if netns_fd is not None:
        return netns.inspect(netns_fd)
    found = netns.of_first_process(cgroup)
    if found is None:
        return None
    with libbpf.closing(found):
        return netns.inspect(found)


def _describe(links: CgroupLinks, path: Path | None, pods: dict[int, Pod]) -> Enrolled:
    pod = None if links.netns_cookie is None else pods.get(links.netns_cookie)
    return Enrolled(
        cgroup_id=links.cgroup_id,
        path=str(path) if path else None,
        programs=count_pinned(links.path),
        netns_cookie=links.netns_cookie,
        address4=ip_to_text(pod.address4) if pod and pod.address4 != NO_IP else None,
        address6=ip_to_text(pod.address6) if pod and pod.address6 != NO_IP else None,
    )
