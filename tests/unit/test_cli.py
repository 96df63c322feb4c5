"""Which instance a command speaks of, wherever on the command line that is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pykmesh.cli.main import main
from pykmesh.cli.output import show

COMMANDS = sorted(main.commands)
PLACE = ("--instance", "--run-dir", "--pin-dir")


def said(*words: str, **environment: str) -> str:
    return CliRunner(env={"PYKMESH_INSTANCE": None, **environment}).invoke(main, words).output


def looked_for(*words: str, **environment: str) -> str:
    """What a command says that finds nothing running."""
    text = said(*words, **environment)
    assert " is not running " in text
    return text.removeprefix("Error: instance ").partition(": pykmesh ")[0]


def test_a_hint_names_the_instance_with_all_that_was_given() -> None:
    assert ": pykmesh up -d " in said("status")
    assert ": pykmesh --instance rev1 up -d " in said("status", "--instance", "rev1")
    given = ("--instance", "rev1", "--run-dir", "/tmp/a b", "--pin-dir", "/sys/fs/bpf/x")
    assert ": pykmesh --instance rev1 --run-dir '/tmp/a b' --pin-dir /sys/fs/bpf/x up -d " in said(
        *given, "status"
    )


@pytest.mark.parametrize("output", ["table", "json"])
def test_what_a_terminal_would_obey_is_escaped_for_people_alone(
    output: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    name = "web\x1b]0;x\x07\nshop\x9b\u202eé"
    show(output, {"name": name}, ("NAME", "OTHER"), [(name, "x")])
    said = capfdbinary.readouterr().out.decode()
    if output == "json":
        assert json.loads(said) == {"name": name}
    else:
        heading, row = said.splitlines()
        assert row == r"web\x1b]0;x\x07\nshop\x9b\u202eé  x"
        assert heading.index("OTHER") == row.index("  x") + 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_where_its_instance_is_told(command: str) -> None:
    text = said(command, "--help")
    assert all(f"  {option} " in text for option in PLACE)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("behind", [False, True])
def test_every_command_takes_it_in_both_places(command: str, behind: bool) -> None:
    place = ["--instance", "no name"]
    arguments = {"get": ["services"], "explain": ["-", "10.0.0.1:80"]}.get(command, [])
    words = [command, *arguments, *place] if behind else [*place, command, *arguments]
    assert said(*words).startswith("Error: instance name 'no name'")


def test_each_part_may_stand_in_another_place_and_the_last_word_counts(tmp_path: Path) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    assert looked_for("status", "--instance", "a") == "a is not running (looked in /run/pykmesh/a)"
    assert (
        looked_for("--run-dir", here, "status", "--instance", "a") == f"a is not running (looked in {here})"
    )
    assert (
        looked_for("--instance", "a", "status", "--run-dir", here) == f"a is not running (looked in {here})"
    )
    both = looked_for("--instance", "a", "--run-dir", here, "status", "--run-dir", there, "--instance", "b")
    assert both == f"b is not running (looked in {there})"


def test_the_environment_stands_behind_both() -> None:
    assert looked_for("status", PYKMESH_INSTANCE="e").startswith("e ")
    assert looked_for("--instance", "a", "status", PYKMESH_INSTANCE="e").startswith("a ")
    assert looked_for("status", "--instance", "b", PYKMESH_INSTANCE="e").startswith("b ")


def test_one_command_line_says_nothing_to_the_next() -> None:
    assert looked_for("status", "--instance", "a").startswith("a ")
    assert looked_for("--instance", "b", "status").startswith("b ")
