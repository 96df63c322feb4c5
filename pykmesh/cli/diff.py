"""`pykmesh diff`: what the control plane said, what is desired, and what the kernel holds, compared.

A change under way is no difference: what differs is looked at again, and what then differs no more,
or otherwise, is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import click

from pykmesh.cli.output import escaped
from pykmesh.cli.show_commands import require_running
from pykmesh.node.ask import fetch
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
    """xds_client's resources against those that map_writer's mesh is made of, and what neither took."""
    state = _page(instance, "map_writer", "/digests")["resources"]
    xds = _page(instance, "xds_client", "/digests")["resources"]
    differences = [
        Difference(SAID, "resource", name, _contents(wanted.get(name)), _contents(state[kind].get(name)))
        for kind, wanted in xds.items()
        for name in sorted(wanted.keys() | state[kind].keys())
        if wanted.get(name) != state[kind].get(name)
    ]
    differences += [
        Difference(SAID, "resource", name, "what was said last", f"it rejected: {why}")
        for rejected in _fetch(instance, "xds_client", "/rejected").values()
        for name, why in sorted(rejected.items())
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
    page = _fetch(instance, process, path)
    if not page["settled"]:
        raise LeftOutError(f"{process} has not the whole mesh yet, or is still writing it")
    return page


def _fetch(instance: Instance, process: str, path: str) -> dict[str, Any]:
    try:
        page: dict[str, Any] = fetch(getattr(instance.ports, process), path, TIMEOUT_S)
    except OSError as error:
        raise LeftOutError(f"{process} does not answer: {error.strerror or error}") from error
    return page


class Found(NamedTuple):
    """`left_out`: the comparisons that could not be made, and why."""

    compared: list[Compared]
    left_out: dict[str, str]

    @property
    def differences(self) -> list[Difference]:
        return [difference for compared in self.compared for difference in compared.differences]

    @property
    def more(self) -> int:
        return sum(compared.more for compared in self.compared)

    @property
    def counts(self) -> dict[str, int]:
        return {name: count for compared in self.compared for name, count in compared.counts.items()}

    @property
    def status(self) -> int:
        return DIFFERENT if self.differences else UNKNOWN if self.left_out else EQUAL

    def as_json(self) -> dict[str, Any]:
        return {
            "compared": self.counts,
            "left_out": self.left_out,
            "differences": [each._asdict() for each in self.differences],
            "more": self.more,
        }


def compare_all(instance: Instance) -> Found:
    """ClickException when nothing runs."""
    try:
        instance = require_running(instance)
    except click.ClickException as error:
        raise _NothingRunsError(error.message) from error
    found = Found([], {})
    for name, look in ((SAID, said), (HELD, held)):
        try:
            found.compared.append(compare(partial(look, instance)))
        except LeftOutError as error:
            found.left_out[name] = str(error)
    return found


def tell(found: Found) -> None:
    for each in found.differences:
        click.echo(escaped(str(each)))
    if found.more:
        click.echo(f"and {found.more} more")
    for name, why in found.left_out.items():
        click.echo(f"not compared: {name}: {why}", err=True)
    if found.status == EQUAL:
        counts = found.counts
        click.echo(
            f"no differences: {counts['services']} services, {counts['endpoints']} endpoints, "
            f"{counts['addresses']} addresses compared"
        )
