"""The quick scenarios, and that what does not hold is found and told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.faults import Scale, Wait
from tests.chaos.play import play
from tests.chaos.scenario import FILE, Scenario, ScenarioError, read
from tests.chaos.stage import Stage, Traffic

SEED, RATE = 1, 0.2
SCENARIOS = read()


@pytest.mark.kernel
@pytest.mark.parametrize(
    "scenario", [each for each in SCENARIOS.scenarios if each.quick], ids=lambda s: s.name
)
def test_what_has_to_hold_does(scenario: Scenario) -> None:
    outcome = play(scenario, SCENARIOS.traffic, SEED, RATE)
    assert outcome.ok, "\n".join(outcome.problems)


@pytest.mark.kernel
def test_a_connection_that_is_not_refused_and_one_that_is_are_found() -> None:
    wrong = [Traffic(kind="refused"), Traffic(kind="connect", to="empty"), Traffic(kind="connect")]
    outcome = play(Scenario(name="wrong", steps=[Wait(seconds=1)]), wrong, SEED, RATE)
    assert not outcome.ok
    assert outcome.failed == outcome.connections - outcome.requests > 20
    told = "\n".join(outcome.problems)
    assert "'not refused': " in told
    assert "'Connection refused': " in told


@pytest.mark.kernel
def test_an_answer_of_an_endpoint_that_went_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_believed(stage: Stage, names: list[str]) -> None:
        stage.wanted = names

    monkeypatch.setattr(Stage, "as_wanted", lambda _: True)
    monkeypatch.setattr(Stage, "scale", only_believed)
    outcome = play(
        Scenario(name="wrong", steps=[Scale(to=1), Wait(seconds=1)]), SCENARIOS.traffic, SEED, RATE
    )
    assert outcome.wrong > 20
    assert f"{outcome.wrong} wrong answers" in outcome.problems


def test_a_scenario_that_cannot_be_read_is_told_by_its_place(tmp_path: Path) -> None:
    broken = tmp_path / "scenarios.yaml"
    broken.write_text(FILE.read_text().replace("process: fork_server}", "process: 7}", 1))
    with pytest.raises(ScenarioError, match=r"Expected `str \| array`, got `int` - at `\$\.scenarios\["):
        read(broken)
    broken.write_text(FILE.read_text() + "  - {name: map_writer is killed, steps: []}\n")
    with pytest.raises(ScenarioError, match="more than one scenario is called map_writer is killed"):
        read(broken)
