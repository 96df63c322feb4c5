"""Which programs stand on a cgroup, and whether they read the maps that are pinned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from pykmesh.kernel import libbpf, pins
from pykmesh.kernel.hooks import HOOKS

_KERNEL_NAME: Final = 15
"""Characters of a map's name that the kernel keeps."""
ONE_OF_EACH: Final = dict.fromkeys((hook.attach_type for hook in HOOKS), 1)


def hooks_of(cgroup: Path, pin_dir: Path) -> dict[int, int]:
    """How many programs of each attach type read none but the pinned maps of an instance."""
    paths = [*pins.maps_dir(pin_dir).iterdir()]
    names = {path.name.partition("@")[0][:_KERNEL_NAME] for path in paths}
    pinned, found = {_map_id(path) for path in paths}, {}
    with libbpf.closing(os.open(cgroup, os.O_RDONLY)) as fd:
        for hook in HOOKS:
            programs = libbpf.query_programs(fd, hook.attach_type, effective=False)
            read = [set(libbpf.program_name_and_maps(each)[1]) - pinned for each in programs]
            found[hook.attach_type] = sum(names.isdisjoint(map(_map_name, others)) for others in read)
    return found


def _map_id(path: Path) -> int:
    with libbpf.closing(libbpf.obj_get(str(path))) as fd:
        return libbpf.map_id(fd)


def _map_name(number: int) -> str:
    with libbpf.closing(libbpf.map_fd_by_id(number)) as fd:
        return libbpf.map_name(fd)
