"""Wires the loader: pin directory, programs, enrolment, its door. Needs no bus."""

from __future__ import annotations

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
from pykmesh.kernel.upgrade import Copied, Gate, Staging, UpgradeError, pin_again
from pykmesh.process import Runtime, raise_file_limit
from services.bpf_loader.door import Door
from services.bpf_loader.enrollment import Enrollment
from services.bpf_loader.pods import HOW_TO_RESIZE
from services.bpf_loader.waypoints import Waypoints

log = structlog.get_logger(__name__)

SWEEP_INTERVAL_S = 5.0


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
    keep = partial(_keep_pinned, runtime, found.programs)
    mends: list[Callable[[], object]] = [
        partial(_mend, runtime, mend) for mend in (keep, found.enrollment.sweep, found.waypoints.sweep)
    ]
    sweeps: list[Callable[[], object]] = [*mends, partial(_mend, runtime, found.waypoints.read_one)]
    refuses_with = "ECONNREFUSED" if await anyio.to_thread.run_sync(can_set_retval) else "EPERM"
    taken = {"object": found.programs.object, "copied": found.copied and msgspec.to_builtins(found.copied)}
    runtime.details = lambda: {**taken, **_details(settings, found.enrollment, refuses_with)}
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Door(settings.enroll_socket, found.enrollment, found.waypoints, turn).serve)
            tasks.start_soon(_sweep, sweeps, turn)
            runtime.readiness.done("programs")
    finally:
        with anyio.CancelScope(shield=True):  # what has no pin goes with this process
            for mend in mends:
                await anyio.to_thread.run_sync(mend)
        found.programs.close()
        os.close(found.lock)


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
        enrollment.complete()
        updated = waypoints.exchange() + enrollment.exchange()
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


def _keep_pinned(runtime: Runtime[LoaderSettings], programs: Programs) -> None:
    """Also where the directory itself, or its bpffs, was taken away."""
    pin_dir, is_gone = runtime.settings.pin_dir, not pins.is_prepared(runtime.settings.pin_dir)
    if is_gone:
        pins.prepare(pin_dir)
        pins.lock(pin_dir)  # until this process ends
    _note_missing(runtime, programs.pin_again(pins.maps_dir(pin_dir)))
    if is_gone:
        runtime.note_error("pin_directory_was_missing", pin_dir=str(pin_dir), effect="made again")
        gate = Gate(pin_dir)
        gate.opened()
        with gate.closed():  # writers hold locks on what was there before: they begin anew
            pass
        gate.close()


def _note_missing(runtime: Runtime[LoaderSettings], maps: list[str]) -> None:
    if maps:
        runtime.note_error("pins_were_missing", maps=", ".join(maps), effect="pinned again")


def _mend(runtime: Runtime[LoaderSettings], mend: Callable[[], object]) -> None:
    """What cannot be mended is told, and tried again: to end would drop what this process alone holds."""
    try:
        mend()
    except (OSError, pins.PinDirectoryError, UpgradeError) as error:
        runtime.note_error("not_mended", error=error, effect="what is attached stays; it is tried again")


async def _sweep(mends: list[Callable[[], object]], turn: anyio.Lock) -> None:
    while True:
        await anyio.sleep(SWEEP_INTERVAL_S)
        async with turn:
            for mend in mends:
                await anyio.to_thread.run_sync(mend)


def _details(settings: LoaderSettings, enrollment: Enrollment, refuses_with: str) -> dict[str, Any]:
    """On the event loop: nothing is looked up."""
    return {
        "pin_dir": str(settings.pin_dir),
        "refuses_with": refuses_with,
        "enrolled": enrollment.shown,
    }
