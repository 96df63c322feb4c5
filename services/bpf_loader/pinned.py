"""One program's pinned link to a cgroup or a network namespace: made, checked, given another program."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection
from pathlib import Path

from pykmesh.kernel import libbpf
from pykmesh.kernel.hooks import Hook, Programs


def attach_missing(directory: Path, hooks: tuple[Hook, ...], programs: Programs, target_fd: int) -> list[str]:
    """Attaches hooks that have no pin, or whose link is detached or of another type; returns their programs.

    A link update does not check the type: such a program would be run for what it is not for.
    """
    missing = [hook for hook in hooks if not _stands(directory / hook.program, hook)]
    for hook in missing:
        pin = directory / hook.program
        pin.unlink(missing_ok=True)
        with libbpf.closing(libbpf.link_create(programs.fds[hook], target_fd, hook.attach_type)) as link:
            libbpf.obj_pin(link, str(pin))
    return [hook.program for hook in missing]


class Held:
    """Descriptors of cgroups' links: what somebody unpins stays attached until it is pinned again."""

    def __init__(self) -> None:
        self._fds: dict[tuple[int, str], int] = {}

    def hold(self, cgroup_id: int, directory: Path, hooks: tuple[Hook, ...]) -> None:
        """Those that are pinned. Without a descriptor to spare it is as if none were held."""
        for hook in hooks:
            key = cgroup_id, hook.program
            if key in self._fds and not libbpf.link_info(self._fds[key])[1]:  # somebody detached it
                os.close(self._fds.pop(key))
            if key not in self._fds:
                with contextlib.suppress(libbpf.KernelError):
                    self._fds[key] = libbpf.obj_get(str(directory / hook.program))

    def pin_again(self, cgroup_id: int, directory: Path, hooks: tuple[Hook, ...]) -> list[str]:
        """Those that are attached and whose pin is gone; returns their programs."""
        found = []
        for hook in hooks:
            fd, pin = self._fds.get((cgroup_id, hook.program)), directory / hook.program
            if fd is not None and not pin.exists() and libbpf.link_info(fd)[1]:
                libbpf.obj_pin(fd, str(pin))
                found.append(hook.program)
        return found

    def drop(self, cgroup_id: int, hook: Hook) -> None:
        """One that is to go when its pin does."""
        if (fd := self._fds.pop((cgroup_id, hook.program), None)) is not None:
            os.close(fd)

    def without(self, cgroup_ids: Collection[int]) -> set[int]:
        """Of other cgroups than these, those whose links still stand."""
        return {
            cgroup_id
            for (cgroup_id, _), fd in self._fds.items()
            if cgroup_id not in cgroup_ids and libbpf.link_info(fd)[1]
        }

    def keep(self, cgroup_ids: Collection[int]) -> None:
        """These, and others whose links still stand: their pins are to be made again."""
        kept = {*cgroup_ids, *self.without(cgroup_ids)}
        for key in [key for key in self._fds if key[0] not in kept]:
            os.close(self._fds.pop(key))

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def double(pin: Path, hook: Hook, target_fd: int) -> None:
    """Attaches the program that a link has once more, by a link of its own, which no `adopt` changes."""
    if not _stands(pin, hook):
        return
    with contextlib.ExitStack() as closing:
        link = closing.enter_context(libbpf.closing(libbpf.obj_get(str(pin))))
        program = closing.enter_context(libbpf.closing(libbpf.program_fd_by_id(libbpf.link_info(link)[0])))
        made = closing.enter_context(libbpf.closing(libbpf.link_create(program, target_fd, hook.attach_type)))
        beside = _beside(pin)
        beside.unlink(missing_ok=True)
        libbpf.obj_pin(made, str(beside))


def remove_double(pin: Path) -> bool:
    """True when there was one."""
    with contextlib.suppress(FileNotFoundError):
        _beside(pin).unlink()
        return True
    return False


def _beside(pin: Path) -> Path:
    return pin.with_name(f"{pin.name}@before")


def is_attached(pin: Path) -> bool:
    """A link outlives its pin and its target; this one has both."""
    return target(pin) != 0


def target(pin: Path) -> int:
    """The id of a link's cgroup, or its namespace's inode number; 0 when one of them is gone."""
    return _target_and_type(pin)[0]


def _stands(pin: Path, hook: Hook) -> bool:
    at, attach_type = _target_and_type(pin)
    return at != 0 and attach_type == hook.attach_type


def _target_and_type(pin: Path) -> tuple[int, int]:
    try:
        with libbpf.closing(libbpf.obj_get(str(pin))) as fd:
            return libbpf.link_info(fd)[1:]
    except libbpf.KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        return 0, 0


def adopt(pin: Path, hook: Hook, programs: Programs) -> int:
    """Gives a link the program that is loaded now, in one step. Returns how many were updated: 1 or 0.

    None where its target has gone, or it is of another type: an update does not look at that.
    """
    if not pin.exists():
        return 0
    with libbpf.closing(libbpf.obj_get(str(pin))) as fd:
        if libbpf.link_info(fd)[2] != hook.attach_type:
            return 0
        try:
            libbpf.link_update(fd, programs.fds[hook])
        except libbpf.KernelError as error:
            if error.errno != errno.ENOLINK:
                raise
            return 0
    return 1
