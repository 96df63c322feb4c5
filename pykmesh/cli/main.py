"""`pykmesh`: commands, and where they find the instance they speak of.

Each command imports what it needs itself: `--help` and completion stay quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pykmesh import __version__
from pykmesh.cli import (
    look_commands,
    node_commands,
    observe,
    place,
    show_commands,
    upgrade,
    waypoint_commands,
)
from pykmesh.node.instance import InstanceError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Commands(click.Group):
    """What makes an instance unusable, or may not be looked at, is told in a line by every command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InstanceError as error:
            raise node_commands.Failure(str(error)) from error


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="pykmesh")
def main() -> None:
    """A service mesh data plane without sidecars: istiod configures it, the kernel carries the traffic."""


main.params[:0] = place.options(before=True)


def _add(commands: list[Callable[..., Any]]) -> None:
    for command in commands:
        if isinstance(command, click.Command):
            for each in (command, *getattr(command, "commands", {}).values()):
                each.params += place.options(before=False)
            main.add_command(command)


def _telemetry_address(context: click.Context) -> str:
    found = show_commands.require_running(context.obj)
    return f"http://127.0.0.1:{found.ports.telemetry}"


_add(
    [
        *node_commands.COMMANDS,
        *upgrade.COMMANDS,
        *show_commands.COMMANDS,
        *look_commands.COMMANDS,
        *waypoint_commands.COMMANDS,
        observe.command(_telemetry_address),
    ]
)
