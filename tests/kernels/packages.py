"""Debian's kernels, fetched from where this machine's own packages come from, and unpacked."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

SOURCES: Final = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TOOLS: Final = {
    "qemu-system-x86_64": "qemu-system-x86", "/bin/busybox": "busybox-static", "cpio": "cpio",
    "depmod": "kmod", "zstd": "zstd", "dpkg-deb": "dpkg",
}  # fmt: skip


class PackagesError(Exception):
    """A kernel or a tool cannot be had; the text says which and why."""


class Series(NamedTuple):
    """`archive`: "debian" or "debian-security"; of several versions in the suite the newest one."""

    name: str
    suite: str
    archive: str
    pattern: str
    words: str = ""
    """For the kernel's command line. 6.12 dies of cmpxchg16b as qemu 7.2 emulates it, and goes without (numpy
    does not); newer ones need it for what sockets keep."""


SERIES: Final = (
    Series("5.10", "bullseye-security", "debian-security", r"5\.10\.0-"),
    Series("6.1", "bookworm-security", "debian-security", r"6\.1\.0-"),
    Series("6.12", "bookworm-backports", "debian", r"6\.12\.", "clearcpuid=141"),
    Series("newest", "trixie-backports", "debian", r"\d"),
)


def fetch(series: Series, directory: Path) -> Path:
    """The directory with the kernel unpacked; fetched once. PackagesError."""
    target = directory / series.name
    if (target / "complete").exists():
        return target
    options = _own_tree(series, directory / "apt")
    _run("apt-get", *options, "update", "-qq")
    names = _run("apt-cache", *options, "pkgnames", "linux-").split()
    parts = re.compile(rf"linux-(image|binary|modules|base)-{re.escape(_newest(names, series))}")
    wanted = [name for name in names if parts.fullmatch(name)]
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.deb"):
        old.unlink()
    _run("apt-get", *options, "download", *wanted, where=target)
    for package in target.glob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(target))
        package.unlink()
    (target / "complete").touch()
    return target


def _newest(names: list[str], series: Series) -> str:
    pattern = re.compile(rf"linux-image-({series.pattern}.*-cloud-amd64)")
    found = [match[1] for name in names if (match := pattern.fullmatch(name))]
    if not found:
        raise PackagesError(f"{series.suite} has no kernel {series.name} of the cloud flavour")
    return max(found, key=lambda version: [int(number) for number in re.findall(r"\d+", version)])


def _own_tree(series: Series, directory: Path) -> list[str]:
    """Options of apt that leave this machine's own lists and packages alone."""
    tree = directory / series.suite
    for part in ("state/lists/partial", "cache/archives/partial"):
        (tree / part).mkdir(parents=True, exist_ok=True)
    (tree / "status").touch()
    source = tree / "sources.list"
    source.write_text(f"deb [signed-by={KEYRING}] {mirror(series.archive)} {series.suite} main\n")
    return [
        "-o", f"Dir::State={tree}/state", "-o", f"Dir::State::status={tree}/status",
        "-o", f"Dir::Cache={tree}/cache",
        "-o", f"Dir::Etc::sourcelist={source}", "-o", "Dir::Etc::sourceparts=/dev/null",
        "-o", "APT::Sandbox::User=root", "-o", "Acquire::Check-Valid-Until=false",
    ]  # fmt: skip


def mirror(archive: str) -> str:
    """This machine's own for "debian" or "debian-security". PackagesError where it has none."""
    for text in _texts():
        for address in re.findall(r"https?://[^\s\]]+", re.sub(r"(?m)^\s*#.*$", "", text)):
            if address.rstrip("/").rpartition("/")[2] == archive:
                return address.rstrip("/")
    raise PackagesError(f"this machine's sources of packages name no {archive}")


def _texts() -> Iterator[str]:
    for place in SOURCES:
        for path in sorted(place.glob("*")) if place.is_dir() else [place] if place.exists() else []:
            yield path.read_text()


def _run(*words: str, where: Path | None = None) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=where)
    except OSError as error:
        raise PackagesError(f"{words[0]}: {error.strerror}") from error
    if done.returncode:
        raise PackagesError(f"{words[0]}: {' '.join((done.stderr or done.stdout).split())[-300:]}")
    return done.stdout


def install_tools() -> None:
    """What boots a kernel, if it is missing; says what it installs. PackagesError."""
    missing = sorted({package for tool, package in TOOLS.items() if not _is_there(tool)})
    if missing:
        print(f"test-kernels: installing Debian packages: {' '.join(missing)}", flush=True)  # noqa: T201
        _run("apt-get", "update", "-qq")
        _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing)


def _is_there(tool: str) -> bool:
    if tool.startswith("/"):
        return Path(tool).exists()
    return any((Path(place) / tool).exists() for place in ("/usr/bin", "/usr/sbin", "/bin", "/sbin"))
