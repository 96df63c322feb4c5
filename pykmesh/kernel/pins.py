"""The pin directory of an instance: where it lies, who holds it, and taking all of it away.

    <pin_dir>/maps/<name>@<layout hash>        maps
    <pin_dir>/links/<cgroup id>/<program>      attachments

Exit never tears down: only `uninstall` does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from pykmesh.kernel import libbpf

BPFFS_MAGIC: Final = 0xCAFE4A11


class PinDirectoryError(Exception):
    """The pin directory cannot be used; the text says why and what to do."""


class Removed(NamedTuple):
    links: int
    maps: int


def maps_dir(pin_dir: Path) -> Path:
    return pin_dir / "maps"


def links_dir(pin_dir: Path) -> Path:
    return pin_dir / "links"


def is_bpffs(path: Path) -> bool:
    """True when the nearest directory that exists lies on a bpffs."""
    while not path.exists():
        path = path.parent
    result = subprocess.run(["stat", "-f", "-c", "%t", str(path)], capture_output=True, text=True, check=True)
    return int(result.stdout, 16) == BPFFS_MAGIC


def prepare(pin_dir: Path) -> bool:
    """Makes the directory, on a bpffs that is mounted where there is none. True when it was mounted here.

    A path below /sys/fs/bpf gets the bpffs there, where every tool looks for it; any other path gets
    one at its parent.
    """
    mounted = False
    try:
        if not is_bpffs(pin_dir):
            system = Path("/sys/fs/bpf")
            at = system if system in pin_dir.parents else pin_dir.parent
            if at != system:
                at.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "-t", "bpf", "bpf", str(at)], check=True, capture_output=True, text=True)
            mounted = True
        for directory in (pin_dir, maps_dir(pin_dir), links_dir(pin_dir)):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o755)
    except subprocess.CalledProcessError as error:
        raise PinDirectoryError(f"mount a bpffs for {pin_dir}: {error.stderr.strip()}") from error
    except OSError as error:
        raise PinDirectoryError(f"pin directory {pin_dir}: {error.strerror}") from error
    return mounted


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
            f"{pin_dir} is held by another bpf_loader: one instance, one loader"
        ) from error
    return fd


def uninstall(pin_dir: Path) -> Removed:
    """Detaches every program and removes every pin of an instance. What is not there is no error."""
    if not pin_dir.exists():
        return Removed(0, 0)
    held = lock(pin_dir)
    try:
        return _remove_all(pin_dir)
    finally:
        os.close(held)


def _remove_all(pin_dir: Path) -> Removed:
    links = maps = 0
    for directory in links_dir(pin_dir).glob("*"):
        links += remove_links(directory)
    for pin in maps_dir(pin_dir).glob("*"):
        pin.unlink()
        maps += 1
    for directory in (links_dir(pin_dir), maps_dir(pin_dir), pin_dir):
        if directory.exists():
            directory.rmdir()
    with contextlib.suppress(OSError):
        pin_dir.parent.rmdir()
    return Removed(links, maps)


def remove_links(directory: Path) -> int:
    """Detaches and unpins the links of one cgroup, what rewrites before what undoes a rewrite."""
    pins = sorted(directory.glob("*"), key=lambda pin: (not pin.name.startswith("pykmesh_conn"), pin.name))
    for pin in pins:
        with libbpf.closing(libbpf.obj_get(str(pin))) as fd, contextlib.suppress(libbpf.KernelError):
            libbpf.link_detach(fd)
        pin.unlink()
    directory.rmdir()
    return len(pins)
