"""Putting this release in the place of the one that an instance runs, or the one before back in its.

The kernel's side is bpf_loader's (`pykmesh/kernel/upgrade.py`): it does the same whenever it starts and finds
maps or programs of another release. Here are the processes: those of before end, which nobody's traffic
notices, and this release's start with the same options.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

import msgspec

from pykmesh.node.behind import FLAG, Behind
from pykmesh.node.instance import Instance, InstanceError, running

END_DEADLINE_S: Final = 15.0
START_DEADLINE_S: Final = 60.0
POLL_S: Final = 0.02


class Release(msgspec.Struct, frozen=True):
    """How a release is run: by which Python, where, and from where its code comes."""

    executable: str
    directory: str
    python_path: str

    def run(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        """Its command line. InstanceError when it is not there any more."""
        environment = {**os.environ, "PYTHONPATH": self.python_path}
        if not self.python_path:
            del environment["PYTHONPATH"]
        try:
            return subprocess.run(
                [self.executable, "-m", "pykmesh", *arguments],
                cwd=self.directory,
                env=environment,
                capture_output=True,
                text=True,
                timeout=START_DEADLINE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InstanceError(
                f"the release before ({self.executable} in {self.directory}): {error}"
            ) from error


class Supervised(msgspec.Struct, frozen=True):
    """An instance's supervisor that runs behind: its release, and the words that it was started with."""

    pid: int
    release: Release
    arguments: list[str]


def supervised(instance: Instance) -> Supervised:
    """InstanceError where none runs, or one that somebody has before him."""
    found = running(instance.run_dir)
    if found is None:
        raise InstanceError(f"instance {instance.name} is not running: `up` begins with this release")
    proc = Path("/proc") / str(found.pid)
    try:
        words = (proc / "cmdline").read_bytes().decode().rstrip("\0").split("\0")
        environment = dict(
            text.split("=", 1) for text in (proc / "environ").read_bytes().decode().split("\0") if "=" in text
        )
        directory = str((proc / "cwd").readlink())
    except (OSError, UnicodeDecodeError) as error:
        raise InstanceError(f"supervisor {found.pid}: {error}") from error
    if words[-1:] != [FLAG] or words[1:3] != ["-m", "pykmesh"]:
        raise InstanceError(
            f"instance {instance.name} runs in the foreground (pid {found.pid}): end it there, and start it "
            f"with this release; traffic goes on meanwhile"
        )
    release = Release(words[0], directory, environment.get("PYTHONPATH", ""))
    return Supervised(found.pid, release, words[3:-1])


class Exchanged(msgspec.Struct, frozen=True):
    """For how long processes were away: nothing of what changed meanwhile was in the kernel before that."""

    pid: int
    away_s: float


def exchange(instance: Instance, before: Supervised) -> Exchanged:
    """InstanceError when this release does not become ready; the one before runs again then."""
    began = time.monotonic()
    _end(before.pid)
    behind = Behind(instance, before.arguments)
    try:
        behind.until_ready()
    except BaseException as error:
        behind.end()
        back = before.release.run([*before.arguments, "-d"])
        if back.returncode:
            why = " ".join((back.stderr or back.stdout).split())
            raise InstanceError(f"{error}; and the release before does not start again: {why}") from error
        if isinstance(error, InstanceError):
            raise InstanceError(f"{error}; the release before runs again") from error
        raise
    _remember(instance, before.release)
    return Exchanged(behind.pid, round(time.monotonic() - began, 3))


def _end(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        deadline = time.monotonic() + END_DEADLINE_S
        while _lives(pid):
            if time.monotonic() > deadline:
                raise InstanceError(f"supervisor {pid} has not ended after {END_DEADLINE_S:g} s")
            time.sleep(POLL_S)
    finally:
        os.close(pidfd)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _remember(instance: Instance, release: Release) -> None:
    path = instance.previous
    temporary = path.with_suffix(".new")
    temporary.write_bytes(msgspec.json.encode(release))
    temporary.rename(path)


def previous(instance: Instance) -> Release:
    """The release that ran before the last exchange. InstanceError when there was none."""
    try:
        return msgspec.json.decode(instance.previous.read_bytes(), type=Release)
    except FileNotFoundError as error:
        raise InstanceError(f"instance {instance.name} has had no other release") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise InstanceError(f"{instance.previous}: {error}") from error
