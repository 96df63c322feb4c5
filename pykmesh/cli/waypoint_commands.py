"""`pykmesh waypoint`: Gateways of waypoints in the configuration folder, and what became of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Final

import click

from pykmesh.cli.node_commands import Failure
from pykmesh.cli.output import output_option, show
from pykmesh.cli.show_commands import require_running
from pykmesh.files import write_whole
from pykmesh.node.instance import Instance

CLASS = "pykmesh-waypoint"
FOR = ("service", "workload", "all", "none")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_TOLD: Final = (
    ("route", "routes"),
    ("virtual_service", "virtual_services"),
    ("policy", "policies"),
    ("authentication", "authentications"),
    ("destination", "destinations"),
)
_COLUMNS = ("WAYPOINT", "CLASS", "READY", "SERVICES", "ROUTES", "PROBLEMS")


def _check_name(_: click.Context, parameter: click.Parameter, value: str) -> str:
    if not _NAME.fullmatch(value):
        raise click.BadParameter(f"{value!r} is no name of Kubernetes'", param_hint=f"--{parameter.name}")
    return value


def _which(function: Any) -> Any:
    for option in (
        click.option(
            "-n", "--namespace", default="default", callback=_check_name, help="Of the Gateway (default)."
        ),
        click.option("--name", default="waypoint", callback=_check_name, help="Of the Gateway (waypoint)."),
    ):
        function = option(function)
    return function


@click.group()
def waypoint() -> None:
    """Waypoints: Envoys that services with the label istio.io/use-waypoint go by way of."""


@waypoint.command()
@_which
@click.option("--for", "for_", type=click.Choice(FOR), default="service", help="What goes by way of it.")
def generate(namespace: str, name: str, for_: str) -> None:
    """Print the Gateway of a waypoint."""
    click.echo(_manifest(namespace, name, for_), nl=False)


@waypoint.command()
@_which
@click.option("--for", "for_", type=click.Choice(FOR), default="service", help="What goes by way of it.")
@click.pass_obj
def apply(instance: Instance, /, namespace: str, name: str, for_: str) -> None:
    """Write the Gateway of a waypoint into the folder that the embedded control plane serves."""
    path = _file(instance, namespace, name)
    if others := _others(path, namespace, name):
        raise Failure(f"Gateway {namespace}/{name} is in {others[0]}: change it there")
    try:
        write_whole(path, _manifest(namespace, name, for_))
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from error
    label = f"istio.io/use-waypoint: {name}"
    click.echo(f"waypoint {namespace}/{name} written to {path}; label services or namespaces {label!r}")


@waypoint.command()
@_which
@click.pass_obj
def delete(instance: Instance, /, namespace: str, name: str) -> None:
    """Remove what `apply` wrote. Services that still ask for the waypoint are refused from then on."""
    path = _file(instance, namespace, name)
    try:
        path.unlink()
    except FileNotFoundError as error:
        raise Failure(f"{path} is not there: a Gateway that you wrote yourself is yours to remove") from error
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from error
    click.echo(f"waypoint {namespace}/{name} removed from {path.parent}")


@waypoint.command(name="list")
@output_option
@click.pass_obj
def list_(instance: Instance, /, output: str) -> None:
    """Every waypoint, in a line."""
    found = _waypoints(instance)
    show(output, {"waypoints": found}, _COLUMNS, [_row(each) for each in found])


@waypoint.command()
@click.argument("which", metavar="[NAMESPACE/NAME]", default="")
@output_option
@click.pass_obj
def status(instance: Instance, /, which: str, output: str) -> None:
    """Instances, services, routes and policies of waypoints, and what is wrong with them.

    Exit status 1 when one has no instance that is ready, or something is wrong.
    """
    said = _status(instance)
    found = [each for each in said["waypoints"] if which in ("", each["name"])]
    if which and not found:
        raise Failure(f"no waypoint {which}")
    unenforced, errors = ([], []) if which else (said["policies_unenforced"], said["manifest_errors"])
    kinds, nameless = ([], []) if which else (said["kinds_ignored"], said["names_not_forwarded"])
    unused = [] if which else said["unused"]
    if output == "table":
        without_effect = {one["object"] for one in said["unused"]}
        for each in found:
            _tell(each, without_effect)
        for policy in unenforced:
            click.echo(f"! {policy['policy']} is not enforced: {policy['why']}")
        for error in errors:
            click.echo(f"! {error}")
        for each in unused:
            click.echo(f"not in use: {each['object']}: {each['why']}")
        if kinds:
            click.echo(f"not read: {', '.join(kinds)}")
        for name in nameless:
            click.echo(f"not forwarded: {name} (no SPIFFE name, or ids of another's too)")
    else:
        value = {
            "waypoints": found,
            "policies_unenforced": unenforced,
            "unused": unused,
            "manifest_errors": errors,
            "kinds_ignored": kinds,
            "names_not_forwarded": nameless,
        }
        show(output, value, (), ())
    if unenforced or errors or any(_problems(each) or not (_ready(each) or _sleeps(each)) for each in found):
        sys.exit(1)


def _manifest(namespace: str, name: str, for_: str) -> str:
    import yaml

    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    if for_ != "service":
        metadata["labels"] = {"istio.io/waypoint-for": for_}
    listener = {"name": "mesh", "port": 15008, "protocol": "HBONE"}
    return yaml.safe_dump(
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": metadata,
            "spec": {"gatewayClassName": CLASS, "listeners": [listener]},
        },
        sort_keys=False,
    )


def _file(instance: Instance, namespace: str, name: str) -> Path:
    """Failure where waypoints are an API server's."""
    said = _status(instance)
    if said["kubeconfig"]:
        how = "pykmesh waypoint generate --name NAME | kubectl apply -f -; kubectl delete gateway NAME"
        raise Failure(f"waypoints are in the API server of {said['kubeconfig']}: {how}")
    return Path(said["config_dir"]) / f"waypoint-{namespace}_{name}.yaml"  # no name has a _


def _others(path: Path, namespace: str, name: str) -> list[Path]:
    """Other files of the folder that have the Gateway."""
    from pykmesh.manifests.folder import Folder
    from pykmesh.manifests.objects import Gateway

    folder = Folder(path.parent)
    found = (each for each in folder.read(folder.look()).objects if isinstance(each.object, Gateway))
    of_it = (each for each in found if (each.object.namespace, each.object.name) == (namespace, name))
    return [path.parent / each.file for each in of_it if path.parent / each.file != path]


def _status(instance: Instance) -> dict[str, Any]:
    from pykmesh.node.ask import fetch

    found = require_running(instance)
    try:
        status: dict[str, Any] = fetch(found.ports.waypoint_mgr, "/status")
    except OSError as error:
        why = "it runs with --config-dir or --kubeconfig only" if error.errno else str(error)
        raise Failure(f"waypoint_mgr does not answer: {why}") from error
    return status


def _waypoints(instance: Instance) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _status(instance)["waypoints"]
    return found


def _ready(found: dict[str, Any]) -> int:
    return sum(instance["ready"] for instance in found["instances"])


def _sleeps(found: dict[str, Any]) -> bool:
    """It was scaled to none."""
    return bool(found["scaling"]) and not found["scaling"]["size"]


def _problems(found: dict[str, Any]) -> list[str]:
    """What is wrong, a line each."""
    lines = [
        f"{one[what]}: {one['type']} is {one['status']} ({one['parent']}): {one['reason']}: {one['message']}"
        for what, key in _TOLD
        for one in found[key]
        if (one["status"] == "True") != (one["type"] in ("Accepted", "ResolvedRefs", "Enforced"))
    ]
    lines += [f"conflict: {conflict}" for conflict in found["conflicts"]]
    if found["reduced"]:
        what = "without VirtualServices, DestinationRules and keys of tokens: Envoy refused"
        lines.append(f"it runs {what}: {found['reduced']}")
    lines += found["annotations_misread"]
    lines += [
        f"namespace {namespace} asks for it, and no listener lets it in (allowedRoutes): refused"
        for namespace in found["namespaces_turned_away"]
    ]
    lines += [
        f"workload {workload} asks for it and goes without: its address is the node's, another's or elsewhere"
        for workload in found["workloads_unguarded"]
    ]
    lines += [
        f"service {service} asks for it and goes without: it has no address, its pods are asked at theirs"
        for service in found["services_unguarded"]
    ]
    if found["scaling"] and found["scaling"]["error"]:
        lines.append(found["scaling"]["error"])
    for instance in found["instances"]:
        if instance["error"]:
            lines.append(f"{instance['name']}: {instance['error']}")
        refusals = (instance["configuration"] or {}).get("refusals", ())
        lines += [f"{instance['name']} refused its configuration: {each['message']}" for each in refusals]
    return lines


def _row(found: dict[str, Any]) -> tuple[Any, ...]:
    ready = f"{_ready(found)}/{len(found['instances'])}"
    routes = len({route["route"] for route in found["routes"]})
    return found["name"], found["class"], ready, len(found["services"]), routes, len(_problems(found))


def _tell(found: dict[str, Any], unused: set[str]) -> None:
    """`unused`: what does not count, though it could."""
    click.echo(f"{found['name']} ({found['class']})")
    if scaling := found["scaling"]:
        limits = f"{scaling['size']} of {scaling['least']} to {scaling['most']} instances"
        click.echo(f"  {limits}: {scaling['why']}; connections come in at {scaling['front']}")
    for instance in found["instances"]:
        state = "ready" if instance["ready"] else "leaving" if instance["leaving"] else "not ready"
        restarts = f", started again {instance['restarts']} times" if instance["restarts"] else ""
        where = f"pid {instance['pid']}, port {instance['port']}"
        click.echo(f"  instance {instance['name']}: {state}, {where}{restarts}")
    for service in found["services"]:
        click.echo(f"  service {service}")
    for workload in found["workloads"]:
        click.echo(f"  workload {workload}")
    for what, key in _TOLD:
        for name in sorted({one[what] for one in found[key]} - unused):
            click.echo(f"  {what.replace('_', ' ')} {name}")
    for problem in _problems(found):
        click.echo(f"  ! {problem}")


COMMANDS = [waypoint]
