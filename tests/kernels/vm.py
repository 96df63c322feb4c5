"""A command under another kernel, in qemu's software emulation, on this machine's own files.

The guest sees this machine's file system read-only by virtiofs, with memory laid over it, so a checkout and
its virtual environment run as they are.
"""

from __future__ import annotations

import contextlib
import lzma
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

MODULES: Final = ("virtio_pci", "virtiofs", "overlay")
VIRTIOFSD: Final = Path("/usr/lib/qemu/virtiofsd")
MEMORY_MIB: Final = 2048
WORDS: Final = (
    "console=ttyS0 quiet loglevel=3 panic=-1 oops=panic random.trust_cpu=on tsc=unstable mitigations=off"
)
INIT: Final = """#!/bin/busybox sh
b=/bin/busybox
for d in proc sys dev host memory root; do $b mkdir -p /$d; done
$b mount -t proc none /proc
$b mount -t sysfs none /sys
$b mount -t devtmpfs none /dev
for m in $($b cat /order); do $b insmod /modules/$m; done
$b mount -t virtiofs -o ro host /host &&
$b mount -t tmpfs none /memory &&
$b mkdir /memory/changed /memory/work &&
$b mount -t overlay -o lowerdir=/host,upperdir=/memory/changed,workdir=/memory/work none /root ||
	$b poweroff -f
for d in proc sys dev; do $b mount -o move /$d /root/$d; done
$b mount -t tmpfs none /root/run
$b mkdir -p /root/lib/modules /root/run/guest
$b mount -t tmpfs none /root/lib/modules
$b ln -s @modules@ /root/lib/modules/$($b uname -r)
$b cp /start /root/run/guest/start
exec $b switch_root /root /bin/sh /run/guest/start
"""
START: Final = """
mkdir -p /dev/pts /dev/shm
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
mount -t bpf none /sys/fs/bpf
mount -t cgroup2 none /sys/fs/cgroup
ip link set lo up
cd @directory@
(@command@) </dev/null >/dev/ttyS0 2>&1
echo $? >/dev/ttyS1
poweroff -f || busybox poweroff -f
"""


class Ended(NamedTuple):
    """`status` None: it did not end by itself (the deadline, a panic)."""

    status: int | None
    output: str
    seconds: float


def run(
    kernel: Path,
    command: list[str],
    directory: Path,
    environment: Mapping[str, str],
    deadline_s: float,
    silence_s: float,
    kernel_words: str = "",
) -> Ended:
    """`kernel`: Debian's packages of one, unpacked in a directory. `kernel_words`: for its command line.

    `silence_s`: after which one that says nothing any more is ended, before the deadline.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vm-") as made:
        work = Path(made)
        words = shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), *command])
        start = START.replace("@directory@", shlex.quote(str(directory))).replace("@command@", words)
        disk = _initial(kernel, work, start)
        with (
            _files(work) as socket,
            subprocess.Popen(_qemu(kernel, disk, work, socket, kernel_words)) as machine,
        ):
            try:
                _wait(machine, work / "output", began + deadline_s, silence_s)
            finally:
                machine.kill()
        said = (work / "status").read_text().strip()
        output = (work / "output").read_text(errors="replace").replace("\r\n", "\n")
    return Ended(int(said) if said else None, output, round(time.monotonic() - began, 1))


def _wait(machine: subprocess.Popen[bytes], output: Path, end: float, silence_s: float) -> None:
    """Until it has ended, or will not."""
    said, last = 0, time.monotonic()
    while machine.poll() is None and (now := time.monotonic()) < min(end, last + silence_s):
        if output.exists() and (size := output.stat().st_size) != said:
            said, last = size, now
        time.sleep(0.5)


def modules_of(kernel: Path) -> Path:
    """Where its modules lie, with what depends on what."""
    found = next(path for parts in ("usr/lib/modules", "lib/modules") for path in (kernel / parts).glob("*"))
    if not (found / "modules.dep").exists():
        subprocess.run(["depmod", "-b", str(found.parents[2]), found.name], check=True)
    return found


def _image(kernel: Path) -> Path:
    return next(iter([*kernel.glob("boot/vmlinuz*"), *modules_of(kernel).glob("vmlinuz*")]))


def _initial(kernel: Path, work: Path, start: str) -> Path:
    """The first file system: busybox, the modules that lead to the host's files, and what to start."""
    root, modules = work / "initial", modules_of(kernel)
    for each in ("bin", "modules"):
        (root / each).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    order = []
    for path in _in_order(modules):
        name = f"{path.name.partition('.ko')[0]}.ko"
        (root / "modules" / name).write_bytes(_unpacked(path))
        order.append(name)
    (root / "order").write_text("\n".join(order))
    (root / "start").write_text(start)
    (root / "init").write_text(INIT.replace("@modules@", str(modules)))
    (root / "init").chmod(0o755)
    disk = work / "initial.cpio"
    with disk.open("wb") as file:
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=names.encode(), stdout=file, check=True
        )
    return disk


def _in_order(modules: Path) -> list[Path]:
    """Each after those that it needs. What is built into the kernel is no file."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, others = line.partition(":")
        needs[name] = others.split()
    by_name = {Path(name).name.partition(".ko")[0].replace("-", "_"): name for name in needs}
    found: list[str] = []

    def add(name: str) -> None:
        for other in reversed(needs[name]):
            add(other)
        if name not in found:
            found.append(name)

    for wanted in MODULES:
        if wanted in by_name:
            add(by_name[wanted])
    return [modules / name for name in found]


def _unpacked(module: Path) -> bytes:
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    if module.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", str(module)], stdout=subprocess.PIPE, check=True).stdout
    return module.read_bytes()


@contextlib.contextmanager
def _files(work: Path) -> Iterator[Path]:
    """Serves this machine's files; the socket to ask at."""
    socket = work / "files"
    words = [str(VIRTIOFSD), f"--socket-path={socket}", "-o", "source=/,cache=always,sandbox=chroot", "-f"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while not socket.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"{VIRTIOFSD} has ended with {server.returncode}")
                time.sleep(0.02)
            yield socket
        finally:
            server.terminate()


def _qemu(kernel: Path, disk: Path, work: Path, socket: Path, kernel_words: str) -> list[str]:
    memory = f"memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on"
    return [
        "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max",
        "-m", str(MEMORY_MIB), "-smp", "2",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-serial", f"file:{work / 'output'}", "-serial", f"file:{work / 'status'}",
        "-kernel", str(_image(kernel)), "-initrd", str(disk),
        "-append", f"{WORDS} {kernel_words}",
        "-object", memory, "-numa", "node,memdev=memory", "-device", "virtio-rng-pci",
        "-chardev", f"socket,id=files,path={socket}",
        "-device", "vhost-user-fs-pci,chardev=files,tag=host,queue-size=1024",
    ]  # fmt: skip
