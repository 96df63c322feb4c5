"""Commands that only look: status, get, version."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Container
from itertools import islice
from typing import Any

import click

from pykmesh import __version__
from pykmesh.cli.node_commands import Failure
from pykmesh.cli.output import age, output_option, show
from pykmesh.node.instance import Instance, how_to_start

STATUS_VERSION = 1
NAMED_MAX = 3
"""In a line of `status`; `-o json` has all."""
_STATUS_COLUMNS = ("PROCESS", "VERSION", "READY", "RESTARTS", "WAITS FOR", "LAST SYNC", "ERRORS", "DETAIL")


def require_running(instance: Instance) -> Instance:
    from pykmesh.node.ask import find

    found = find(instance)
    if found is None:
        where = f"looked in {instance.run_dir}"
        raise Failure(f"instance {instance.name} is not running ({where}): {how_to_start(instance)}")
    return found


def _process_status(port: int) -> dict[str, Any] | None:
    from pykmesh.node.ask import fetch

    try:
        found: dict[str, Any] = fetch(port, "/status")
    except OSError:
        return None
    return found


@click.command()
@click.option(
    "--wait",
    "wait_s",
    type=float,
    is_flag=False,
    flag_value=30.0,
    default=0.0,
    help="Wait until all are ready (30 s).",
)
@output_option
@click.pass_obj
def status(instance: Instance, wait_s: float, output: str) -> None:
    """Of each process: version, ready or what it waits for, restarts, last sync, errors.

    Exit status 1 when one is not ready.
    """
    found = require_running(instance)
    deadline = time.monotonic() + wait_s
    while not (value := status_of(found))["ready"] and time.monotonic() < deadline:
        time.sleep(0.1)
    restarts, ended = value["restarts"], value["ended"]
    rows = [
        _status_row(name, process, restarts[name], ended.get(name, ""))
        for name, process in value["processes"].items()
    ]
    show(output, value, _STATUS_COLUMNS, rows)
    if not value["ready"]:
        sys.exit(1)


def status_of(instance: Instance) -> dict[str, Any]:
    """What `status -o json` shows of one that runs."""
    from pykmesh.node.ask import supervised

    supervisor = supervised(instance)
    processes = {"nats": _broker_status(instance, supervisor.get("nats", {}).get("pid"))}
    for name in _names(instance, supervisor):
        processes[name] = _process_status(getattr(instance.ports, name))
    return {
        "schema": STATUS_VERSION,
        "instance": instance.name,
        "ready": all(process and process["ready"] for process in processes.values()),
        "restarts": {
            name: supervisor[name]["restarts"] if name in supervisor else None for name in processes
        },
        "ended": {name: each["ended"] for name, each in supervisor.items() if each.get("ended")},
        "processes": processes,
    }


def _broker_status(instance: Instance, pid: int | None) -> dict[str, Any] | None:
    """The broker is not ours: what can be said of it, in the shape of the others."""
    from pykmesh.node.ask import broker_version

    version = broker_version(instance)
    if version is None:
        return None
    entry = {"process": "nats", "instance": instance.name, "version": version, "pid": pid}
    return {**entry, "ready": True, "waits_for": [], "errors": []}


def _names(instance: Instance, supervised: Container[str]) -> list[str]:
    """Of those that not every mesh has: what the supervisor keeps running, or what answers."""

    def there(*names: str) -> list[str]:
        return [
            name
            for name in names
            if name in supervised or _process_status(getattr(instance.ports, name)) is not None
        ]

    always = ["bpf_loader", "map_writer", "xds_client", "telemetry"]
    return [*there("control_plane"), *always, *there("dns_proxy", "waypoint_mgr")]


def _status_row(
    name: str, process: dict[str, Any] | None, restarts: int | None, ended: str
) -> tuple[Any, ...]:
    """`ended`: how it ended last."""
    if process is None:
        detail = f"does not answer; it ended with {ended}" if ended else "does not answer"
        return (name, "-", "no", restarts, "-", "-", "-", detail)
    waits = ", ".join(process["waits_for"])
    errors = process["errors"]
    last = f"{len(errors)}: {errors[-1]['event']}" if errors else "0"
    synced = process.get("last_sync") or process.get("last_response") or 0
    return (
        name,
        process["version"],
        "yes" if process["ready"] else "no",
        restarts,
        waits,
        f"{age(time.time() - synced)} ago" if synced else "-",
        last,
        _detail(name, process),
    )


def _first(names: Collection[str]) -> str:
    return ", ".join([*islice(names, NAMED_MAX), *(["…"] if len(names) > NAMED_MAX else [])])


def _detail(name: str, process: dict[str, Any]) -> str:
    """Nothing of a process that has only just begun, and says nothing of its work yet."""
    if name == "xds_client" and "connected" in process:
        state = "connected" if process["connected"] else "disconnected"
        behind = f", {process['not_in_kernel']} batches not in the kernel" if process["not_in_kernel"] else ""
        return f"{state} to {process['xds_address']}, {process['acks']} ACK, {process['nacks']} NACK{behind}"
    if name == "map_writer" and "services" in process:
        policy = process["policy_not_enforced"]
        note = f", POLICY NOT ENFORCED for {policy} workloads" if policy else ""
        missing = process["policies_missing"]
        note += f", POLICY NOT SENT: {_first(missing)}" if missing else ""
        unread = process.get("policies_unread", [])
        note += f", POLICY NOT UNDERSTOOD: {_first(unread)}" if unread else ""
        refused = f", {len(process['refused'])} refused" if process["refused"] else ""
        covered = [*process.get("services_covered", {}).values()]
        hidden = f", {covered[0]}{' …' if len(covered) > 1 else ''}" if covered else ""
        wrong, kept = process.get("unreadable", 0), _first(process.get("kept_as_in_maps", []))
        note += f", {wrong} SAID WRONGLY and not known otherwise" if wrong else ""
        note += f" (kept as in the maps: {kept})" if kept else ""
        elsewhere = _first([network or "(no name)" for network in process.get("networks_instead", [])])
        note += f", NOTHING IN THIS NODE'S NETWORK, all in {elsewhere}" if elsewhere else ""
        return f"{process['services']} services, {process['workloads']} workloads{refused}{hidden}{note}"
    if name == "bpf_loader" and "enrolled" in process:
        return f"{len(process['enrolled'])} enrolled"
    if name == "dns_proxy" and "pods" in process:
        waiting = f", {len(process['waiting'])} waiting" if process["waiting"] else ""
        return f"{process['pods']} pods{waiting}, {process['answered']} of {process['requests']} answered"
    if name == "waypoint_mgr" and "waypoints" in process:
        waypoints = process["waypoints"]
        ready = sum(instance["ready"] for waypoint in waypoints for instance in waypoint["instances"])
        return f"{len(waypoints)} waypoints, {ready} instances ready"
    if name == "nats" and process["pid"]:
        return f"pid {process['pid']}"
    if name == "control_plane" and "manifest_errors" in process:
        errors, kinds = process["manifest_errors"], process.get("kinds_ignored", [])
        wrong = f", {len(errors)} errors in the folder" if errors else ""
        unread = f", not read: {_first(kinds)}" if kinds else ""
        return f"{process['resources']} resources{wrong}{unread}"
    return ""


@click.command()
@click.argument("what", type=click.Choice(["services", "workloads", "endpoints", "policies", "pods"]))
@click.option(
    "--from",
    "source",
    type=click.Choice(["xds", "state", "bpf"]),
    default="state",
    help="What the control plane said, what map_writer makes of it, or what the kernel holds.",
)
@click.option("-n", "--namespace", default="", help="Only this namespace.")
@output_option
@click.pass_obj
def get(instance: Instance, what: str, source: str, namespace: str, output: str) -> None:
    """Services, workloads, endpoints, policies or enrolled pods, as one of the three sees them.

    What the control plane said and was not accepted, or has no room here, stands there with its ERROR.
    """
    from pykmesh.cli import get_sources

    try:
        entries = get_sources.read(instance, what, source)
    except OSError as error:
        raise Failure(f"{source} of {what}: {error.strerror or error}") from error
    except get_sources.SourceError as error:
        raise Failure(str(error)) from error
    if namespace:
        entries = [entry for entry in entries if get_sources.namespace_of(entry) == namespace]
    columns, rows = get_sources.rows(what, entries, source)
    value = {"schema": STATUS_VERSION, "from": source, what: entries}
    show(output, value, columns, rows)
    if output == "table":
        click.echo(f"({len(rows)} {what} from {source})", err=True)


@click.command()
@output_option
@click.pass_obj
def version(instance: Instance, output: str) -> None:
    """Of this program and of each process that runs."""
    from pykmesh.node.ask import find

    found = find(instance)
    versions = {"pykmesh": __version__}
    if found is not None:
        for name in _names(found, ()):
            process = _process_status(getattr(found.ports, name))
            versions[name] = process["version"] if process else "does not answer"
    show(output, versions, ("PROCESS", "VERSION"), list(versions.items()))


COMMANDS = [status, get, version]
