"""Processes of the control side, run as `pykmesh up` runs them, with any settings, and what they say."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from pykmesh.kernel import pins
from pykmesh.node import broker, instance, mesh, run
from pykmesh.node.instance import Instance
from pykmesh.node.mesh import Options
from pykmesh.node.supervisor import Supervisor

T = TypeVar("T")
DEADLINE_S = 60.0
POLL_S = 0.02
CLIENT = ("nats", "xds_client")
ALL = ("nats", "bpf_loader", "map_writer", "xds_client")


async def until(what: str, look: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """What `look` returns once it is true: for what another process does, and tells nobody of."""
    found = look()
    with anyio.move_on_after(deadline_s):
        while not found:
            await anyio.sleep(POLL_S)
            found = look()
    assert found, f"no {what} after {deadline_s} s: {found!r}"
    return found


class MeshNode:
    """An instance whose processes run below this one."""

    def __init__(self, found: Instance, supervisor: Supervisor) -> None:
        self.instance = found
        self.supervisor = supervisor

    @property
    def maps_dir(self) -> Path:
        return pins.maps_dir(self.instance.pin_dir)

    async def page(self, process: str, path: str = "/status") -> Any:
        """What a process's administrative page says."""
        return await anyio.to_thread.run_sync(run.fetch, getattr(self.instance.ports, process), path)

    async def errors(self, process: str) -> list[dict[str, Any]]:
        """Those of its status; not that the broker was not there yet when it began."""
        found = (await self.page(process))["errors"]
        return [error for error in found if error["event"] != "bus_error"]

    async def until_page(self, process: str, holds: Callable[[Any], bool], what: str) -> Any:
        """The status once it `holds`; a process that is away is waited for."""
        said: Any = None
        with anyio.move_on_after(DEADLINE_S):
            while True:
                with contextlib.suppress(OSError):
                    said = await self.page(process)
                    if holds(said):
                        return said
                await anyio.sleep(POLL_S)
        raise AssertionError(f"{process} is not {what} after {DEADLINE_S} s: {said}\n{self.logs()}")

    async def held(self) -> set[str]:
        """Names of the addresses that xds_client has accepted."""
        pages = [await self.page("xds_client", path) for path in ("/services", "/workloads")]
        return {entry["resource"] for page in pages for entry in page}

    def signal(self, process: str, number: signal.Signals) -> None:
        os.kill(self.supervisor.pids[process], number)

    async def kill(self, process: str) -> None:
        """Kills it and waits until it runs again."""
        before = self.supervisor.pids[process]
        self.signal(process, signal.SIGKILL)
        await until(f"{process} again", lambda: self.supervisor.pids.get(process, before) != before)

    async def until_ready(self, *names: str) -> None:
        await run.until_ready(self.instance, list(names), DEADLINE_S)

    def logs(self) -> str:
        files = sorted((self.instance.run_dir / "logs").glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files)


@contextlib.asynccontextmanager
async def running(
    directory: Path, options: Options, processes: Sequence[str] = ALL, *, ready: bool = True
) -> AsyncIterator[MeshNode]:
    """Runs the processes for as long as the block runs; removes what they made, whatever happened."""
    found = instance.named(
        f"c-{secrets.token_hex(3)}", directory / "run", directory / "bpf" / "mesh", instance.free_ports({})
    )
    held = instance.prepare(found)
    try:
        instance.write(found, list(broker.PERMISSIONS))
        supervisor = Supervisor([spec for spec in mesh.specs(found, options) if spec.name in processes])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supervisor.run)
            node = MeshNode(found, supervisor)
            if ready:
                await node.until_ready(*(name for name in processes if name != "nats"))
            yield node
            tasks.cancel_scope.cancel()
    finally:
        os.close(held)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(_clean, found)


def _clean(found: Instance) -> None:
    pins.uninstall(found.pin_dir)
    subprocess.run(["umount", "--lazy", found.pin_dir], check=False, capture_output=True, timeout=10)
