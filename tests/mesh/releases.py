"""A release like this one with other maps, for upgrades from one to the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[2]
GROWN = {
    # of the value that each connection reads first: what it begins with stays, the rest moves
    "struct service_value {\n\tstruct ip address;\n\t__u32 network;\n\t__be16 port;\n\t__u16 pad;\n": (
        "struct service_value {\n\tstruct ip address;\n\t__u32 network;\n\t__be16 port;\n\t__u16 pad;\n"
        "\t__u64 colour;\n"
    ),
    "\t__u32 other;\n\t__u32 share;\n\t__u8 reserved[12];\n": (
        "\t__u32 weightless;\n\t__u32 other;\n\t__u32 share;\n\t__u8 reserved[8];\n"
    ),
    "\t__u64 cgroup_id; /* of the enrolled cgroup, for clean-up and display */\n": (
        "\t__u32 shade;\n\t__u32 hue;\n\t__u64 cgroup_id;\n"
    ),
    "struct datagram_value {\n\t__u64 service;": "struct datagram_value {\n\t__u64 tint;\n\t__u64 service;",
    "struct handoff_value {\n\t__u32 service;": "struct handoff_value {\n\t__u32 shape;\n\t__u32 service;",
    "\tREASON_COUNT,\n": "\tREASON_WEATHER,\n\tREASON_COUNT,\n",
    "sizeof(struct service_value) == 48": "sizeof(struct service_value) == 56",
    "sizeof(struct pod_value) == 64": "sizeof(struct pod_value) == 72",
    "sizeof(struct handoff_value) == 32": "sizeof(struct handoff_value) == 36",
    "sizeof(struct datagram_value) == 32": "sizeof(struct datagram_value) == 40",
}
CHANGED = {"services", "endpoints", "pods", "datagrams", "handoffs", "counters"}


def make_other(found: Path) -> None:
    """Into an empty directory: with other maps, and a program of another name."""
    for part in ("pykmesh", "services", "bpf"):
        shutil.copytree(HERE / part, found / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("bpf/telemetry.h", "pykmesh/kernel/hooks.py"):
        said = (found / name).read_text()
        assert said.count("pykmesh_release") == 1
        (found / name).write_text(said.replace("pykmesh_release", "pykmesh_freed"))
    enums = found / "pykmesh" / "kernel" / "layout.py"
    last = "    HANDOFF_UNKNOWN = 15\n"
    assert last in enums.read_text()
    enums.write_text(enums.read_text().replace(last, last + "    WEATHER = 16\n"))
    types = found / "bpf" / "mesh_types.h"
    said = types.read_text()
    for before, after in GROWN.items():
        assert said.count(before) == 1, before
        said = said.replace(before, after)
    types.write_text(said)
    build(found)


def build(release: Path) -> None:
    objects = release / "pykmesh" / "kernel" / "objects"
    machine = os.uname().machine
    for name, flags in (("mesh", []), ("mesh_before_5_13", ["-DNO_GLOBAL_FUNCTIONS"])):
        built = release / f"{name}.o"
        compile_ = [
            "clang",
            "-target",
            "bpf",
            "-mcpu=v3",
            "-O2",
            "-g",
            *flags,
            f"-I/usr/include/{machine}-linux-gnu",
        ]
        _run(*compile_, "-c", str(release / "bpf" / "mesh.bpf.c"), "-o", str(built))
        _run("bpftool", "gen", "object", str(objects / f"{name}.bpf.o"), str(built))
    made = (
        objects / name for name in ("mesh.bpf.o", "mesh_before_5_13.bpf.o", "cookie.bpf.o", "layout.json")
    )
    _run(sys.executable, "-m", "pykmesh.kernel.btf", *map(str, made))


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
