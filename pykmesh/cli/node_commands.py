"""Commands that change a node: up, down, uninstall, enroll, unenroll, check."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from pykmesh.cli.output import output_option, show
from pykmesh.node.instance import (
    DEFAULT_NAME,
    PORT_NAMES,
    Instance,
    InstanceError,
    command,
    free_ports,
    running,
)


class Failure(click.ClickException):
    """One clear line, exit status 1."""

    exit_code = 1


def _parse_ports(values: tuple[str, ...], *, free: bool) -> Any:
    import msgspec

    from pykmesh.node.instance import Ports

    chosen: dict[str, int] = {}
    for value in values:
        name, _, number = value.partition("=")
        if name not in PORT_NAMES or not number.isdigit() or int(number) > 65535:
            raise click.BadParameter(
                f"{value!r}: NAME=NUMBER with a name of {', '.join(PORT_NAMES)}", param_hint="--port"
            )
        chosen[name] = int(number)
    if free:
        return free_ports(chosen)
    return msgspec.structs.replace(Ports(), **chosen)


def _parse_settings(values: tuple[str, ...]) -> dict[str, str]:
    """By environment names; a name that no process has is an error."""
    from pykmesh.contracts import settings

    found: dict[str, str] = {}
    for value in values:
        name, given, text = value.partition("=")
        if not given or name not in settings.NAMES:
            raise click.BadParameter(f"{value!r}: NAME=VALUE with a setting's name", param_hint="--set")
        found[settings.ENVIRONMENT_PREFIX + name.upper()] = text
    return found


@click.command()
@click.option(
    "--config-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Serve this folder of YAML with the embedded control plane.",
)
@click.option(
    "--xds-address",
    default="",
    metavar="HOST:PORT",
    help="Follow this control plane (istiod: 15010 plaintext, 15012 TLS).",
)
@click.option(
    "--xds-root-cert",
    type=click.Path(path_type=Path),
    help="Its root certificate: connect by TLS.",
)
@click.option(
    "--xds-token-file", type=click.Path(path_type=Path), help="Bearer token, read again for each connection."
)
@click.option(
    "--xds-server-name", default="", help="The name in its certificate, where it is not the address's."
)
@click.option("--node-name", default="", help="The Kubernetes node (this host's name).")
@click.option("--namespace", default="istio-system", help="The namespace that the client says it is of.")
@click.option("--network", default="", help="This node's network, as the control plane names it.")
@click.option(
    "--cluster-id", default="Kubernetes", help="This node's cluster, as the control plane names it."
)
@click.option(
    "--cgroup-root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where cgroup v2 is mounted (found by itself).",
)
@click.option(
    "--refuse-unenforced-policy",
    is_flag=True,
    help="Refuse connections to workloads with policies, which are not enforced yet.",
)
@click.option(
    "--dns",
    is_flag=True,
    help="Answer enrolled pods' questions about names of services; all others go where they were meant to.",
)
@click.option(
    "--waypoint-address",
    default="",
    metavar="IP",
    help="Where waypoints listen, for this node's pods (the address of its default route).",
)
@click.option(
    "--waypoint-netns",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The network namespace that waypoints run in (this one).",
)
@click.option(
    "--mesh-key-file",
    type=click.Path(path_type=Path),
    help="The mesh's key, the same on all nodes: waypoints serve other nodes' pods too.",
)
@click.option(
    "--kubeconfig",
    default="",
    metavar="FILE",
    help="Run the waypoints of this API server on this node; with --xds-address.",
)
@click.option(
    "--otlp-endpoint",
    default="",
    envvar="OTEL_EXPORTER_OTLP_ENDPOINT",
    help="Send traces there (OTLP over HTTP).",
)
@click.option(
    "--port", "ports", multiple=True, metavar="NAME=NUMBER", help=f"Another port: {', '.join(PORT_NAMES)}."
)
@click.option("--free-ports", "free", is_flag=True, help="Take free ports for all that are not given.")
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the processes, such as endpoints_max.",
)
@click.option("-d", "--detach", is_flag=True, help="Run behind; return when it is ready.")
@click.option("--behind", is_flag=True, hidden=True)
@click.option("--check", is_flag=True, hidden=True)
@click.pass_obj
def up(
    instance: Instance,
    /,
    ports: tuple[str, ...],
    settings: tuple[str, ...],
    detach: bool,
    behind: bool,
    check: bool,
    free: bool,
    **values: Any,
) -> None:
    """Run the mesh on this node. Ending it (Ctrl-C, `pykmesh down`) leaves traffic as it is."""
    import msgspec

    from pykmesh.contracts.settings import SettingsError
    from pykmesh.kernel.support import obstacle
    from pykmesh.node.mesh import Options, check_settings

    options = Options(**values, settings=_parse_settings(settings))
    if (options.config_dir is None) == (not options.xds_address):
        raise click.UsageError("give either --config-dir or --xds-address")
    if options.config_dir and options.kubeconfig:
        raise click.UsageError(
            "with --config-dir waypoints are in that folder: --kubeconfig is of an istiod's cluster"
        )
    _check_readable(options)
    if problem := obstacle(instance.pin_dir):
        raise Failure(problem)
    instance = msgspec.structs.replace(instance, ports=_parse_ports(ports, free=free))
    try:
        check_settings(instance, options)
    except SettingsError as error:
        raise Failure(str(error)) from error
    if check:
        return
    if detach:
        _detach(instance)
    else:
        _run(instance, options, behind=behind)


def _check_readable(options: Any) -> None:
    """Failure for a file without which a process would only go on trying."""
    from pykmesh.contracts.handoff import read_mesh_key
    from pykmesh.contracts.settings import IN_CLUSTER, SettingsError

    files = {
        "--xds-root-cert": options.xds_root_cert,
        "--xds-token-file": options.xds_token_file,
        "--kubeconfig": Path(options.kubeconfig) if options.kubeconfig not in ("", IN_CLUSTER) else None,
    }
    for option, path in files.items():
        try:
            if path is not None:
                path.read_bytes()
        except OSError as error:
            raise Failure(f"{option} {path}: {error.strerror}") from error
    if options.mesh_key_file:
        try:
            read_mesh_key(options.mesh_key_file)
        except SettingsError as error:
            raise Failure(f"--mesh-key-file: {error}") from error


def _run(instance: Instance, options: Any, *, behind: bool) -> None:
    import anyio

    from pykmesh import logs
    from pykmesh.node.behind import of_this_release

    os.environ.update(of_this_release({}))
    if sys.stderr.isatty():
        options.settings.setdefault("PYKMESH_LOG_FORMAT", "console")
    with logs.LogFile(instance.log("supervisor")) as file:
        logs.configure("supervisor", options.log_level, "auto", file.write_text if behind else _say)
        try:
            code = anyio.run(_foreground, instance, options, None if behind else _echo)
        except* InstanceError as group:
            raise Failure(_ended("; ".join(_texts(group)), behind=behind)) from None
        except* Exception as group:
            _ended(repr(group), behind=behind)
            raise
    sys.exit(code)


def _texts(group: BaseExceptionGroup[Any]) -> Iterator[str]:
    """Of the exceptions themselves, not of the groups that they came in."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _texts(error)
        else:
            yield str(error)


def _ended(why: str, *, behind: bool) -> str:
    """Who runs behind may have nobody left to tell."""
    import structlog

    if behind:
        structlog.get_logger(__name__).error("supervisor_failed", error=why)
    return why


def _say(line: str) -> None:
    """On standard error, which may be a file on a disk that is full: that loses lines, not the mesh."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _echo(name: str, line: str) -> None:
    _say(f"{name:13} {line}")


async def _foreground(instance: Instance, options: Any, echo: Callable[[str, str], None] | None) -> int:
    import anyio

    from pykmesh.node.behind import ready_deadline_s
    from pykmesh.node.run import Running

    mesh, deadline_s = Running(instance, options, echo), ready_deadline_s()
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tasks:
            await tasks.start(mesh.run)
            tasks.start_soon(_announce, mesh, deadline_s)
            async for _ in signals:
                remove = command(instance, "uninstall")
                _say(f"ending; programs and maps stay, traffic goes on ({remove} removes them)")
                tasks.cancel_scope.cancel()
                break
    return 0


async def _announce(mesh: Any, deadline_s: float) -> None:
    import anyio

    from pykmesh.node.behind import LATE_POLL_S, READY
    from pykmesh.node.upgrade import is_under_way, settle

    try:
        await mesh.until_ready(deadline_s)
    except InstanceError as error:
        _say(f"pykmesh: {' '.join(str(error).split())}")
        while is_under_way(mesh.instance):  # noqa: ASYNC110  (an upgrade that reads this ends it)
            await anyio.sleep(LATE_POLL_S)
        await mesh.until_ready(math.inf, LATE_POLL_S)
    try:
        settle(mesh.instance)
    except InstanceError as error:
        _say(f"pykmesh: the release before cannot be gone back to: {error}")
    _say(f"pykmesh: instance {mesh.instance.name} {READY}")


def _detach(instance: Instance) -> None:
    """Starts the same command behind, and waits until it is ready, has ended, or the user gives up."""
    from pykmesh.node.behind import Behind, NotReadyError

    arguments = [word for word in sys.argv[1:] if word not in ("-d", "--detach", "--free-ports")]
    for name in PORT_NAMES:
        arguments += ["--port", f"{name}={getattr(instance.ports, name)}"]
    behind = Behind(instance, arguments)
    try:
        behind.until_ready()
    except NotReadyError as error:
        raise Failure(f"{error}; it goes on trying: {command(instance, 'status')}") from error
    except KeyboardInterrupt:
        behind.end()
        click.echo("interrupted; nothing is left running", err=True)
        sys.exit(128 + signal.SIGINT)
    click.echo(f"instance {instance.name} is ready (pid {behind.pid}, logs in {instance.run_dir / 'logs'})")


def _check_no_upgrade(instance: Instance) -> None:
    """Failure: it would start again what is ended now."""
    from pykmesh.node.upgrade import is_under_way

    if is_under_way(instance):
        raise Failure(f"an upgrade of instance {instance.name} is under way, and would start it again")


@click.command()
@click.pass_obj
def down(instance: Instance) -> None:
    """Stop the processes. Programs and maps stay: traffic goes on by what the kernel holds."""
    from pykmesh.node.behind import end_supervisor

    _check_no_upgrade(instance)
    found = running(instance.run_dir)
    if found is None:
        raise Failure(f"instance {instance.name} is not running")
    found.journal.unlink(missing_ok=True)
    end_supervisor(found.pid)
    click.echo(
        f"instance {instance.name} is down; traffic goes on "
        f"({command(instance, 'uninstall')} removes programs and maps)"
    )


@click.command()
@click.pass_obj
def uninstall(instance: Instance) -> None:
    """Remove every program, map, link and pin of the instance: its services end with them."""
    from pykmesh.kernel.cgroups import CgroupError, find_root
    from pykmesh.kernel.libbpf import KernelError
    from pykmesh.kernel.pins import PinDirectoryError
    from pykmesh.kernel.pins import uninstall as remove
    from pykmesh.node import waypoints
    from pykmesh.node.instance import remove_files
    from pykmesh.node.mesh import PROCESSES

    _check_no_upgrade(instance)
    if running(instance.run_dir) is not None:
        raise Failure(f"instance {instance.name} is running: {command(instance, 'down')} first")
    try:
        with contextlib.suppress(CgroupError):  # without cgroups there are none
            waypoints.remove(instance, find_root())
        removed = remove(instance.pin_dir)
    except (PinDirectoryError, KernelError, OSError) as error:
        raise Failure(str(error)) from error
    remove_files(instance, PROCESSES)
    click.echo(f"removed {removed.links} attachments and {removed.maps} maps of instance {instance.name}")


@click.command()
@click.option("--cgroup", type=click.Path(path_type=Path), help="The cgroup v2 directory.")
@click.option(
    "--netns",
    type=click.Path(path_type=Path),
    help="Its network namespace (/run/netns/NAME, /proc/PID/ns/net).",
)
@click.option("--pid", type=int, help="A process: its cgroup and its network namespace.")
@click.option(
    "--container", help="A container's id, or its beginning (12 digits at least): the same by its process."
)
@click.pass_obj
def enroll(
    instance: Instance, cgroup: Path | None, netns: Path | None, pid: int | None, container: str | None
) -> None:
    """Let the mesh serve a cgroup's sockets. Needs bpf_loader, not the bus."""
    from pykmesh.contracts.enrollment import Action, EnrollmentError, ask_for_cgroup

    try:
        where, namespace = _target(cgroup, netns, pid, container)
        reply = ask_for_cgroup(instance.enroll_socket, Action.ENROLL, where, namespace)
    except EnrollmentError as error:
        raise Failure(str(error)) from error
    for entry in reply.enrolled:
        nothing = "no pod of its own" if entry.netns_cookie is None else "no address yet"
        addresses = " ".join(filter(None, (entry.address4, entry.address6))) or nothing
        click.echo(f"enrolled {entry.path} ({addresses})")


@click.command()
@click.option("--cgroup", type=click.Path(path_type=Path), help="The cgroup v2 directory.")
@click.option("--pid", type=int, help="A process of it.")
@click.option("--container", help="A container's id.")
@click.pass_obj
def unenroll(instance: Instance, cgroup: Path | None, pid: int | None, container: str | None) -> None:
    """Take the mesh's programs off a cgroup. Connections that are open stay."""
    from pykmesh.contracts.enrollment import Action, EnrollmentError, ask_for_cgroup

    try:
        where, _ = _target(cgroup, None, pid, container)
        ask_for_cgroup(instance.enroll_socket, Action.UNENROLL, where, None)
    except EnrollmentError as error:
        raise Failure(str(error)) from error
    click.echo(f"unenrolled {where}")


def _target(
    cgroup: Path | None, netns: Path | None, pid: int | None, container: str | None
) -> tuple[Path, Path | None]:
    from pykmesh.contracts.enrollment import EnrollmentError
    from pykmesh.kernel.cgroups import CgroupError, find_root, of_process

    if container is not None:
        pid = _process_of(container)
    if cgroup is None and pid is None:
        raise click.UsageError("give --cgroup, --pid or --container")
    if pid is None:
        return cgroup or Path(), netns
    try:
        return cgroup or of_process(find_root(), pid), netns or Path(f"/proc/{pid}/ns/net")
    except (OSError, CgroupError) as error:
        raise EnrollmentError(f"process {pid}: {error}") from error


def _process_of(container: str) -> int:
    """The first process whose cgroup is named after the container, as every run-time does."""
    if len(container) < 12:
        raise click.BadParameter("at least 12 digits of the id", param_hint="--container")
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            if container in (entry / "cgroup").read_text():
                return int(entry.name)
        except OSError:
            continue
    raise Failure(f"no process of container {container}")


@click.command()
@click.option("--brief", is_flag=True, help="Say only what makes the mesh impossible here, in one line.")
@output_option
@click.pass_obj
def check(instance: Instance, output: str, *, brief: bool) -> None:
    """What this node can do for the mesh, and what to do about the rest. Exit status 1 on a failure."""
    from pykmesh.kernel.support import findings, obstacle

    if brief:
        if problem := obstacle(instance.pin_dir):
            raise Failure(problem)
        return
    found = list(findings(instance.pin_dir))
    rows = [(f"[{f.level}]", f.code, f.what, f.fix) for f in found]
    show(output, [f._asdict() for f in found], ("", "CHECK", "FOUND", "FIX"), rows)
    if any(f.level == "fail" for f in found):
        sys.exit(1)


@click.command()
@click.option("--keep", is_flag=True, help="Leave everything running at the end.")
@click.option("--json", "as_json", is_flag=True, help="Print one summary object on standard output.")
@click.option("--remove", is_flag=True, help="Only remove what an earlier demo left.")
@click.pass_obj
def demo(instance: Instance, *, keep: bool, as_json: bool, remove: bool) -> None:
    """See the mesh work: pods, services, live flows, scaling, every process killed. Under a minute."""
    from pykmesh.demo import run
    from pykmesh.demo.counted import CountedError
    from pykmesh.kernel.support import obstacle
    from pykmesh.node.instance import named

    if instance.name == DEFAULT_NAME:
        instance = named(run.INSTANCE)
    if problem := obstacle(instance.pin_dir):
        raise Failure(problem)
    try:
        if remove:
            run.Demo(instance, run.Say(sys.stderr, colour=False)).remove()
            return
        code = run.run(instance, keep=keep, as_json=as_json)
    except (run.DemoError, CountedError, InstanceError, OSError) as error:
        raise Failure(str(error)) from error
    sys.exit(code)


COMMANDS = [up, down, uninstall, enroll, unenroll, check, demo]
