"""The loader's own work: the pin directory, and enrolment while cgroups, pins and processes come and go."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from pykmesh.contracts.enrollment import Action, Enrolled, EnrollmentError, Front, Reply, Request, ask
from pykmesh.contracts.settings import LoaderSettings
from pykmesh.demo.pods import Pod, PodNetwork
from pykmesh.kernel import cgroups, hooks, libbpf, netns, pins, support
from pykmesh.kernel.hooks import FRONT_HOOK, HOOKS, WAYPOINT_HOOKS, Programs, ProgramSettings, can_set_retval
from pykmesh.kernel.layout import map_names
from pykmesh.kernel.pins import PinDirectoryError
from pykmesh.kernel.upgrade import Gate, MovedOnError, pin_again
from pykmesh.process import Runtime
from services.bpf_loader import app, enrollment, pinned
from services.bpf_loader.door import Door
from services.bpf_loader.enrollment import Enrollment
from services.bpf_loader.waypoints import Waypoints
from tests.mesh.node import until

pytestmark = pytest.mark.kernel

ROOT = cgroups.find_root()
PIN = HOOKS[-1].program


def pinned_id(path: Path) -> int:
    with libbpf.closing(libbpf.obj_get(str(path))) as fd:
        return libbpf.map_id(fd)


class Loader:
    """An enrolment with its programs, pods to enrol, and what the kernel says of them."""

    def __init__(self, pin_dir: Path, programs: Programs, network: PodNetwork) -> None:
        self.pin_dir, self.programs, self.network = pin_dir, programs, network
        self.links = pins.links_dir(pin_dir)
        self.enrollment = self.again()

    def again(self) -> Enrollment:
        """As one that has just started."""
        self.enrollment = Enrollment(self.pin_dir, ROOT, "loader-test", "", self.programs)
        return self.enrollment

    def enroll(self, cgroup: Path, namespace: Path | None = None) -> Enrolled:
        fds = [os.open(path, os.O_RDONLY) for path in (cgroup, namespace) if path]
        try:
            return self.enrollment.enroll(fds[0], fds[1] if namespace else None)
        finally:
            for fd in fds:
                os.close(fd)

    def unenroll(self, cgroup: Path) -> None:
        with libbpf.closing(os.open(cgroup, os.O_RDONLY)) as fd:
            self.enrollment.unenroll(fd)

    def pods(self) -> dict[int, int]:
        """Cookies of the map's entries, with the cgroup that each one names."""
        return {cookie: pod.cgroup_id for cookie, pod in self.enrollment._pods.all().items()}

    def names(self) -> list[str]:
        return sorted(path.name for path in self.links.iterdir())

    def clear(self) -> None:
        for path in self.links.iterdir():
            pins.remove_links(path)
        self.enrollment.sweep()
        assert self.pods() == {}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Programs]]:
    pin_dir = tmp_path_factory.mktemp("loader") / "pins"
    pins.prepare(pin_dir)
    try:
        settings = ProgramSettings("loader-test", 0, can_set_retval(), has_telemetry=False)
        loaded = Programs(pins.maps_dir(pin_dir), {"flows": 65536}, settings)
        yield pin_dir, loaded
        loaded.close()
    finally:
        pins.uninstall(pin_dir)


def test_where_the_object_does_not_load_the_one_for_old_kernels_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, pin_dir = tmp_path / "broken.o", tmp_path / "pins"
    broken.write_bytes(b"no object")
    monkeypatch.setattr(hooks, "OBJECT", broken)
    pins.prepare(pin_dir)
    try:
        settings = ProgramSettings("loader-old", 0, can_set_retval(), has_telemetry=True)
        loaded = Programs(pins.maps_dir(pin_dir), {"flows": 65536}, settings)
        assert len(loaded.fds) == len((*HOOKS, *WAYPOINT_HOOKS, FRONT_HOOK))
        loaded.close()
        monkeypatch.setattr(hooks, "OBJECT_BEFORE_5_13", broken)
        with pytest.raises(libbpf.KernelError, match=re.escape(f"open {broken}")):
            Programs(pins.maps_dir(pin_dir), {"flows": 65536}, settings)
    finally:
        pins.uninstall(pin_dir)


@contextlib.contextmanager
def programs_of(instance: str, pin_dir: Path, **sizes: int) -> Iterator[Programs]:
    """Another instance's, with pins of their own."""
    pins.prepare(pin_dir)
    try:
        settings = ProgramSettings(instance, 0, can_set_retval(), has_telemetry=False)
        loaded = Programs(pins.maps_dir(pin_dir), {"flows": 65536, **sizes}, settings)
        yield loaded
        loaded.close()
    finally:
        pins.uninstall(pin_dir)


def test_a_front_for_which_there_is_no_room_is_told_and_the_others_stay(tmp_path: Path) -> None:
    pin_dir = tmp_path / "pins"
    with programs_of("loader-full", pin_dir, fronts=1, listeners=2) as loaded:
        waypoints = Waypoints(pin_dir, loaded)
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            ports = [each.getsockname()[1] for each in sockets]
            first, second, third = ([each.fileno()] for each in sockets)
            assert waypoints.put_front(Front("10.0.0.1", 80, ports[:1], ports[:1]), first) == []
            with pytest.raises(EnrollmentError, match=r"front 10\.0\.0\.2:80: no room for more fronts"):
                waypoints.put_front(Front("10.0.0.2", 80, ports[1:2], ports[1:2]), second)
            with pytest.raises(EnrollmentError, match="no room for more fronts, or listening sockets"):
                waypoints.put_front(Front("10.0.0.1", 80, ports[2:], ports[2:]), third)
            assert waypoints.put_front(Front("10.0.0.1", 80, ports[:1]), []) == []
            waypoints.put_front(Front("10.0.0.1", 80), [])
            assert waypoints.put_front(Front("10.0.0.2", 80, ports[1:2]), []) == []


@pytest.fixture
def loader(programs: tuple[Path, Programs]) -> Iterator[Loader]:
    with PodNetwork(f"l-{secrets.token_hex(3)}", ROOT, "10.109.0", "fd6d:") as network:
        loader = Loader(*programs, network)
        try:
            yield loader
        finally:
            loader.clear()


@pytest.fixture
def pod(loader: Loader) -> Pod:
    return loader.network.add("pod", 10)


def programs_at(cgroup: Path, attach_type: int) -> list[int]:
    with libbpf.closing(os.open(cgroup, os.O_RDONLY)) as fd:
        return list(libbpf.query_programs(fd, attach_type, effective=False))


def attached(cgroup: Path) -> int:
    return sum(len(programs_at(cgroup, hook.attach_type)) for hook in HOOKS)


def container(pod: Pod, name: str) -> Path:
    """Another cgroup of the pod, beside its own."""
    cgroup = pod.cgroup.parent / name
    cgroup.mkdir()
    return cgroup


def process_in(pod: Pod) -> None:
    """A process in the pod's cgroup and namespace."""
    process = pod.spawn("sleep", "60")
    until(lambda: Path(f"/proc/{process.pid}/ns/net").stat().st_ino == pod.netns.stat().st_ino, "in the pod")


# Cgroups that come and go


def test_a_cgroup_that_goes_during_the_walk_is_passed_over(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, last = loader.network.cgroup / "a", loader.network.cgroup / "z"
    for path in (outer, outer / "inner", last):
        path.mkdir()
    wanted, scandir = cgroups.id_of(last), os.scandir

    def remove_then_scan(path: str) -> Any:
        if path == str(outer) and outer.exists():
            (outer / "inner").rmdir()
            outer.rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", remove_then_scan)
    assert cgroups.paths_of(loader.network.cgroup, [wanted, 1 << 60]) == {wanted: last}
    assert not outer.exists()
    assert cgroups.path_of(outer, wanted) is None
    assert not cgroups.is_at(outer, wanted)
    assert cgroups.standing_around(ROOT, outer) == []


def test_all_enrolled_cgroups_are_found_in_one_walk_and_the_known_ones_in_none(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [loader.network.add(f"pod-{i}", 10 + i) for i in range(3)]
    for each in several:
        loader.enroll(each.cgroup, each.netns)
    scanned, scandir = list[str](), os.scandir

    def count(path: str) -> Any:
        scanned.append(str(path))
        return scandir(path)

    loader.again()
    monkeypatch.setattr(os, "scandir", count)
    found = loader.enrollment.enrolled()
    assert {entry.path for entry in found} == {str(each.cgroup) for each in several}
    assert scanned.count(str(ROOT)) == 1
    loader.enrollment.enrolled()
    assert scanned.count(str(ROOT)) == 1


def test_the_status_looks_nothing_up(loader: Loader, pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    loader.enroll(pod.cgroup, pod.netns)

    def fail(*_: object) -> None:
        raise AssertionError("the status blocks")

    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(libbpf, "lookup_batch", fail)
    monkeypatch.setattr(libbpf, "probe_helper", fail)
    shown = app._details(LoaderSettings(), loader.enrollment, "EPERM")["enrolled"]
    assert [(entry.path, entry.programs, entry.address4) for entry in shown] == [
        (str(pod.cgroup), len(HOOKS), pod.address4)
    ]


def test_the_status_follows_each_change_and_the_sweep(loader: Loader, pod: Pod) -> None:
    loader.enroll(pod.cgroup, pod.netns)
    other = container(pod, "other")
    loader.enroll(other)
    assert len(loader.enrollment.shown) == 2
    loader.unenroll(other)
    assert [entry.path for entry in loader.enrollment.shown] == [str(pod.cgroup)]
    pod.cgroup.rmdir()
    until(lambda: loader.enrollment.sweep() == 1, "the cgroup cleared")
    assert loader.enrollment.shown == []
    assert (loader.names(), loader.pods()) == ([], {})


def test_a_start_takes_up_what_is_left_of_a_cgroup_that_goes_meanwhile(
    loader: Loader, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader.enroll(pod.cgroup, pod.netns)
    for pin in next(loader.links.iterdir()).iterdir():
        pin.unlink()
    is_at = cgroups.is_at

    def go_then_tell(found: Path, cgroup_id: int) -> dict[int, Path]:
        paths = {cgroup_id: pod.cgroup} if is_at(pod.cgroup, cgroup_id) else {}
        if paths:
            pod.cgroup.rmdir()
        return paths

    monkeypatch.setattr(cgroups, "paths_of", lambda root, ids: {k: v for i in ids for k, v in
                                                                go_then_tell(root, i).items()})  # fmt: skip
    assert loader.again().adopt() == 0
    loader.enrollment.sweep()
    assert loader.names() == []


# The pin directory


def is_mounted(path: Path) -> bool:
    return path.is_mount() and pins.is_bpffs(path)


def test_a_pin_directory_is_its_own_mount_point_and_hides_no_neighbour(tmp_path: Path) -> None:
    neighbour = tmp_path / "neighbour"
    neighbour.write_text("mine")
    pin_dir = tmp_path / "new" / "pins"
    assert pins.prepare(pin_dir)
    try:
        assert is_mounted(pin_dir)
        assert not is_mounted(tmp_path)
        assert neighbour.read_text() == "mine"
        assert not pins.prepare(pin_dir)
    finally:
        assert pins.uninstall(pin_dir) == (0, 0)
    assert not pin_dir.exists()
    assert pins.uninstall(pin_dir) == (0, 0)


def test_a_pin_directory_that_holds_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PinDirectoryError, match="is not empty"):
        pins.prepare(tmp_path)
    assert not tmp_path.is_mount()
    assert (tmp_path / "file").read_text() == "mine"


def test_preparing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(PinDirectoryError, match="not permitted"):
        pins.prepare(tmp_path / "new" / "pins")
    assert list(tmp_path.iterdir()) == []


def test_a_relative_pin_directory_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pins.prepare(Path("pins"))
    assert is_mounted(tmp_path / "pins")
    os.close(pins.lock(Path("pins")))
    pins.uninstall(Path("pins"))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_on_a_bpffs_needs_no_mount_and_uninstall_leaves_that_one(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "bpf", "bpf", str(tmp_path)], check=True)
    try:
        assert not pins.prepare(tmp_path / "pins")
        pins.uninstall(tmp_path / "pins")
        assert is_mounted(tmp_path)
        assert not (tmp_path / "pins").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_uninstall_names_what_is_not_the_instances(tmp_path: Path) -> None:
    pin_dir = tmp_path / "pins"
    pins.prepare(pin_dir)
    (pins.links_dir(pin_dir) / "stranger").mkdir()
    with pytest.raises(PinDirectoryError, match="stranger"):
        pins.uninstall(pin_dir)
    (pins.links_dir(pin_dir) / "stranger").rmdir()
    pins.uninstall(pin_dir)
    assert not pin_dir.exists()


# Namespaces of pods


@pytest.mark.parametrize("first_to_go", ["a", "b"])
def test_the_pods_entry_stays_until_its_last_container_is_unenrolled(
    loader: Loader, pod: Pod, first_to_go: str
) -> None:
    containers = {name: container(pod, name) for name in ("a", "b")}
    entries = [loader.enroll(cgroup, pod.netns) for cgroup in containers.values()]
    assert len(loader.pods()) == 1
    assert {(e.address4, e.netns_cookie) for e in entries} == {(pod.address4, *loader.pods())}
    loader.unenroll(containers.pop(first_to_go))
    (left,) = containers.values()
    assert list(loader.pods().values()) == [cgroups.id_of(left)]
    assert [(entry.path, entry.address4) for entry in loader.enrollment.shown] == [(str(left), pod.address4)]
    loader.unenroll(left)
    assert loader.pods() == {}


def test_the_entry_stays_when_a_container_vanishes(loader: Loader, pod: Pod) -> None:
    gone, left = container(pod, "a"), container(pod, "b")
    for each in (left, gone):
        loader.enroll(each, pod.netns)
    gone.rmdir()
    until(lambda: loader.enrollment.sweep() == 1, "the container cleared")
    assert list(loader.pods().values()) == [cgroups.id_of(left)]


def test_enrolling_with_another_namespace_drops_the_old_entry(loader: Loader, pod: Pod) -> None:
    other = loader.network.add("other", 20)
    before = loader.enroll(pod.cgroup, pod.netns)
    after = loader.enroll(pod.cgroup, other.netns)
    assert before.netns_cookie != after.netns_cookie
    assert (after.address4, after.programs) == (other.address4, len(HOOKS))
    assert list(loader.pods()) == [after.netns_cookie]
    assert loader.names() == [f"{after.cgroup_id}@{after.netns_cookie}"]
    assert attached(pod.cgroup) == len(HOOKS)
    on_host = loader.enroll(pod.cgroup, Path("/proc/self/ns/net"))
    assert (on_host.netns_cookie, loader.pods()) == (None, {})


def test_names_without_a_cookie_get_it_from_the_map_at_the_start(loader: Loader, pod: Pod) -> None:
    before = loader.enroll(pod.cgroup, pod.netns)
    next(loader.links.iterdir()).rename(loader.links / str(before.cgroup_id))
    assert loader.again().adopt() == len(HOOKS)
    assert loader.enrollment.shown == [before]


def test_a_namespace_is_learnt_when_a_process_has_come(loader: Loader, pod: Pod) -> None:
    assert loader.enroll(pod.cgroup).netns_cookie is None
    loader.enrollment.sweep()
    assert loader.pods() == {}
    process_in(pod)
    loader.enrollment.sweep()
    (shown,) = loader.enrollment.shown
    assert (shown.address4, shown.address6) == (pod.address4, pod.address6)
    assert list(loader.pods()) == [shown.netns_cookie]


def test_an_address_that_comes_after_the_enrolment_is_learnt(loader: Loader, pod: Pod) -> None:
    def ip(*words: str) -> None:
        subprocess.run(["ip", "-n", pod.netns.name, *words], check=True)

    ip("address", "flush", "dev", "eth0", "scope", "global")
    process_in(pod)
    before = loader.enroll(pod.cgroup, pod.netns)
    assert (before.address4, before.address6) == (None, None)
    with capture_logs() as logs:
        loader.enrollment.sweep()
    assert (loader.enrollment.shown, logs) == ([before], [])
    ip("address", "add", f"{pod.address4}/16", "dev", "eth0")
    with capture_logs() as logs:
        loader.enrollment.sweep()
        loader.enrollment.sweep()
    assert [entry["event"] for entry in logs] == ["pod_namespace_learnt"]
    (shown,) = loader.enrollment.shown
    assert (shown.address4, shown.netns_cookie) == (pod.address4, before.netns_cookie)


def test_a_process_that_is_still_on_the_hosts_network_is_looked_at_again(loader: Loader, pod: Pod) -> None:
    loader.enroll(pod.cgroup)
    code = 'echo $$ > "$0" && read && exec nsenter --net="$1" sleep 60'
    words = ["bash", "-c", code, str(pod.cgroup / "cgroup.procs"), str(pod.netns)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        try:
            until((pod.cgroup / "cgroup.procs").read_text, "in the cgroup")
            loader.enrollment.sweep()
            assert loader.pods() == {}
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.close()
            inode = pod.netns.stat().st_ino
            until(lambda: Path(f"/proc/{process.pid}/ns/net").stat().st_ino == inode, "in the namespace")
            loader.enrollment.sweep()
            assert len(loader.pods()) == 1
        finally:
            process.kill()


def test_an_entry_that_was_lost_is_written_again(loader: Loader, pod: Pod) -> None:
    process_in(pod)
    before = loader.enroll(pod.cgroup)
    loader.enrollment._pods.settle({})
    assert loader.pods() == {}
    loader.enrollment.sweep()
    assert loader.enrollment.shown == [before]


def test_where_the_kernel_tells_no_cookies_a_program_does(
    loader: Loader, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = loader.enroll(pod.cgroup, pod.netns)
    monkeypatch.setattr("pykmesh.kernel.netns.SO_NETNS_COOKIE", 9999)  # the kernel's own ENOPROTOOPT
    assert loader.enroll(pod.cgroup, pod.netns) == known
    assert [each for each in support.findings(loader.pin_dir) if each.level == "fail"] == []


def test_a_pin_that_is_removed_detaches_nothing_and_is_made_again(loader: Loader, pod: Pod) -> None:
    """Nor where the cgroup's directory is removed with all of them."""
    loader.enroll(pod.cgroup, pod.netns)
    (links,) = loader.links.iterdir()
    for _ in range(2):
        before = {pin.name: pinned.target(pin) for pin in links.iterdir()}
        ids = {i for hook in HOOKS for i in programs_at(pod.cgroup, hook.attach_type)}
        for pin in [*links.iterdir()][:4]:
            pin.unlink()
        assert attached(pod.cgroup) == len(HOOKS)
        loader.enrollment.sweep()
        assert {pin.name: pinned.target(pin) for pin in links.iterdir()} == before
        assert {i for hook in HOOKS for i in programs_at(pod.cgroup, hook.attach_type)} == ids
        loader.enrollment.close()
        loader.again().sweep()
    for pin in links.iterdir():
        pin.unlink()
    links.rmdir()
    shown = loader.enrollment.shown
    other = container(pod, "other")
    loader.enroll(other)  # which is no reason to let go
    loader.unenroll(other)
    loader.enrollment.sweep()
    assert {pin.name: pinned.target(pin) for pin in links.iterdir()} == before
    assert loader.enrollment.shown == shown
    loader.unenroll(pod.cgroup)
    assert attached(pod.cgroup) == 0


def test_a_link_of_another_type_is_put_right_before_it_gets_a_program(loader: Loader, pod: Pod) -> None:
    """Two pins that somebody exchanged: a link update would take either program."""
    loader.enroll(pod.cgroup, pod.netns)
    loader.enrollment.close()
    (links,) = loader.links.iterdir()
    names = ("pykmesh_conn4", "pykmesh_conn6")
    fds = [libbpf.obj_get(str(links / name)) for name in names]
    for name in names:
        (links / name).unlink()
    for fd, name in zip(fds, reversed(names), strict=True):
        libbpf.obj_pin(fd, str(links / name))
        os.close(fd)
    assert loader.again().adopt() == len(HOOKS) - len(names)
    for hook in HOOKS:
        with libbpf.closing(libbpf.obj_get(str(links / hook.program))) as fd:
            assert libbpf.link_info(fd)[2] == hook.attach_type
        # The kernel lets go of what was unpinned a little later.
        until(
            lambda kind=hook.attach_type: len(programs_at(pod.cgroup, kind)) == 1, "one program at each hook"
        )


def test_another_instance_that_enrols_at_the_same_moment_is_seen(
    loader: Loader, pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each looks before the other has attached anything: who looks again and finds the other gives way."""
    pin_dir = tmp_path / "pins"
    with programs_of("loader-other", pin_dir) as other:
        attach = pinned.attach_missing

        def other_first(directory: Path, hooks: Any, programs: Programs, fd: int) -> list[str]:
            if programs is not other and not list(pins.links_dir(pin_dir).iterdir()):
                Enrollment(pin_dir, ROOT, "loader-other", "", other).enroll(fd, None)
            return attach(directory, hooks, programs, fd)

        monkeypatch.setattr(pinned, "attach_missing", other_first)
        with pytest.raises(EnrollmentError, match="programs of instance 'loader-other' stand on"):
            loader.enroll(pod.cgroup, pod.netns)
        assert (loader.names(), loader.pods()) == ([], {})
        assert attached(pod.cgroup) == len(HOOKS)


def test_a_bpffs_that_takes_no_pin_is_told(tmp_path: Path) -> None:
    pin_dir = tmp_path / "pins"
    pins.prepare(pin_dir)
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(pin_dir)], check=True)
        assert support.obstacle(pin_dir) == f"the bpffs at {pin_dir} is read-only: remount it read-write"
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(pin_dir)], check=True)
        pins.uninstall(pin_dir)


def test_a_kernel_of_which_cookies_cannot_be_known_is_told(
    loader: Loader, pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pykmesh.kernel.netns.SO_NETNS_COOKIE", 9999)
    monkeypatch.setattr("pykmesh.kernel.netns.COOKIE_OBJECT", tmp_path / "none.o")
    netns._asker.cache_clear()
    for namespace in (pod.netns, None):
        with pytest.raises(EnrollmentError, match=r"open .*none.o: No such file") as caught:
            loader.enroll(pod.cgroup, namespace)
        assert "\n" not in str(caught.value)
    assert (loader.names(), attached(pod.cgroup)) == ([], 0)
    (found,) = (each for each in support.findings(loader.pin_dir) if each.level == "fail")
    assert found.code == "enrolment"
    assert "SO_NETNS_COOKIE (kernel 5.14) or root" in support.obstacle(loader.pin_dir)


# Pins


@pytest.mark.parametrize("missing", [1, len(HOOKS)])
def test_pins_removed_by_hand_are_attached_again(loader: Loader, pod: Pod, missing: int) -> None:
    """While no loader runs: the kernel takes what nothing holds off its cgroup a moment later."""
    before = loader.enroll(pod.cgroup, pod.netns)
    loader.enrollment.close()
    for hook in HOOKS[-missing:]:
        (next(loader.links.iterdir()) / hook.program).unlink()
    until(lambda: attached(pod.cgroup) == len(HOOKS) - missing, "detached")
    assert loader.again().sweep() == 0
    assert attached(pod.cgroup) == len(HOOKS)
    assert loader.enrollment.shown == [before]


def test_who_lost_all_links_while_no_loader_runs_is_enrolled_again(loader: Loader, pod: Pod) -> None:
    """Its pod's entry says that it was. One whose cgroup has gone has none any more."""
    before = loader.enroll(pod.cgroup, pod.netns)
    other = loader.network.add("other", 20)
    loader.enroll(other.cgroup, other.netns)
    loader.enrollment.close()
    for links in loader.links.iterdir():
        for pin in links.iterdir():
            pin.unlink()
        links.rmdir()
    until(lambda: not attached(pod.cgroup) + attached(other.cgroup), "detached")
    other.cgroup.rmdir()
    loader.again().adopt()
    assert attached(pod.cgroup) == len(HOOKS)
    assert loader.enrollment.shown == [before]
    assert loader.pods() == {before.netns_cookie: before.cgroup_id}
    loader.unenroll(pod.cgroup)
    loader.again().adopt()
    assert attached(pod.cgroup) == 0


def test_of_two_containers_the_one_that_lost_its_links_is_enrolled_again(loader: Loader, pod: Pod) -> None:
    loader.enroll(pod.cgroup, pod.netns)
    cgroup = container(pod, "second")
    second = loader.enroll(cgroup, pod.netns)
    assert loader.pods() == {second.netns_cookie: second.cgroup_id}
    loader.enrollment.close()
    shutil.rmtree(loader.links / f"{second.cgroup_id}@{second.netns_cookie}")
    until(lambda: not attached(cgroup), "detached")
    loader.again().adopt()
    assert attached(pod.cgroup) == attached(cgroup) == len(HOOKS)


def test_who_is_being_unenrolled_is_not_enrolled_again(
    loader: Loader, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader ends when the links are gone, and the pod's entry is not."""
    loader.enroll(pod.cgroup, pod.netns)
    with monkeypatch.context() as patch:
        patch.setattr(loader.enrollment, "_settle", lambda: None)
        loader.unenroll(pod.cgroup)
    assert [*loader.pods().values()] == [0]
    loader.enrollment.close()
    loader.again().adopt()
    assert attached(pod.cgroup) == 0
    assert loader.pods() == {}


@pytest.mark.parametrize("how", ["directories", "bpffs"])
def test_pins_directories_that_are_taken_away_are_made_again_and_writers_begin_anew(
    tmp_path: Path, how: str
) -> None:
    pin_dir = tmp_path / "bpf" / "pins"
    runtime = Runtime("bpf_loader", LoaderSettings(pin_dir=pin_dir, instance="loader-test"))
    found = app.take_over(runtime.settings)
    kept = app._Pinned(runtime, found)
    try:
        writer = Gate(pin_dir)
        writer.opened()
        directories = pins.maps_dir(pin_dir), pins.links_dir(pin_dir), pins.waypoints_dir(pin_dir)
        ids = {path.name: pinned_id(path) for path in directories[0].iterdir()}
        if how == "bpffs":
            subprocess.run(["umount", "--lazy", pin_dir], check=True)
        else:
            for directory in directories:
                shutil.rmtree(directory)
        for _ in range(3):
            kept.keep()
        assert [each["event"] for each in runtime.errors] == [
            "pin_directory_was_missing",
            "pins_were_missing",
        ]
        assert {path.name: pinned_id(path) for path in directories[0].iterdir()} == ids
        with pytest.raises(MovedOnError), writer.writing():
            pytest.fail("it wrote")
        with pytest.raises(PinDirectoryError, match="is held by another bpf_loader"):
            pins.lock(pin_dir)
        writer.close()
    finally:
        kept.close()
        found.enrollment.close()
        found.programs.close()
        pins.uninstall(pin_dir)


def test_the_pods_entry_outlives_links_that_cannot_be_made_again(loader: Loader, pod: Pod) -> None:
    before = loader.enroll(pod.cgroup, pod.netns)
    (links,) = loader.links.iterdir()
    shutil.rmtree(loader.links)
    loader.enrollment.sweep()
    assert attached(pod.cgroup) == len(HOOKS)
    assert loader.pods() == {before.netns_cookie: before.cgroup_id}
    pins.prepare(loader.pin_dir)
    loader.enrollment.sweep()
    assert [*loader.links.iterdir()] == [links]
    assert loader.enrollment.shown == [before]


def test_pins_of_maps_removed_by_hand_are_made_again(loader: Loader, pod: Pod) -> None:
    """The same maps: found by the attached programs that have them, and by who has loaded them."""
    loader.enroll(pod.cgroup, pod.netns)
    directory = pins.maps_dir(loader.pin_dir)
    assert pin_again(loader.pin_dir) == []
    before = {path.name: pinned_id(path) for path in directory.iterdir()}
    for path in directory.iterdir():
        path.unlink()
    of_programs = {*map_names()} - {"flows"}
    assert set(pin_again(loader.pin_dir)) == of_programs
    after = {path.name: pinned_id(path) for path in directory.iterdir()}
    assert after == {name: before[name] for name in before if name.partition("@")[0] in of_programs}
    settings = ProgramSettings("loader-test", 0, can_set_retval(), has_telemetry=False)
    loaded = Programs(directory, {"flows": 65536}, settings)
    before = {path.name: pinned_id(path) for path in directory.iterdir()}
    assert len(before) == len(map_names())
    for path in list(directory.iterdir())[1:]:
        path.unlink()
    assert len(loaded.pin_again(directory)) == len(before) - 1
    assert {path.name: pinned_id(path) for path in directory.iterdir()} == before
    loaded.close()


@pytest.mark.parametrize("how", ["sweep", "adopt"])
def test_links_detached_by_hand_are_attached_again(loader: Loader, pod: Pod, how: str) -> None:
    loader.enroll(pod.cgroup, pod.netns)
    for pin in next(loader.links.iterdir()).iterdir():
        with libbpf.closing(libbpf.obj_get(str(pin))) as fd:
            libbpf.link_detach(fd)
    assert attached(pod.cgroup) == 0
    getattr(loader.again(), how)()
    assert attached(pod.cgroup) == len(HOOKS)


def test_names_that_are_not_ours_are_left_and_told_once(loader: Loader, pod: Pod) -> None:
    own = loader.enroll(pod.cgroup, pod.netns)
    strays = ["stray", f"{own.cgroup_id}@1", "5@", "1" + "0" * 19 + "9", "18446744073709551616"]
    for name in strays:
        (loader.links / name).mkdir()
    libbpf.obj_pin(loader.enrollment._pods._map.fd, str(loader.links / "pin"))
    try:
        with capture_logs() as logs:
            loader.again().adopt()
            loader.enrollment.sweep()
        told = [entry["path"] for entry in logs if entry["event"] == "links_stray_left"]
        assert sorted(told) == sorted(str(loader.links / name) for name in [*strays, "pin"])
        assert loader.enrollment.shown == [own]
        assert attached(pod.cgroup) == len(HOOKS)
    finally:
        (loader.links / "pin").unlink()
        for name in strays:
            (loader.links / name).rmdir()


def test_one_cgroup_that_cannot_be_mended_keeps_no_other_from_it(loader: Loader, pod: Pod) -> None:
    other = loader.network.add("other", 20)
    broken, whole = (loader.enroll(each.cgroup, each.netns) for each in (pod, other))
    names = {each: loader.links / f"{each.cgroup_id}@{each.netns_cookie}" for each in (broken, whole)}
    loader.enrollment.close()
    loader.again()
    for each, directory in zip((pod, other), names.values(), strict=True):
        (directory / PIN).unlink()
        until(lambda e=each: attached(e.cgroup) == len(HOOKS) - 1, "detached")
    (names[broken] / PIN).mkdir()
    try:
        with capture_logs() as logs:
            for _ in range(2):
                loader.enrollment.sweep()
        told = [entry["path"] for entry in logs if entry["event"] == "cgroup_not_mended"]
        assert told == [str(names[broken])]
        assert attached(other.cgroup) == len(HOOKS)
    finally:
        (names[broken] / PIN).rmdir()


# Taking turns


class Recorder:
    """Enrolment whose sweep lasts until it is let go, and which sees who comes meanwhile."""

    def __init__(self) -> None:
        self.sweeping, self.go_on = threading.Event(), threading.Event()
        self.seen: list[str] = []

    def sweep(self) -> int:
        self.seen.append("sweep begins")
        self.sweeping.set()
        assert self.go_on.wait(10)
        self.seen.append("sweep ends")
        return 0

    def enrolled(self) -> list[enrollment.Enrolled]:
        self.seen.append("door")
        return []


@pytest.mark.anyio
async def test_the_door_waits_for_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SWEEP_INTERVAL_S", 0.0)
    recorder: Any = Recorder()
    programs: Any = None
    waypoints = Waypoints(tmp_path, programs)
    turn, socket = anyio.Lock(), tmp_path / "door"
    replies: list[Reply] = []

    async def ask_door() -> None:
        replies.append(await anyio.to_thread.run_sync(ask, socket, Request(Action.LIST), []))
        tasks.cancel_scope.cancel()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app._sweep, [recorder.sweep, waypoints.sweep], turn)
            tasks.start_soon(Door(socket, recorder, waypoints, turn).serve)
            await anyio.to_thread.run_sync(recorder.sweeping.wait, 10)
            tasks.start_soon(ask_door)
            while not turn.statistics().tasks_waiting:
                await anyio.lowlevel.checkpoint()
            recorder.go_on.set()
    assert replies == [Reply()]
    assert recorder.seen[:3] == ["sweep begins", "sweep ends", "door"]
