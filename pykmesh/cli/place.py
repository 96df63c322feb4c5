"""Which instance a command speaks of: options that stand before the command, or behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from pykmesh.node.instance import DEFAULT_NAME, InstanceError, named

_GIVEN: Final = "pykmesh.place"
ENVIRONMENT: Final = "PYKMESH_INSTANCE"
_DIRECTORY: Final = click.Path(path_type=Path)
_OPTIONS: Final = (
    ("instance", click.STRING, f"Which mesh on this node ({DEFAULT_NAME})."),
    ("run-dir", _DIRECTORY, "Its run-time directory (/run/pykmesh/NAME)."),
    ("pin-dir", _DIRECTORY, "Its bpffs directory (/sys/fs/bpf/pykmesh/NAME)."),
)


def _take(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Keeps what is given, the last word of each, and makes of it the instance that commands get."""
    given: dict[str, Any] = context.meta.setdefault(_GIVEN, {})
    if value is not None:
        given[str(parameter.name)] = value
    try:
        context.obj = named(given.get("instance", DEFAULT_NAME), given.get("run_dir"), given.get("pin_dir"))
    except InstanceError as error:
        raise click.ClickException(str(error)) from error


def options(*, before: bool) -> list[click.Parameter]:
    """Of the command line as a whole (`before`), where the environment counts too, or of one command."""
    return [
        click.Option(
            [f"--{name}"],
            type=kind,
            envvar=ENVIRONMENT if before and name == "instance" else None,
            help=text,
            callback=_take,
            expose_value=False,
        )
        for name, kind, text in _OPTIONS
    ]
