"""Putting this release in the place of the one that an instance runs, or the one before back in its.

The kernel's side is bpf_loader's (`pykmesh/kernel/upgrade.py`): it does the same whenever it starts and finds
maps or programs of another release. Here are the processes: those of before end, which nobody's traffic
notices, and this release's start with the same words, in the same place and environment. What is under way
stands in a file, so that who is ended in between is gone on with by the next `pykmesh upgrade`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import msgspec

from pykmesh.files import write_whole
from pykmesh.node.ask import fetch
from pykmesh.node.behind import (
    CHECK,
    FLAG,
    LATE_POLL_S,
    READY_DEADLINE,
    Behind,
    end_supervisor,
    of_this_release,
    ready_deadline_s,
)
from pykmesh.node.instance import Instance, InstanceError, command, running
from pykmesh.node.mesh import MODULES

CONNECT_DEADLINE_S: Final = 3.0
"""In which xds_client begins another stream, where the control plane is there."""
_IMPORT: Final = (
    "import importlib, sys; [importlib.import_module(f'{name}.__main__') for name in sys.argv[1:]]"
)
_T = TypeVar("_T")


class Release(msgspec.Struct, frozen=True):
    """How a release is run: by which Python, and from where its code comes."""

    executable: str
    python_path: str

    def environment(self, around: dict[str, str]) -> dict[str, str]:
        return {**around, "PYTHONPATH": self.python_path, "PYTHONSAFEPATH": "1"}

    def command(self, *words: str) -> list[str]:
        return [self.executable, "-m", "pykmesh", *words]


class Supervised(msgspec.Struct, frozen=True):
    """An instance's supervisor that ran behind: its release, its words, its place and environment.

    Its release is the last one that was ready: not that of one which an upgrade that was killed had begun.
    """

    release: Release
    arguments: list[str]
    directory: str
    environment: dict[str, str]


class Exchanged(msgspec.Struct, frozen=True):
    """For how long processes were away: nothing of what changed meanwhile was in the kernel before that."""

    pid: int
    away_s: float
    can_go_back: bool
    """Another release ran before, and its files are still its own."""


def supervised(instance: Instance) -> Supervised:
    """InstanceError where none runs, nor was about to, or one that somebody has before him."""
    found, begun = running(instance.run_dir), _read(instance.journal, Supervised)
    if found is None:
        if begun is not None:
            return begun
        raise _not_running(instance)
    proc = Path("/proc") / str(found.pid)
    try:
        words = os.fsdecode((proc / "cmdline").read_bytes()).rstrip("\0").split("\0")
        texts = os.fsdecode((proc / "environ").read_bytes()).split("\0")
        directory = str((proc / "cwd").readlink())
    except OSError as error:
        raise InstanceError(f"supervisor {found.pid}: {error}") from error
    if words[-1:] != [FLAG] or words[1:3] != ["-m", "pykmesh"]:
        raise InstanceError(
            f"instance {instance.name} runs in the foreground (pid {found.pid}): end it there, and start it "
            f"with this release; traffic goes on meanwhile"
        )
    environment = dict(text.split("=", 1) for text in texts if "=" in text)
    environment.pop(READY_DEADLINE, None)  # of the upgrade that it was started by, not of the next one
    arguments, release = words[3:-1], Release(words[0], environment.get("PYTHONPATH", directory))
    if begun is not None and begun.arguments == arguments:
        release = begun.release
    return Supervised(release, arguments, directory, environment)


def exchange(instance: Instance) -> Exchanged:
    """InstanceError when this release does not become ready; the one before runs again then.

    Or when nothing is there that it could take the place of, or another upgrade is under way.
    """
    with _alone(instance), _undisturbed():
        before = supervised(instance)
        environment = of_this_release(before.environment)
        environment[READY_DEADLINE] = f"{ready_deadline_s():g}"
        _check(instance, before, environment)
        _write(instance.journal, before)
        began = time.monotonic()
        try:
            _end(instance)
            behind = _start(instance, before, environment)
        except (InstanceError, OSError, KeyboardInterrupt) as error:
            _start_again(instance, before, error)
    goes_back = False
    with contextlib.suppress(InstanceError):  # what is damaged there is no release to go back to
        goes_back = before.release == _read(instance.previous, Release) and not _is_this(before.release)
    return Exchanged(behind.pid, round(time.monotonic() - began, 3), goes_back)


def check(instance: Instance) -> None:
    """InstanceError for what `exchange` would not begin for."""
    before = supervised(instance)
    _check(instance, before, of_this_release(before.environment))


def _check(instance: Instance, before: Supervised, environment: dict[str, str]) -> None:
    """Whether this release takes the words and settings that the one before was started with.

    And whether there is a control plane: without one no release becomes ready, nor the one before again.
    """
    end = time.monotonic() + CONNECT_DEADLINE_S
    while (found := _away(instance)) and time.monotonic() < end:
        time.sleep(LATE_POLL_S)  # between two streams
    if found:
        exchanged = " and ".join(command(instance, word) for word in ("down", "up"))
        raise InstanceError(
            f"not begun: xds_client has no stream to the control plane at {found}, without which no release "
            f"becomes ready ({exchanged} exchange it nevertheless; traffic goes on)"
        )
    if not Path(before.directory).is_dir():
        raise InstanceError(f"{before.directory} is gone, in which the instance was started")
    for words in (["-m", "pykmesh", *before.arguments, CHECK], ["-c", _IMPORT, *MODULES]):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=before.directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["without a word"]
            why = said[0].removeprefix("Error: ")
            raise InstanceError(f"not begun: this release does not start as the one before: {why}")


def _away(instance: Instance) -> str:
    """The control plane that xds_client is not connected with; empty where it is, or does not answer."""
    ran = running(instance.run_dir)
    try:
        status = fetch(ran.ports.xds_client, "/status") if ran else {}
    except OSError:
        return ""
    return "" if status.get("connected", True) else str(status["xds_address"])


def settle(instance: Instance) -> None:
    """By a supervisor whose processes are ready: whatever was under way, this release runs.

    The one before it is kept as that to go back to.
    """
    begun = _read(instance.journal, Supervised)
    if begun is not None and not _is_this(begun.release):
        _write(instance.previous, begun.release)
    instance.journal.unlink(missing_ok=True)


def _start(instance: Instance, before: Supervised, environment: dict[str, str]) -> Behind:
    """Ready when this returns. One that a killed upgrade had begun, and which is there first, gives way."""
    try:
        return _ready(instance, before, environment)
    except InstanceError:
        if running(instance.run_dir) is None or supervised(instance).arguments != before.arguments:
            raise
    _end(instance)
    return _ready(instance, before, environment)


def _ready(instance: Instance, before: Supervised, environment: dict[str, str]) -> Behind:
    """Whoever is not, or when this is interrupted, is ended."""
    behind = Behind(instance, before.arguments, before.directory, environment)
    try:
        behind.until_ready()
    except BaseException:
        behind.end()
        raise
    return behind


def _end(instance: Instance) -> None:
    """Also when it is interrupted: who was told to end is waited for."""
    found = running(instance.run_dir)
    if found is None:
        return
    try:
        end_supervisor(found.pid)
    except KeyboardInterrupt:
        end_supervisor(found.pid)
        raise


def _is_this(release: Release) -> bool:
    return release.python_path == of_this_release({})["PYTHONPATH"]


def is_under_way(instance: Instance) -> bool:
    """Whether somebody exchanges the processes of an instance now."""
    if not instance.run_dir.is_dir():
        return False
    try:
        with _alone(instance):
            return False
    except InstanceError:
        return True


@contextlib.contextmanager
def _alone(instance: Instance) -> Iterator[None]:
    try:
        held = os.open(instance.run_dir, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise _not_running(instance) from error
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InstanceError(f"another upgrade of instance {instance.name} is under way") from error
        yield
    finally:
        os.close(held)


def _not_running(instance: Instance) -> InstanceError:
    return InstanceError(f"instance {instance.name} is not running: `up` begins with this release")


def _start_again(instance: Instance, before: Supervised, error: BaseException) -> NoReturn:
    """Raises InstanceError, whatever comes of it. Whoever interrupts waits for it."""
    why, said = str(error) or "interrupted", ""
    environment = before.release.environment(before.environment)
    environment[READY_DEADLINE] = f"{ready_deadline_s():g}"
    interrupted = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        done = subprocess.run(
            before.release.command(*before.arguments, "-d"),
            cwd=before.directory,
            env=environment,
            capture_output=True,
            text=True,
            start_new_session=True,
            check=False,
        )
        is_ready, said = not done.returncode, " ".join((done.stderr or done.stdout).split())
    except OSError as reason:
        is_ready, said = False, str(reason)
    finally:
        signal.signal(signal.SIGINT, interrupted)
    if running(instance.run_dir) is None:
        again = command(instance, "upgrade")
        raise InstanceError(
            f"{why}; and the release before does not start again: {said} (traffic goes on; {again} goes on "
            f"from here)"
        ) from error
    now = supervised(instance).release
    if now.python_path != before.release.python_path:
        raise InstanceError(f"{why}; what runs now is the release at {now.python_path}") from error
    outcome = "the release before runs again"
    if _is_this(before.release):
        outcome = f"what runs again is this release: the one before was in the same place ({now.python_path})"
    if not is_ready:
        raise InstanceError(f"{why}; {outcome}, and is not ready: {said.removeprefix('Error: ')}") from error
    instance.journal.unlink(missing_ok=True)
    raise InstanceError(f"{why}; {outcome}") from error


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A terminal that goes, or a polite end, waits until this is done. What is started inherits nothing."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(path: Path, what: msgspec.Struct) -> None:
    """For its owner alone. InstanceError where it cannot be written."""
    try:
        write_whole(path, msgspec.json.encode(what), 0o600)
    except OSError as error:
        raise InstanceError(f"{path}: {error.strerror}") from error


def _read(path: Path, kind: type[_T]) -> _T | None:
    """None when there is no such file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise InstanceError(f"{path}: {error}; remove it, and what it says is forgotten") from error


def roll_back(instance: Instance, words: list[str]) -> NoReturn:
    """Becomes the command line of the release before. InstanceError when there is none, or none any more.

    Where an upgrade was killed and what it began was never ready, that is the one that it was from.
    """
    begun = _read(instance.journal, Supervised)
    release = begun.release if begun is not None else _read(instance.previous, Release)
    if release is None:
        raise InstanceError(f"instance {instance.name} has had no other release")
    if begun is None and _is_this(release):
        raise InstanceError(f"this is the release before ({release.python_path})")
    if not (Path(release.python_path.split(":")[0]) / "pykmesh" / "node" / "upgrade.py").is_file():
        raise InstanceError(f"the release before is not at {release.python_path} any more, or cannot do this")
    try:
        environment = release.environment(dict(os.environ))
        os.execve(release.executable, release.command(*words), environment)  # noqa: S606  (our own words)
    except OSError as error:
        raise InstanceError(f"{release.executable}: {error.strerror}") from error
