"""cgroup v2: where it is mounted, which cgroup is whose, and whose programs stand in the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pykmesh.kernel import libbpf
from pykmesh.kernel.hooks import HOOKS, instance_of


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


def path_of(root: Path, cgroup_id: int) -> Path | None:
    """The cgroup of an id; None when it is gone."""
    for directory in _with_descendants(root):
        if directory.stat().st_ino == cgroup_id:
            return directory
    return None


def contains(outer: Path, inner: Path) -> bool:
    return outer == inner or outer in inner.parents


def _with_descendants(path: Path) -> Iterator[Path]:
    yield path
    try:
        children = [Path(entry.path) for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for child in children:
        yield from _with_descendants(child)


def _ancestors(root: Path, path: Path) -> Iterator[Path]:
    while path != root and root in path.parents:
        path = path.parent
        yield path


def _instances_at(path: Path) -> set[str]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return set()
    with libbpf.closing(fd):
        ids = {i for hook in HOOKS for i in libbpf.query_programs(fd, hook.attach_type, effective=False)}
    return {name for i in ids if (name := instance_of(i)) is not None}


def standing_around(root: Path, path: Path) -> list[Standing]:
    """Who has programs on the cgroup, above it or below it."""
    places = [path, *_ancestors(root, path), *list(_with_descendants(path))[1:]]
    return [Standing(place, instance) for place in places for instance in sorted(_instances_at(place))]
