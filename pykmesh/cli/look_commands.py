"""Commands that look into a mesh: diff, explain, config-dump."""

from __future__ import annotations

import sys

import click

from pykmesh.cli.node_commands import Failure
from pykmesh.cli.output import output_option, show
from pykmesh.node.instance import Instance

LOOK_VERSION = 1


@click.command()
@output_option
@click.pass_obj
def diff(instance: Instance, output: str) -> None:
    """Compare what the control plane said, what is desired, and what the kernel holds.

    One line for each difference that lasts. Exit status 0: none, 1: some, 2: none was found, but not all
    could be compared.
    """
    from pykmesh.cli import diff as comparing

    found = comparing.compare_all(instance)
    value = {"schema": LOOK_VERSION, "equal": found.status == comparing.EQUAL, **found.as_json()}
    if output == "table":
        comparing.tell(found)
    else:
        show(output, value, (), ())
    sys.exit(found.status)


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST:PORT")
@click.option("--protocol", type=click.Choice(["tcp", "udp"]), default="tcp", help="udp: as sendto() does.")
@output_option
@click.pass_obj
def explain(instance: Instance, source: str, destination: str, protocol: str, output: str) -> None:
    """What becomes of a connection from SRC to DST, and which entry of which map decides it.

    SRC is a pod (namespace/name, uid or address), or - for any enrolled one. DST is an address, or a
    service: namespace/hostname, hostname or name.namespace.

    Exit status 0: it is connected or left alone, 1: it is refused, 2: what was asked for is not there.
    """
    from pykmesh.cli import explain as explaining

    found = explaining.explain(instance, source, destination, protocol)
    if output == "table":
        explaining.tell(found)
    else:
        show(output, {"schema": LOOK_VERSION, **found}, (), ())
    sys.exit(int(found["outcome"] == explaining.REFUSED))


@click.command("config-dump")
@click.pass_obj
def config_dump(instance: Instance) -> None:
    """Print what the control plane said in the JSON of ztunnel's /config_dump.

    `istioctl ztunnel-config all --file` reads it.
    """
    from pykmesh.cli import config_dump as dumping
    from pykmesh.cli.show_commands import require_running

    try:
        found = dumping.read(require_running(instance))
    except OSError as error:
        raise Failure(f"config dump: {error.strerror or error}") from error
    show("json", found, (), ())


COMMANDS = [diff, explain, config_dump]
