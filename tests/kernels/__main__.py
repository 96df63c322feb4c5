"""The programs under Debian's kernels, emulated: `make test-kernels`.

    python -m tests.kernels [--only SERIES ...] [--boots N] [--brief] [--cache DIRECTORY] [--report FILE]

A table of what holds under which (of each kernel its last run), and exit status 1 where something does not.
Where qemu or the kernels cannot be had it says so in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from tests.chaos import traffic
from tests.chaos.faults import OTHER_RELEASE
from tests.kernels import packages, vm
from tests.kernels.dataplane import Look
from tests.kernels.packages import SERIES, PackagesError
from tests.mesh.releases import make_other

HERE: Final = Path(__file__).parents[2]
ENVIRONMENT: Final = {
    "HOME": "/root",
    "TRAFFIC_TIMEOUT_S": "60",
    "PYKMESH_READY_DEADLINE_S": "200",
    "CHAOS_SETTLE_S": "200",
}
"""Patience for a machine that is ten times slower, and may be one of several on this one."""
RESULT: Final = "result.json"
OTHER: Final = "other"
"""The release to upgrade to: made here, where a compiler is ten times faster."""
BOOTS: Final = 2
"""At most, of one that dies in the emulation."""
DEADLINE_S: Final = 1500.0
"""Of a boot: one takes three to six minutes on a free processor, and as long again for what takes long."""
SILENCE_S: Final = 360.0
"""So long after its last word one is taken to hang."""


def look_at(kernel: Path, program: Path, boots: int, *, brief: bool) -> tuple[str, dict[str, Any], str]:
    """Its release, what was looked at by name, and what else it said."""
    words = next(series.words for series in SERIES if series.name == kernel.name)
    python, path = shlex.quote(sys.executable), shlex.quote(str(program))
    looks = f"{python} -m tests.kernels.dataplane {path}; first=$?"
    processes = f"{python} -m tests.kernels.processes" + " --brief" * brief
    command = ["sh", "-c", f"{looks}; {processes} && exit $first"]
    environment = {**ENVIRONMENT, "PATH": os.environ["PATH"], OTHER_RELEASE: str(kernel.parent / OTHER)}
    for boot in range(1, boots + 1):
        ended = vm.run(kernel, command, HERE, environment, DEADLINE_S, SILENCE_S, words)
        if ended.status is not None:
            break
        print(f"{kernel.name}: boot {boot} of {boots} ended after {ended.seconds:.0f} s:", flush=True)
        print(*[f"  {line}" for line in ended.output.splitlines()[-5:]], sep="\n", flush=True)
    lines = [json.loads(line) for line in ended.output.splitlines() if line.startswith('{"')]
    release = next((line["kernel"] for line in lines if "kernel" in line), kernel.name)
    found = {line["look"]: line for line in lines if "look" in line}
    said = "no" if not found else "yes" if ended.status is not None else "yes, and died after the last look"
    said += f" (boot {boot})" if boot > 1 else ""
    booted = Look("boots in qemu", said, holds=bool(found) and ended.status is not None)
    source = Look("of the source at", _commit(), holds=True)
    found = {booted.look: booted._asdict(), source.look: source._asdict(), **found}
    rest = "" if ended.status is not None else f"ended with no status after {ended.seconds} s"
    if ended.status and all(each["holds"] for each in found.values()):
        rest = ended.output[-8000:]
    print(f"{release}: {ended.seconds:.0f} s", flush=True)
    return release, found, rest


def _commit() -> str:
    """What was tried: of each kernel the last run stands in the report."""
    words = ("git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*")
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "-"


def table(kernels: dict[str, dict[str, Any]]) -> str:
    """The report, as Markdown."""
    names = list(dict.fromkeys(name for found in kernels.values() for name in found))
    lines = [
        "# Kernels",
        "",
        "Made by `python -m tests.kernels --report docs/kernels.md`: Debian's kernels in qemu's software",
        "emulation, the programs loaded, attached and tried with real sockets by one process",
        "(`tests/kernels/dataplane.py`), then the whole mesh, with all its processes and Envoys",
        "(`tests/kernels/scenarios.yaml`). A dash: not looked at.",
        "",
        f"| | {' | '.join(kernels)} |",
        f"|{'---|' * (len(kernels) + 1)}",
    ]
    for name in names:
        cells = [found[name]["found"] if name in found else "-" for found in kernels.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    names = [series.name for series in SERIES]
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    parser.add_argument("--boots", type=int, default=BOOTS, help="how often one that dies is booted")
    parser.add_argument("--brief", action="store_true", help="without the scenarios that take long")
    parser.add_argument("--cache", type=Path, default=HERE / "build" / "kernels")
    parser.add_argument("--report", type=Path, help="where the table goes as Markdown")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleaning up all the same
    options.cache.mkdir(parents=True, exist_ok=True)
    try:
        packages.install_tools()
        fetched = [packages.fetch(series, options.cache) for series in SERIES if series.name in options.only]
    except PackagesError as error:
        print(f"test-kernels: not run: {error}")
        return 0
    program = Path(traffic.build(options.cache))
    if not options.brief:
        shutil.rmtree(options.cache / OTHER, ignore_errors=True)
        (options.cache / OTHER).mkdir()
        make_other(options.cache / OTHER)
    bad = []
    for kernel in sorted(fetched, key=lambda path: options.only.index(path.name)):
        release, looks, rest = look_at(kernel, program, options.boots, brief=options.brief)
        (kernel / RESULT).write_text(json.dumps([release, looks]))
        for look in looks.values():
            print(f"  {'ok ' if look['holds'] else 'NO '} {look['look']}: {look['found']}", flush=True)
        if rest or not all(look["holds"] for look in looks.values()):
            bad.append(release)
            print(f"  {rest}", flush=True)
    if options.report:
        results = [options.cache / series.name / RESULT for series in SERIES]
        options.report.write_text(
            table(dict(json.loads(path.read_text()) for path in results if path.exists()))
        )
    if bad:
        print(f"test-kernels: does not hold: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
