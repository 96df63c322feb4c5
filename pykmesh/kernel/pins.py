"""The pin directory of an instance: where it lies, who holds it, and taking all of it away.

    <pin_dir>/maps/<name>@<layout hash>                      maps
    <pin_dir>/links/<cgroup id>[@<netns cookie>]/<program>   attachments
    <pin_dir>/next/<name>@<layout hash>                      maps of another release, while they are filled

The name of a cgroup's links carries the cookie of its network namespace once that is known: bpffs has
no files to keep it in, and several cgroups (a pod's containers) may share one namespace.

Exit never tears down: only `uninstall` does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from pykmesh.files import lock_holder
from pykmesh.kernel import libbpf

_libc = ctypes.CDLL(None, use_errno=True)
BPFFS_MAGIC: Final = 0xCAFE4A11
_STATFS_LONGS: Final = 32
"""A `struct statfs`, the first of whose fields is the type, and more."""
SYSTEM: Final = Path("/sys/fs/bpf")
_LINKS_NAME: Final = re.compile(r"([1-9][0-9]{0,19})(?:@([1-9][0-9]{0,19}))?")


class PinDirectoryError(Exception):
    """The pin directory cannot be used; the text says why and what to do."""


class Removed(NamedTuple):
    links: int
    maps: int


class CgroupLinks(NamedTuple):
    """The directory of one cgroup's links; the cookie is None while no namespace of its own is known."""

    path: Path
    cgroup_id: int
    netns_cookie: int | None


class LinkNames(NamedTuple):
    """What is in `links/`: the cgroups', by id, and what is not ours."""

    cgroups: list[CgroupLinks]
    strays: list[Path]


def maps_dir(pin_dir: Path) -> Path:
    return pin_dir / "maps"


def links_dir(pin_dir: Path) -> Path:
    return pin_dir / "links"


def waypoints_dir(pin_dir: Path) -> Path:
    """Links to the cgroups of waypoints."""
    return pin_dir / "waypoints"


def staging_dir(pin_dir: Path) -> Path:
    """Maps that are being made ready; there for that moment alone."""
    return pin_dir / "next"


def are_there(pin_dir: Path) -> bool:
    """An instance's programs or maps are pinned."""
    return any(True for part in _parts(pin_dir) for _ in part.glob("*"))


def is_bpffs(path: Path) -> bool:
    """True when the nearest directory that exists lies on a bpffs."""
    found = (ctypes.c_long * _STATFS_LONGS)()
    if _libc.statfs(os.fsencode(_nearest(path)), found):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return int(found[0]) == BPFFS_MAGIC


def is_read_only(path: Path) -> bool:
    """True when the nearest directory that exists lies on a file system that takes no change."""
    return bool(os.statvfs(_nearest(path)).f_flag & os.ST_RDONLY)


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def cgroup_links(links: Path, cgroup_id: int, netns_cookie: int | None) -> CgroupLinks:
    name = str(cgroup_id) if netns_cookie is None else f"{cgroup_id}@{netns_cookie}"
    return CgroupLinks(links / name, cgroup_id, netns_cookie)


def read_links(links: Path) -> LinkNames:
    """Of two directories with one cgroup's id, the one with more pins is the cgroup's."""
    found, strays = dict[int, CgroupLinks](), []
    for path in sorted(links.glob("*"), key=lambda path: -_pin_count(path)):
        match = _LINKS_NAME.fullmatch(path.name)
        cgroup_id, cookie = (int(number or 0) for number in match.groups()) if match else (0, 0)
        if not match or max(cgroup_id, cookie) >> 64 or cgroup_id in found or not path.is_dir():
            strays.append(path)
        else:
            found[cgroup_id] = CgroupLinks(path, cgroup_id, cookie or None)
    return LinkNames([found[cgroup_id] for cgroup_id in sorted(found)], sorted(strays))


def _pin_count(directory: Path) -> int:
    return sum(1 for _ in directory.glob("*"))


def is_prepared(pin_dir: Path) -> bool:
    """Whether it is as `prepare` makes it."""
    return is_bpffs(pin_dir) and all(part.is_dir() for part in _parts(pin_dir))


def prepare(pin_dir: Path) -> bool:
    """Makes the directory, on a bpffs that is mounted where there is none. True when it was mounted here.

    A path below /sys/fs/bpf gets the bpffs there, where every tool looks for it; any other path is
    itself its mount point, and must be new or empty: what lies in it would be hidden. When it fails,
    nothing is left mounted or made. PinDirectoryError.
    """
    pin_dir = pin_dir.resolve()
    parts = (*_parts(pin_dir), pin_dir)
    with contextlib.ExitStack() as undo, _told(pin_dir):
        undo.callback(_remove_empty, [path for path in (*parts, *pin_dir.parents) if not path.exists()])
        mounted = not is_bpffs(pin_dir)
        if mounted:
            undo.callback(_unmount, _mount_for(pin_dir))
        for directory in reversed(parts):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)  # who may open one may lock it, too
        undo.pop_all()
    return mounted


@contextlib.contextmanager
def _told(pin_dir: Path) -> Iterator[None]:
    """Errors as PinDirectoryError."""
    try:
        yield
    except OSError as error:
        raise PinDirectoryError(f"pin directory {pin_dir}: {error.strerror}") from error


def _mount_for(pin_dir: Path) -> Path:
    """Mounts the bpffs that a pin directory lies on; returns where."""
    at = pin_dir
    if SYSTEM in pin_dir.parents:
        at = SYSTEM
    else:
        at.mkdir(parents=True, exist_ok=True)
        if any(at.iterdir()):
            raise PinDirectoryError(
                f"pin directory {at} is not empty, and the bpffs mounted there would hide what it holds: "
                f"name a directory that is new or empty, or one on a bpffs"
            )
    _run("mount", "-t", "bpf", "bpf", str(at), what=f"mount a bpffs for {pin_dir}")
    return at


def _unmount(at: Path) -> None:
    _run("umount", str(at), what=f"unmount the bpffs at {at}")


def _run(*command: str, what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PinDirectoryError(f"{what}: {result.stderr.strip()}")


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def lock(pin_dir: Path) -> int:
    """Holds the directory for as long as the descriptor is open. A second holder gets PinDirectoryError."""
    fd = os.open(pin_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise PinDirectoryError(
            f"{pin_dir} is held by another bpf_loader (pid {lock_holder(pin_dir)}): one instance, one loader"
        ) from error
    return fd


def uninstall(pin_dir: Path) -> Removed:
    """Detaches every program, removes every pin of an instance and unmounts the bpffs of its own.

    What is not there is no error; what is not the instance's stays, and is told by PinDirectoryError.
    """
    pin_dir = pin_dir.resolve()
    if not pin_dir.exists():
        return Removed(0, 0)
    held = lock(pin_dir)
    try:
        removed = _remove_pins(pin_dir)
    finally:
        os.close(held)
    _remove_directory(pin_dir)
    return removed


def _remove_pins(pin_dir: Path) -> Removed:
    links = maps = 0
    for directory in (links_dir(pin_dir), waypoints_dir(pin_dir)):
        for each in read_links(directory).cgroups:
            links += remove_links(each.path)
    for directory in (maps_dir(pin_dir), staging_dir(pin_dir)):
        for pin in directory.glob("*"):
            pin.unlink()
            maps += 1
    _remove_empty([staging_dir(pin_dir)])
    for directory in (*_parts(pin_dir), pin_dir):
        _check_empty(directory, but=set(_parts(pin_dir)))
    _remove_empty(list(_parts(pin_dir)))
    return Removed(links, maps)


def _parts(pin_dir: Path) -> tuple[Path, ...]:
    return links_dir(pin_dir), waypoints_dir(pin_dir), maps_dir(pin_dir)


def _check_empty(directory: Path, but: set[Path]) -> None:
    """Names with a dot are the kernel's own, in the root of each bpffs (kernel/bpf/inode.c)."""
    others = sorted(path.name for path in directory.glob("*") if path not in but and "." not in path.name)
    if others:
        raise PinDirectoryError(
            f"{directory} holds what is not the instance's: {', '.join(others)}; remove it, then try again"
        )


def _remove_directory(pin_dir: Path) -> None:
    if SYSTEM in pin_dir.parents:
        _remove_empty([pin_dir, pin_dir.parent])
    elif pin_dir != SYSTEM:
        if pin_dir.is_mount() and is_bpffs(pin_dir):
            _unmount(pin_dir)
        with _told(pin_dir):
            pin_dir.rmdir()


def remove_others(links: Path, programs: Collection[str]) -> list[str]:
    """Detaches what is attached under other programs' names, which another release had; returns these.

    Of cgroups alone to which all of these are attached: until then those of before do what there is to do.
    """
    others = [
        pin
        for each in read_links(links).cgroups
        if all((each.path / program).exists() for program in programs)
        for pin in each.path.glob("*")
        if pin.name not in programs
    ]
    for pin in others:
        _detach(pin)
    return sorted({pin.name for pin in others})


def _detach(pin: Path) -> None:
    with contextlib.suppress(libbpf.KernelError), libbpf.closing(libbpf.obj_get(str(pin))) as fd:
        libbpf.link_detach(fd)
    pin.unlink(missing_ok=True)


def remove_links(directory: Path) -> int:
    """Detaches and unpins the links of one cgroup, what rewrites before what undoes a rewrite."""
    pins = sorted(directory.glob("*"), key=lambda pin: (not pin.name.startswith("pykmesh_conn"), pin.name))
    for pin in pins:
        _detach(pin)
    directory.rmdir()
    return len(pins)
