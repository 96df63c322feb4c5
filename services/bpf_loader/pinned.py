"""One program's pinned link to a cgroup or a network namespace: made, checked, given another program."""

from __future__ import annotations

import errno
from pathlib import Path

from pykmesh.kernel import libbpf
from pykmesh.kernel.hooks import Hook, Programs


def attach_missing(directory: Path, hooks: tuple[Hook, ...], programs: Programs, target_fd: int) -> list[str]:
    """Attaches the hooks that have no pin, or whose link was detached; returns their programs."""
    missing = [hook for hook in hooks if not is_attached(directory / hook.program)]
    for hook in missing:
        pin = directory / hook.program
        pin.unlink(missing_ok=True)
        with libbpf.closing(libbpf.link_create(programs.fds[hook], target_fd, hook.attach_type)) as link:
            libbpf.obj_pin(link, str(pin))
    return [hook.program for hook in missing]


def is_attached(pin: Path) -> bool:
    """A link outlives its pin and its target; this one has both."""
    return target(pin) != 0


def target(pin: Path) -> int:
    """The id of a link's cgroup, or its namespace's inode number; 0 when one of them is gone."""
    try:
        with libbpf.closing(libbpf.obj_get(str(pin))) as fd:
            return libbpf.link_info(fd)[1]
    except libbpf.KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        return 0


def adopt(pin: Path, hook: Hook, programs: Programs) -> int:
    """Gives a link the program that is loaded now, in one step. Returns how many were updated: 1 or 0."""
    if not pin.exists():
        return 0
    with libbpf.closing(libbpf.obj_get(str(pin))) as fd:
        attach_type = libbpf.link_info(fd)[2]
        if attach_type != hook.attach_type:
            raise libbpf.KernelError(22, f"{pin} is attached as type {attach_type}, not {hook.attach_type}")
        try:
            libbpf.link_update(fd, programs.fds[hook])
        except libbpf.KernelError as error:
            if error.errno != errno.ENOLINK:  # its target went just now
                raise
            return 0
    return 1
