"""cgroup v2: where it is mounted, which cgroup is whose, and whose programs stand in the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from pykmesh.kernel import libbpf
from pykmesh.kernel.hooks import HOOKS, instance_of

_GONE: Final = {errno.ENOENT, errno.ENODEV}
_T = TypeVar("_T")


class CgroupError(Exception):
    """A cgroup cannot be used; the text says which and why."""


class Standing(NamedTuple):
    """Programs of an instance on a cgroup."""

    path: Path
    instance: str


def find_root(mounts: Path = Path("/proc/self/mounts")) -> Path:
    """Where cgroup v2 is mounted, pure or beside v1 (hybrid)."""
    for line in mounts.read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where.replace("\\040", " "))
    raise CgroupError(
        "no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup (or boot without cgroup v1)"
    )


def of_process(root: Path, pid: int | str = "self") -> Path:
    """The v2 cgroup of a process."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return root / line[3:].lstrip("/")
    raise CgroupError(f"process {pid} is in no v2 cgroup")


def id_of(path_or_fd: Path | int) -> int:
    """The cgroup's id, which is its directory's inode number (kernfs)."""
    return os.stat(path_or_fd).st_ino  # noqa: PTH116  (descriptors too)


def is_at(path: Path, cgroup_id: int) -> bool:
    """Whether the cgroup of an id is at a path: a cgroup v2 keeps its path and its id for life."""
    return _unless_gone(lambda: id_of(path) == cgroup_id, otherwise=False)


def paths_of(root: Path, cgroup_ids: Collection[int]) -> dict[int, Path]:
    """Where cgroups are, found in one walk; without those that are gone."""
    wanted, found = set(cgroup_ids), dict[int, Path]()
    if wanted:
        for path, cgroup_id in _with_descendants(root):
            if cgroup_id in wanted:
                found[cgroup_id] = Path(path)
            if len(found) == len(wanted):
                break
    return found


def path_of(root: Path, cgroup_id: int) -> Path | None:
    """The cgroup of an id; None when it is gone."""
    return paths_of(root, [cgroup_id]).get(cgroup_id)


def with_descendants(path: Path) -> Iterator[Path]:
    """A cgroup and all below it; none of it when it is gone."""
    return (Path(found) for found, _ in _with_descendants(path))


def contains(outer: Path, inner: Path) -> bool:
    return outer == inner or outer in inner.parents


def _unless_gone(read: Callable[[], _T], otherwise: _T) -> _T:
    """What `read` returns, or `otherwise` when what it reads was removed meanwhile."""
    try:
        return read()
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return otherwise


def _with_descendants(path: Path) -> Iterator[tuple[str, int]]:
    """A cgroup and all below it, with their ids; what is removed meanwhile is passed over."""
    own = _unless_gone(partial(id_of, path), otherwise=None)
    if own is None:
        return
    yield str(path), own
    waiting = [str(path)]
    while waiting:
        for entry in _children(waiting.pop()):
            yield entry.path, entry.inode()
            waiting.append(entry.path)


def _children(path: str) -> list[os.DirEntry[str]]:
    def read() -> list[os.DirEntry[str]]:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]

    return _unless_gone(read, otherwise=[])


def _ancestors(root: Path, path: Path) -> Iterator[Path]:
    while path != root and root in path.parents:
        path = path.parent
        yield path


def _instances_at(path: Path) -> set[str]:
    names = (_unless_gone(partial(instance_of, i), otherwise=None) for i in _programs_at(path))
    return {name for name in names if name is not None}


def _programs_at(path: Path) -> set[int]:
    def read() -> set[int]:
        with libbpf.closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY)) as fd:
            return {i for hook in HOOKS for i in libbpf.query_programs(fd, hook.attach_type, effective=False)}

    return _unless_gone(read, otherwise=set())


def standing_around(root: Path, path: Path) -> list[Standing]:
    """Who has programs on the cgroup, above it or below it."""
    places = [*with_descendants(path), *_ancestors(root, path)]
    return [Standing(place, instance) for place in places for instance in sorted(_instances_at(place))]
