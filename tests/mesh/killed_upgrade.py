"""A loader's take-over, ended at each of its steps in turn: run as a release, with a pin directory.

Each attempt is a process of its own that is killed when it is about to take its n-th step; the next one
finds what that left. Prints how many attempts there were when one came to its end.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pykmesh.contracts.settings import LoaderSettings
from pykmesh.kernel import cgroups, libbpf
from pykmesh.kernel.upgrade import Staging
from services.bpf_loader import app

STEPS = {
    libbpf: ("obj_pin", "update", "update_batch", "link_update", "link_detach"),
    Path: ("mkdir", "rename", "unlink"),
    shutil: ("rmtree",),
    fcntl: ("flock",),
}


def main(instance: str, pin_dir: str) -> None:
    settings = LoaderSettings(instance=instance, pin_dir=Path(pin_dir))
    attempts = 0
    while True:
        attempts += 1
        pid = os.fork()
        if not pid:
            take_over(settings, attempts)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != -signal.SIGKILL:
            print(attempts, flush=True)  # noqa: T201  (what is asked for)
            sys.exit(code)


def take_over(settings: LoaderSettings, last: int) -> None:
    left = last

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
    staging = Staging(settings.pin_dir)
    programs = app._load(settings, staging)
    app._take_over(settings, cgroups.find_root(), programs, staging)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
