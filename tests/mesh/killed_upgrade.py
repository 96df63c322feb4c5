"""A loader's take-over, ended in its midst: run as a release, with an instance's name and pin directory.

With nothing else: each attempt is a process of its own that is killed when it is about to take its n-th step;
the next one finds what that left. Prints how many attempts there were when one came to its end.

With `to-its-end`: one attempt, of which the system calls are printed, as JSON: how many of each. With
`CALL:N`: one that is killed before its N-th such call.
"""

from __future__ import annotations

import collections
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pykmesh.contracts.settings import LoaderSettings
from pykmesh.kernel import libbpf
from services.bpf_loader import app

STEPS = {
    libbpf: ("obj_pin", "update", "update_batch", "link_update", "link_detach"),
    Path: ("mkdir", "rename", "unlink"),
    shutil: ("rmtree",),
    fcntl: ("flock",),
}
LOOKS: Final = "read,pread64,lseek,newfstatat,fstat,statx,getdents64,mmap,munmap,brk,madvise"
"""Calls that change nothing: a kill before one leaves what a kill before the next one does."""


def main(instance: str, pin_dir: str, call: str = "") -> None:
    settings = LoaderSettings(instance=instance, pin_dir=Path(pin_dir))
    if call:
        looked_on(settings, call)
    attempts = 0
    while True:
        attempts += 1
        pid = os.fork()
        if not pid:
            count_steps(attempts)
            take_over(settings)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != -signal.SIGKILL:
            say(attempts)
            sys.exit(code)


def take_over(settings: LoaderSettings) -> None:
    app.take_over(settings)
    os._exit(0)


def count_steps(left: int) -> None:
    """Ends this process before the last of so many."""

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **named)

        return taken

    for place, names in STEPS.items():
        for name in names:
            setattr(place, name, counted(getattr(place, name)))


def looked_on(settings: LoaderSettings, call: str) -> None:
    """The exit status is that of the attempt; 137 for one that was killed."""
    begin, go = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(begin, 1)
        take_over(settings)
    name, _, number = call.partition(":")
    kill = ["-e", f"inject={name}:signal=KILL:when={number}"] if number else []
    with tempfile.NamedTemporaryFile("r") as calls:
        words = ["strace", "-f", "-p", str(pid), "-o", calls.name, "-e", f"trace=!{LOOKS}", *kill]
        with subprocess.Popen(words, stderr=subprocess.DEVNULL) as strace:
            while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
                if strace.poll() is not None:
                    os.kill(pid, signal.SIGKILL)
                    sys.exit("strace cannot look on")
                time.sleep(0.002)
            os.write(go, b".")
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        begun = (line.split(maxsplit=1)[1].partition("(") for line in calls)
        say(json.dumps(collections.Counter(found for found, is_call, _ in begun if is_call)))
    sys.exit(128 - code if code < 0 else code)


def say(what: object) -> None:
    print(what, flush=True)  # noqa: T201  (what is asked for)


if __name__ == "__main__":
    main(*sys.argv[1:])
