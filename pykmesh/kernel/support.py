"""What this kernel can do for the mesh, each with its fall-back or the way to have it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pykmesh.kernel import cgroups, libbpf, pins
from pykmesh.kernel.hooks import can_set_retval
from pykmesh.kernel.netns import own_cookie

_PROGRAM_TYPES = {"cgroup/sock_addr": 18, "sock_ops": 13, "cgroup/sock": 9}
_MAP_TYPES = {"hash": 1, "LRU hash": 9, "ring buffer": 27, "socket storage": 24}


class Finding(NamedTuple):
    """`level` is ok, warn or fail; `fix` says what to do about the latter two."""

    code: str
    level: str
    what: str
    fix: str = ""


def findings(pin_dir: Path) -> Iterator[Finding]:
    """Everything that is looked at, in the order in which it matters."""
    yield _root()
    if os.geteuid() == 0:
        yield from _bpf()
    yield _enrolment()
    yield _cgroup()
    yield _bpffs(pin_dir)
    yield _btf()


def obstacle(pin_dir: Path) -> str:
    """The first thing that makes the mesh impossible here, in one line; "" when there is none."""
    for finding in findings(pin_dir):
        if finding.level == "fail":
            return f"{finding.what}: {finding.fix}"
    return ""


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding("root", "ok", "running as root")
    return Finding(
        "root", "fail", "not root", "run as root (loading programs needs CAP_BPF, NET_ADMIN and SYS_ADMIN)"
    )


def _bpf() -> Iterator[Finding]:
    release = platform.release()
    for name, number in _PROGRAM_TYPES.items():
        if libbpf.probe_program_type(number):
            yield Finding("bpf-programs", "ok", f"kernel {release} loads {name} programs")
        else:
            yield Finding(
                "bpf-programs",
                "fail",
                f"kernel {release} loads no {name} programs",
                "a kernel from 5.10 with BPF",
            )
    for name, number in _MAP_TYPES.items():
        if not libbpf.probe_map_type(number):
            yield Finding(
                "bpf-maps", "fail", f"kernel {release} has no {name} map", "a kernel from 5.10 with BPF"
            )
    if can_set_retval():
        yield Finding("errno", "ok", "refused connections fail with ECONNREFUSED")
    else:
        yield Finding(
            "errno", "warn", "refused connections fail with EPERM", "ECONNREFUSED needs kernel 5.18"
        )


def _enrolment() -> Finding:
    try:
        own_cookie()
    except OSError as error:
        what = f"cookies of network namespaces cannot be known ({error.strerror or error})"
        return Finding("enrolment", "fail", what, "SO_NETNS_COOKIE (kernel 5.14) or root tells them")
    return Finding("enrolment", "ok", "pods can be told by their network namespaces")


def _cgroup() -> Finding:
    try:
        return Finding("cgroup2", "ok", f"cgroup v2 at {cgroups.find_root()}")
    except cgroups.CgroupError as error:
        return Finding("cgroup2", "fail", "no cgroup v2", str(error))


def _bpffs(pin_dir: Path) -> Finding:
    if pins.is_bpffs(pin_dir):
        if pins.is_read_only(pin_dir):
            return Finding("bpffs", "fail", f"the bpffs at {pin_dir} is read-only", "remount it read-write")
        return Finding("bpffs", "ok", f"bpffs at {pin_dir}")
    return Finding("bpffs", "warn", f"no bpffs at {pin_dir}", "bpf_loader mounts one when it starts")


def _btf() -> Finding:
    if Path("/sys/kernel/btf/vmlinux").exists():
        return Finding("btf", "ok", "the kernel describes its types (BTF)")
    return Finding(
        "btf", "fail", "the kernel does not describe its types", "a kernel with CONFIG_DEBUG_INFO_BTF"
    )
