"""How commands show what they found: a table for people, JSON or YAML for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import msgspec

_F = TypeVar("_F", bound=Callable[..., Any])
FORMATS = ("table", "json", "yaml")


def output_option(function: _F) -> _F:
    option = click.option(
        "-o", "--output", type=click.Choice(FORMATS), default="table", help="How to show it."
    )
    return option(function)


def show(output: str, value: Any, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """`value` for programs, `rows` under `columns` for people."""
    plain = msgspec.to_builtins(value, enc_hook=str)
    if output == "json":
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n")
    elif output == "yaml":
        import yaml

        click.echo(yaml.safe_dump(plain, sort_keys=False), nl=False)
    else:
        click.echo(table(columns, rows))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    found = [["-" if cell in (None, "") else escaped(str(cell)) for cell in row] for row in rows]
    cells = [[*columns], *found]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def escaped(text: str) -> str:
    r"""For people's eyes: what a terminal would obey, or not show, as `\x1b` or `\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def age(seconds: float) -> str:
    """A duration as people say it: 4s, 3m, 5h, 2d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"
