"""Running an instance: checks what can be checked, starts the processes, waits until they are ready."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import Final

import anyio
import anyio.to_thread
import structlog

from pykmesh.kernel import pins
from pykmesh.node import broker, mesh
from pykmesh.node import instance as instances
from pykmesh.node.ask import fetch, supervised
from pykmesh.node.instance import Instance, InstanceError
from pykmesh.node.mesh import Options
from pykmesh.node.supervisor import Supervisor

log = structlog.get_logger(__name__)

POLL_S: Final = 0.05


def processes(options: Options) -> list[str]:
    """Those that have an administrative page."""
    names = mesh.service_names(options)
    return [*names, "control_plane"] if options.config_dir else names


async def until_ready(
    instance: Instance, names: list[str], deadline_s: float, poll_s: float = POLL_S
) -> None:
    """Waits for every process. InstanceError names what each one still waits for, and its last error."""
    waiting: dict[str, str] = dict.fromkeys(names, "not started")
    with anyio.move_on_after(deadline_s):
        while waiting:
            for name in list(waiting):
                try:
                    found = await anyio.to_thread.run_sync(fetch, getattr(instance.ports, name), "/readyz")
                except OSError:
                    continue
                waiting[name] = ", ".join(found.get("waits_for", [])) or "nothing"
                if found.get("ready"):
                    del waiting[name]
            await anyio.sleep(poll_s)
    if waiting:
        errors = await anyio.to_thread.run_sync(_last_errors, instance, list(waiting))
        what = "; ".join(
            f"{name} waits for: {task}" + (f" (last error: {errors[name]})" if errors[name] else "")
            for name, task in waiting.items()
        )
        raise InstanceError(f"not ready after {deadline_s:g} s: {what} (logs in {instance.run_dir / 'logs'})")


def _last_errors(instance: Instance, names: list[str]) -> dict[str, str]:
    """Of each process, what its status says went wrong last, or how it ended; "" for nothing."""
    known = supervised(instance)
    found = {name: str(known.get(name, {}).get("ended", "")) for name in names}
    for name in names:
        with contextlib.suppress(OSError):
            if errors := fetch(getattr(instance.ports, name), "/status")["errors"]:
                found[name] = ": ".join(str(v) for key, v in errors[-1].items() if key != "time")
    return found


def _prepare_pins(instance: Instance) -> None:
    """Before anything starts: what bpf_loader would fail at again and again."""
    try:
        pins.prepare(instance.pin_dir)
        os.close(pins.lock(instance.pin_dir))
    except pins.PinDirectoryError as error:
        raise InstanceError(f"{error}; choose another with --pin-dir") from error


class Running:
    """A mesh that runs in this process's task group: `start` returns when the processes are started."""

    def __init__(
        self, instance: Instance, options: Options, echo: Callable[[str, str], None] | None = None
    ) -> None:
        self.instance = instance
        self.options = options
        self._echo = echo
        self.supervisor: Supervisor

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; raises InstanceError when it cannot begin. The kernel's side stays."""
        made = instances.not_there(self.instance, mesh.PROCESSES)
        held = None
        try:
            held = instances.prepare(self.instance)
            await self._begin()
            task_status.started()
            made = []
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._tell)
                await self.supervisor.run()
        finally:
            if held is not None:
                instances.forget(self.instance)
                instances.take_back(made)
                os.close(held)

    async def _begin(self) -> None:
        """InstanceError when something is in the way. What is outside the run-time directory comes last."""
        instances.reserve_ports(self.instance.ports, mesh.port_names(self.options))
        instances.write(self.instance, list(broker.PERMISSIONS))
        self.supervisor = Supervisor(mesh.specs(self.instance, self.options), self._echo)
        await anyio.to_thread.run_sync(_prepare_pins, self.instance)
        log.info("supervisor_started", pid=os.getpid(), run_dir=str(self.instance.run_dir))

    async def _tell(self) -> None:
        """The supervisor's state, to each who connects. Without the socket the mesh runs all the same."""
        try:
            async with await anyio.create_unix_listener(self.instance.supervisor_socket, mode=0o600) as door:
                await door.serve(self._answer)
        except OSError as error:
            log.warning("supervisor_not_asked", error=error.strerror or str(error))

    async def _answer(self, asker: anyio.abc.SocketStream) -> None:
        async with asker:
            with contextlib.suppress(anyio.BrokenResourceError):
                await asker.send(json.dumps(self.supervisor.state()).encode())

    async def until_ready(self, deadline_s: float, poll_s: float = POLL_S) -> None:
        await until_ready(self.instance, processes(self.options), deadline_s, poll_s)
