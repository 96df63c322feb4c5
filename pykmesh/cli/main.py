"""`pykmesh`: commands, and where they find the instance they speak of.

Each command imports what it needs itself: `--help` and completion stay quick.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pykmesh import __version__
from pykmesh.cli import node_commands, observe, show_commands

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.option("--instance", default="default", envvar="PYKMESH_INSTANCE", help="Which mesh on this node.")
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Its run-time directory (/run/pykmesh/NAME)."
)
@click.option(
    "--pin-dir", type=click.Path(path_type=Path), help="Its bpffs directory (/sys/fs/bpf/pykmesh/NAME)."
)
@click.version_option(__version__, prog_name="pykmesh")
@click.pass_context
def main(context: click.Context, instance: str, run_dir: Path | None, pin_dir: Path | None) -> None:
    """A service mesh data plane without sidecars: istiod configures it, the kernel carries the traffic."""
    from pykmesh.node.instance import InstanceError, named

    try:
        context.obj = named(instance, run_dir, pin_dir)
    except InstanceError as error:
        raise click.ClickException(str(error)) from error


def _add(commands: list[Callable[..., Any]]) -> None:
    for command in commands:
        if isinstance(command, click.Command):
            main.add_command(command)


def _telemetry_address(context: click.Context) -> str:
    found = show_commands.require_running(context.obj)
    return f"http://127.0.0.1:{found.ports.telemetry}"


_add([*node_commands.COMMANDS, *show_commands.COMMANDS, observe.command(_telemetry_address)])
