"""`pykmesh diff`: what the control plane said, what is desired, and what the kernel holds, compared.

A change under way is no difference: what differs is looked at again, and what then differs no more,
or otherwise, is left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import click

from pykmesh.cli.output import escaped, output_option, show
from pykmesh.node.instance import Instance

ROUNDS: Final = 3
PAUSE_S: Final = 0.5
TIMEOUT_S: Final = 150.0
EQUAL, DIFFERENT, UNKNOWN = range(3)
SAID: Final = "control plane and state"
HELD: Final = "state and kernel"


class Difference(NamedTuple):
    between: str
    what: str
    where: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.between}: {self.what} {self.where}: expected {self.expected}, found {self.found}"


class Compared(NamedTuple):
    """`counts` of what was compared; `more`: differences that are not among those listed."""

    differences: list[Difference]
    counts: dict[str, int]
    more: int = 0


class LeftOutError(Exception):
    """A comparison cannot be made; the text says why."""


class _NothingRunsError(click.ClickException):
    exit_code = UNKNOWN


def compare(look: Callable[[], Compared]) -> Compared:
    """What differs each time. Raises LeftOutError."""
    found = look()
    for _ in range(ROUNDS - 1):
        if not found.differences:
            break
        time.sleep(PAUSE_S)
        again = look()
        kept = set(again.differences)
        found = again._replace(differences=[each for each in found.differences if each in kept])
    return found


def said(instance: Instance) -> Compared:
    """xds_client's resources against those that map_writer's mesh is made of."""
    state = _page(instance, "map_writer", "/digests")["resources"]
    xds = _page(instance, "xds_client", "/digests")["resources"]
    differences = [
        Difference(SAID, "resource", name, _contents(wanted.get(name)), _contents(state[kind].get(name)))
        for kind, wanted in xds.items()
        for name in sorted(wanted.keys() | state[kind].keys())
        if wanted.get(name) != state[kind].get(name)
    ]
    return Compared(differences, {"resources": sum(map(len, xds.values()))})


def _contents(digest: str | None) -> str:
    return f"contents {digest}" if digest else "nothing"


def held(instance: Instance) -> Compared:
    """The entries that map_writer would write against those that there are."""
    page = _page(instance, "map_writer", "/drift")
    differences = [Difference(HELD, **each) for each in page["differences"]]
    return Compared(differences, page["compared"], page["count"] - len(differences))


def _page(instance: Instance, process: str, path: str) -> dict[str, Any]:
    from pykmesh.node.run import fetch

    try:
        page: dict[str, Any] = fetch(getattr(instance.ports, process), path, TIMEOUT_S)
    except OSError as error:
        raise LeftOutError(f"{process} does not answer: {error.strerror or error}") from error
    if not page["settled"]:
        raise LeftOutError(f"{process} has not the whole mesh yet, or is still writing it")
    return page


@click.command()
@output_option
@click.pass_obj
def diff(instance: Instance, output: str) -> None:
    """Compare what the control plane said, what is desired, and what the kernel holds.

    One line for each difference that lasts. Exit status 0: none, 1: some, 2: none was found, but not all
    could be compared.
    """
    from pykmesh.cli.show_commands import require_running

    differences: list[Difference] = []
    counts: dict[str, int] = {}
    left_out: dict[str, str] = {}
    more = 0
    try:
        found = require_running(instance)
    except click.ClickException as error:
        raise _NothingRunsError(error.message) from error
    for name, look in ((SAID, said), (HELD, held)):
        try:
            compared = compare(lambda look=look: look(found))  # type: ignore[misc]
        except LeftOutError as error:
            left_out[name] = str(error)
            continue
        differences += compared.differences
        more += compared.more
        counts |= compared.counts
    value = {
        "schema": 1,
        "equal": not differences and not left_out,
        "compared": counts,
        "left_out": left_out,
        "differences": [each._asdict() for each in differences],
        "more": more,
    }
    if output == "table":
        _tell(differences, more, counts, left_out)
    else:
        show(output, value, (), ())
    sys.exit(DIFFERENT if differences else UNKNOWN if left_out else EQUAL)


def _tell(differences: list[Difference], more: int, counts: dict[str, int], left_out: dict[str, str]) -> None:
    for each in differences:
        click.echo(escaped(str(each)))
    if more:
        click.echo(f"and {more} more")
    for name, why in left_out.items():
        click.echo(f"not compared: {name}: {why}", err=True)
    if not differences and not left_out:
        click.echo(
            f"no differences: {counts['services']} services, {counts['endpoints']} endpoints, "
            f"{counts['addresses']} addresses compared"
        )


COMMANDS = [diff]
