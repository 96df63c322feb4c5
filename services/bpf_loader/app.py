"""Wires the loader: pin directory, programs, enrolment, its door. Needs no bus."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import msgspec
import structlog

from pykmesh.contracts.settings import LoaderSettings
from pykmesh.kernel import cgroups, pins
from pykmesh.kernel.hooks import HOOKS, Programs, ProgramSettings, can_set_retval
from pykmesh.kernel.layout import check_enums, check_objects
from pykmesh.kernel.records import DNS_SLOTS, network_id
from pykmesh.kernel.upgrade import Copied, Gate, Staging, pin_again
from pykmesh.process import Runtime, raise_file_limit
from services.bpf_loader.door import Door
from services.bpf_loader.enrollment import Enrollment
from services.bpf_loader.pods import HOW_TO_RESIZE
from services.bpf_loader.waypoints import Waypoints

log = structlog.get_logger(__name__)

SWEEP_INTERVAL_S = 5.0
READ_BOTH_S = 15.0
"""Longer than a connection may wait for an instance of its waypoint."""


async def run(runtime: Runtime[LoaderSettings]) -> None:
    """Loads, adopts what is attached, then serves enrolment until cancelled. Exit detaches nothing."""
    settings = runtime.settings
    runtime.readiness.wait_for("programs")
    raise_file_limit()  # ten links a pod
    found = await anyio.to_thread.run_sync(take_over, settings)
    _note_missing(runtime, found.were_missing)
    for kept in found.programs.kept_sizes:
        runtime.note_error("map_size_kept", **kept._asdict(), to_change=HOW_TO_RESIZE)
    turn = anyio.Lock()
    pinned = _Pinned(runtime, found)
    mends: list[Callable[[], object]] = [
        partial(_mend, runtime, mend) for mend in (pinned.keep, found.enrollment.sweep, found.waypoints.sweep)
    ]
    refuses_with = "ECONNREFUSED" if await anyio.to_thread.run_sync(can_set_retval) else "EPERM"
    taken = {"object": found.programs.object, "copied": found.copied and msgspec.to_builtins(found.copied)}
    runtime.details = lambda: {**taken, **_details(settings, found.enrollment, refuses_with)}
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Door(settings.enroll_socket, found.enrollment, found.waypoints, turn).serve)
            tasks.start_soon(_sweep, mends, turn)
            tasks.start_soon(_read_one, partial(_mend, runtime, found.waypoints.read_one), turn)
            runtime.readiness.done("programs")
    finally:
        with anyio.CancelScope(shield=True):  # what has no pin goes with this process
            for mend in mends:
                await anyio.to_thread.run_sync(mend)
        found.programs.close()
        pinned.close()


class TakenOver(NamedTuple):
    """What a loader has from its start to its end."""

    lock: int
    programs: Programs
    enrollment: Enrollment
    waypoints: Waypoints
    copied: Copied | None
    were_missing: list[str]
    """Maps that had no pin, and have one again."""


def take_over(settings: LoaderSettings) -> TakenOver:
    """Loads the programs, gives them to all that is attached, and their maps what another release's hold.

    Blocks. Whoever is ended in its midst leaves what the next one goes on from.
    """
    check_enums()
    check_objects()
    root = settings.cgroup_root or cgroups.find_root()
    if pins.prepare(settings.pin_dir):
        log.info("bpffs_mounted", pin_dir=str(settings.pin_dir))
    lock = pins.lock(settings.pin_dir)
    were_missing = pin_again(settings.pin_dir)
    staging = Staging(settings.pin_dir)
    programs = _load(settings, staging)
    waypoints = Waypoints(settings.pin_dir, programs)
    if "handoffs" in staging.paths:
        waypoints.read_both(root)
    with staging.taken_over() as copied:
        enrollment = Enrollment(settings.pin_dir, root, settings.instance, settings.network, programs)
        updated = waypoints.exchange()  # who reads notes comes before who writes them
        enrollment.complete()
        updated += enrollment.exchange()
    enrollment.mend()
    waypoints.sweep()
    others = pins.remove_others(pins.links_dir(settings.pin_dir), {hook.program for hook in HOOKS})
    if others:
        log.info("programs_of_another_release_removed", programs=others)
    if copied is not None:
        log.info("maps_copied", **msgspec.structs.asdict(copied))
    log.info(
        "programs_loaded",
        object=programs.object,
        why_not_the_first=programs.why_not_the_first,
        links_updated=updated,
        pin_dir=str(settings.pin_dir),
    )
    return TakenOver(lock, programs, enrollment, waypoints, copied, were_missing)


def _load(settings: LoaderSettings, staging: Staging) -> Programs:
    sizes = {
        "services": settings.services_max,
        "endpoints": settings.endpoints_max,
        "addresses": settings.addresses_max,
        "ranges": settings.ranges_max,
        "pods": settings.pods_max,
        "identities": settings.pods_max,
        "opens": settings.opens_max,
        "datagrams": settings.datagrams_max,
        "affinities": settings.affinities_max,
        "loads": settings.loads_max,
        "shunned": settings.shunned_max,
        "handoffs": settings.handoffs_max,
        "dns_listeners": settings.pods_max * DNS_SLOTS,
        "dns_servers": settings.pods_max * DNS_SLOTS,
        "flows": settings.flows_bytes,
    }
    fixed = ProgramSettings(
        instance_name=settings.instance,
        node_network=network_id(settings.network),
        has_set_retval=can_set_retval(),
        has_telemetry=settings.telemetry,
        shun_ns=round(settings.passive_health_s * 1e9),
    )
    return Programs(pins.maps_dir(settings.pin_dir), sizes, fixed, staging.paths, staging.room)


class _Pinned:
    """Keeps pinned what is loaded, also where the directories, or their bpffs, are taken away."""

    def __init__(self, runtime: Runtime[LoaderSettings], found: TakenOver) -> None:
        self._runtime = runtime
        self._programs = found.programs
        self._lock = found.lock
        self._is_known = True
        """To writers: that the directories are others than those on which they have locks."""

    def keep(self) -> None:
        pin_dir = self._runtime.settings.pin_dir
        if not pins.is_prepared(pin_dir):
            self._is_known = False
            pins.prepare(pin_dir)
            self._runtime.note_error("pin_directory_was_missing", pin_dir=pin_dir, effect="made again")
        if not os.path.samestat(os.fstat(self._lock), pin_dir.stat()):
            before, self._lock = self._lock, pins.lock(pin_dir)
            os.close(before)
        _note_missing(self._runtime, self._programs.pin_again(pins.maps_dir(pin_dir)))
        if not self._is_known:
            with contextlib.closing(Gate(pin_dir)) as gate:
                gate.opened()
                with gate.closed():  # whoever writes begins anew
                    self._is_known = True

    def close(self) -> None:
        os.close(self._lock)


def _note_missing(runtime: Runtime[LoaderSettings], maps: list[str]) -> None:
    if maps:
        runtime.note_error("pins_were_missing", maps=", ".join(maps), effect="pinned again")


def _mend(runtime: Runtime[LoaderSettings], mend: Callable[[], object]) -> None:
    """What cannot be mended is told, and tried again: to end would drop what this process alone holds."""
    try:
        mend()
    except Exception as error:  # noqa: BLE001  (whatever it is)
        told = f"{type(error).__name__}: {error}"
        runtime.note_error("not_mended", error=told, effect="what is attached stays; it is tried again")


async def _sweep(mends: list[Callable[[], object]], turn: anyio.Lock) -> None:
    while True:
        await anyio.sleep(SWEEP_INTERVAL_S)
        async with turn:
            for mend in mends:
                await anyio.to_thread.run_sync(mend)


async def _read_one(read_one: Callable[[], object], turn: anyio.Lock) -> None:
    await anyio.sleep(READ_BOTH_S)
    async with turn:
        await anyio.to_thread.run_sync(read_one)


def _details(settings: LoaderSettings, enrollment: Enrollment, refuses_with: str) -> dict[str, Any]:
    """On the event loop: nothing is looked up."""
    return {
        "pin_dir": str(settings.pin_dir),
        "refuses_with": refuses_with,
        "enrolled": enrollment.shown,
    }
