"""`pykmesh upgrade`: this release in the place of the one that runs, under traffic."""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import Any

import click

from pykmesh.cli.node_commands import Failure
from pykmesh.cli.output import output_option, show
from pykmesh.node.instance import Instance, InstanceError, command


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--roll-back", is_flag=True, help="The release that ran before the last upgrade, again.")
@output_option
@click.pass_obj
def upgrade(instance: Instance, output: str, *, dry_run: bool, roll_back: bool) -> None:
    """Put this release in the place of the one that runs. No connection is dropped.

    What cannot be done is said before anything is.
    """
    from pykmesh.kernel.layout import LayoutError, check_enums, check_objects

    try:
        check_enums()
        check_objects()
        done = _upgrade(instance, output, dry_run=dry_run, roll_back=roll_back)
    except LayoutError as error:
        raise Failure(f"not begun: {error}") from error
    if output != "table":
        show(output, done, (), ())
    else:
        _tell(instance, done)
    if done["problems"]:
        sys.exit(1)


def _upgrade(instance: Instance, output: str, *, dry_run: bool, roll_back: bool) -> dict[str, Any]:
    """What was done, or would be. Failure."""
    import msgspec

    from pykmesh.kernel import hooks, upgrade
    from pykmesh.kernel.libbpf import KernelError
    from pykmesh.node.upgrade import check, exchange
    from pykmesh.node.upgrade import roll_back as go_back

    try:
        if roll_back:
            words = shlex.split(command(instance, "upgrade", "-o", output))[1:]
            go_back(instance, [*words, *(["--dry-run"] if dry_run else [])])
        plan = upgrade.plan(instance.pin_dir)
        problems = [*plan.problems]
        try:
            hooks.check_loads()
        except KernelError as error:
            problems.append(str(error))
        if dry_run:
            try:
                check(instance)
            except InstanceError as error:
                problems.append(str(error))
        if problems and not dry_run:
            raise Failure(f"not begun: {'; '.join(problems)}")
        done: dict[str, Any] = {"maps": _moves(plan), "problems": problems}
        if not dry_run:
            exchanged = exchange(instance)
            done |= {**msgspec.structs.asdict(exchanged), "copied": _copied(instance)}
    except (InstanceError, KernelError, OSError) as error:
        raise Failure(str(error)) from error
    return done


def _moves(plan: Any) -> list[dict[str, str]]:
    from pykmesh.kernel.layout import map_layout
    from pykmesh.kernel.upgrade import Fate

    return [
        {
            "map": move.name,
            "fate": move.fate.value,
            "before": move.before,
            "after": "" if move.fate is Fate.GONE else map_layout(move.name).pin,
            "why": move.why,
        }
        for move in plan.moves
    ]


def _copied(instance: Instance) -> Any:
    """What bpf_loader says of it; None: all maps were kept, or who copied them is not there any more."""
    from pykmesh.node.ask import fetch
    from pykmesh.node.instance import running

    found = running(instance.run_dir)
    with contextlib.suppress(OSError):
        return None if found is None else fetch(found.ports.bpf_loader, "/status").get("copied")
    return None


def _tell(instance: Instance, done: dict[str, Any]) -> None:
    from pykmesh.kernel.upgrade import Fate

    others = [move for move in done["maps"] if move["before"] or move["why"]]
    if others:
        rows = [(m["map"], m["fate"], m["before"], m["after"], m["why"]) for m in others]
        show("table", None, ("MAP", "WHAT BECOMES OF IT", "BEFORE", "AFTER", ""), rows)
    kept = sum(move["fate"] == Fate.KEPT.value for move in done["maps"])
    click.echo(f"{kept} maps are kept as they are")
    for problem in done["problems"]:
        click.echo(f"! {problem}")
    if "away_s" not in done:
        return
    if copied := done["copied"]:
        entries = sum(copied["entries"].values())
        click.echo(f"copied {entries} entries; nobody could write for {copied['stood_still_ms']:g} ms")
    back = "not from here: the release before was in the same place, or could not be noted"
    if done["can_go_back"]:
        back = command(instance, "upgrade", "--roll-back")
    click.echo(
        f"instance {instance.name} is ready (pid {done['pid']}); its processes were away for "
        f"{done['away_s']:g} s, traffic went on; back: {back}"
    )


COMMANDS = [upgrade]
