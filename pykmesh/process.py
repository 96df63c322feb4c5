"""What every process is made of: settings, logs, traces, the administrative HTTP, a clean end.

A process is an `app(runtime)` that runs until it is cancelled. What it cannot handle ends it: the
supervisor starts it again, and the state is in the kernel.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import structlog
from opentelemetry.sdk.trace import TracerProvider

from pykmesh import __version__, bus, logs, tracing
from pykmesh.admin import Admin, Page, Query, as_json
from pykmesh.contracts.settings import EXIT_SETTINGS, CommonSettings, SettingsError, load, misspelt
from pykmesh.readiness import Readiness

log = structlog.get_logger(__name__)

ERRORS_KEPT = 20
GC_THRESHOLDS = (50_000, 20, 100)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
MALLOC = ((_MMAP_THRESHOLD, 4 << 20), (_TRIM_THRESHOLD, 8 << 20), (_ARENA_MAX, 1))
"""`mallopt(3)`."""
BUS = "bus"
RETRY_S = 0.2
TURNS = 5
"""Of the event loop, from a connection to its answer."""
_S = TypeVar("_S", bound=CommonSettings)
_P = TypeVar("_P")


class Runtime(Generic[_S]):
    """What an app gets: its settings, readiness, status page, and the errors to show there."""

    def __init__(self, name: str, settings: _S) -> None:
        self.name = name
        self.settings = settings
        self.readiness = Readiness()
        self.admin = Admin()
        self.started = time.time()
        self.errors: deque[dict[str, Any]] = deque(maxlen=ERRORS_KEPT)
        self.details: Callable[[], dict[str, Any]] = dict
        self.bus: bus.NatsBus | None = None

    def note_error(self, what: str, **data: Any) -> None:
        """Logs an error and keeps it for the status page; the same one again only moves its time."""
        entry = {"event": what, **{k: str(v) for k, v in data.items()}}
        if self.errors and entry.items() <= self.errors[-1].items():
            self.errors[-1]["time"] = time.time()
            return
        log.error(what, **data)
        self.errors.append({"time": time.time(), **entry})

    @property
    def waits_for(self) -> list[str]:
        """What is still awaited; the broker also when it went: who cannot hear it does not follow."""
        away = self.bus is not None and not self.bus.connected
        return [*self.readiness.pending, *([BUS] if away else [])]

    def status(self) -> dict[str, Any]:
        """Version, readiness, errors and what the app adds: the shape of `pykmesh status -o json`."""
        return {
            "process": self.name,
            "instance": self.settings.instance,
            "version": __version__,
            "pid": os.getpid(),
            "started": self.started,
            "ready": not self.waits_for,
            "waits_for": self.waits_for,
            "bus": None if self.bus is None else self.bus.connected,
            "errors": list(self.errors),
            **self.details(),
        }

    async def open_pins(self, opener: Callable[[Path], _P], *awaited: type[Exception]) -> _P:
        """What the opener makes of the pin directory, when bpf_loader has pinned it all.

        `awaited`: the errors that say that it has not yet.
        """
        told = ""
        while True:
            try:
                opened = opener(self.settings.pin_dir)
            except awaited as error:
                if str(error) != told:
                    told = str(error)
                    log.info("pins_awaited", error=told)
                await anyio.sleep(RETRY_S)
                continue
            self.readiness.done("pins")
            return opened

    async def connect_bus(self) -> bus.NatsBus:
        """Waits for the broker; the status says so meanwhile."""
        self.readiness.wait_for(BUS)
        self.bus = await bus.connect(
            self.settings.nats_url,
            self.name,
            self.settings.nats_password_file,
            lambda error: self.note_error("bus_error", error=error),
        )
        self.readiness.done(BUS)
        return self.bus


App = Callable[[Runtime[_S]], Awaitable[None]]


def raise_file_limit() -> None:
    """For who has many descriptors: as many as may be."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def give_way() -> None:
    """Between parts of long work: the admin port and the bus are served meanwhile."""
    for _ in range(TURNS):
        await anyio.lowlevel.checkpoint()


def _tune_memory() -> None:
    """For a mesh of many objects, and responses of many megabytes that come and go.

    Objects live long and hold no cycles: looking at them seldom is enough. What is freed of a part of a
    response is wanted for the next one: given back to the system each time, its pages cost a tenth of a
    sync. And one arena, as threads here work in turn. What is no glibc goes without.
    """
    gc.set_threshold(*GC_THRESHOLDS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOC:
            mallopt(parameter, value)


def main(name: str, kind: type[_S], app: App[_S]) -> None:
    """Runs a process by its settings and exits: 0 when told to end, 78 for wrong settings, 1 otherwise."""
    try:
        settings = load(kind)
        logs.configure(name, settings.log_level, settings.log_format)
    except (SettingsError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)  # noqa: T201  (there is no log yet)
        sys.exit(EXIT_SETTINGS)
    _tune_memory()
    provider = tracing.configure(name, settings.instance, settings.otlp_endpoint)
    code = anyio.run(_run, Runtime(name, settings), app, backend_options={"use_uvloop": True})
    if isinstance(provider, TracerProvider):
        provider.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that waits for somebody silent, such as a name server, is not waited for


async def _run(runtime: Runtime[_S], app: App[_S]) -> int:
    code = 0
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_end_on_signal, tasks.cancel_scope)
            await _start_admin(runtime, tasks)
            log.info("process_started", version=__version__, pid=os.getpid())
            if unknown := misspelt():
                runtime.note_error("settings_unknown", names=", ".join(unknown))
            tasks.start_soon(_report_readiness, runtime)
            await app(runtime)
            tasks.cancel_scope.cancel()
    except* Exception as group:  # the one place where a process's end is told
        for error in _leaves(group):
            log.error("process_failed", error=f"{type(error).__name__}: {error}")
        log.debug("process_failed_where", exc_info=group)
        code = 1
    if runtime.bus is not None:
        await runtime.bus.close()
    log.info("process_ended", code=code)
    return code


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def _end_on_signal(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("signal_received", signal=signal.Signals(number).name)
            scope.cancel()
            return


async def _start_admin(runtime: Runtime[_S], tasks: anyio.abc.TaskGroup) -> None:
    settings, admin = runtime.settings, runtime.admin

    async def readyz(_: Query) -> Page:
        waits_for = runtime.waits_for
        return as_json({"ready": not waits_for, "waits_for": waits_for}, 503 if waits_for else 200)

    admin.page("/livez", lambda: {"alive": True})
    admin.route("/readyz", readyz)
    admin.page("/status", runtime.status)
    admin.page("/version", lambda: {"process": runtime.name, "version": __version__})
    try:
        await tasks.start(admin.serve, settings.admin_host, settings.admin_port)
    except OSError as error:
        where = f"{settings.admin_host}:{settings.admin_port}"
        raise RuntimeError(
            f"admin port {where}: {error.strerror or error}; set PYKMESH_ADMIN_PORT"
        ) from error


async def _report_readiness(runtime: Runtime[_S]) -> None:
    await runtime.readiness.until_ready()
    log.info("process_ready", after_s=round(time.time() - runtime.started, 3))
