"""xds_client comes back at once after a stream's ordinary end, and not without end."""

from __future__ import annotations

import pytest

from services.xds_client.pace import BACKOFF_FIRST_S, BACKOFF_MAX_S, BUDGET, Pace


class Life:
    """A pace whose clock goes on by the pauses that it asks for, and the streams' own time."""

    def __init__(self) -> None:
        self.now = 100.0
        self._pace = Pace(lambda: self.now, lambda: 1.0)

    def stream(self, lasts_s: float = 0.0, *, understood: bool = True, ordinary: bool = True) -> float:
        self.now += lasts_s
        pause_s = self._pace.pause_s(understood=understood, ordinary=ordinary)
        self.now += pause_s
        return pause_s

    def streams_in(self, time_s: float, lasts_s: float = 0.001, *, understood: bool, ordinary: bool) -> int:
        end, count = self.now + time_s, 0
        while self.now < end:
            self.stream(lasts_s, understood=understood, ordinary=ordinary)
            count += 1
        return count


def test_an_ordinary_end_is_followed_at_once_while_the_budget_lasts() -> None:
    life = Life()
    assert [life.stream() for _ in range(BUDGET)] == [0.0] * BUDGET
    assert [life.stream() for _ in range(5)] == pytest.approx([BACKOFF_FIRST_S * 2**n for n in range(5)])


def test_the_budget_refills_with_time() -> None:
    life = Life()
    for _ in range(BUDGET):
        life.stream()
    assert [life.stream(lasts_s=1.0) for _ in range(50)] == [0.0] * 50
    assert [life.stream() for _ in range(2)] == [BACKOFF_FIRST_S, BACKOFF_FIRST_S * 2]
    life.now += 3600
    assert [life.stream() for _ in range(BUDGET + 1)] == [*[0.0] * BUDGET, BACKOFF_FIRST_S]


def test_a_failure_after_something_understood_waits_only_a_little() -> None:
    life = Life()
    assert {life.stream(ordinary=False) for _ in range(BUDGET)} == {BACKOFF_FIRST_S}


@pytest.mark.parametrize("ordinary", [False, True])
def test_a_stream_that_brought_nothing_understood_lengthens_the_back_off_up_to_its_end(
    ordinary: bool,
) -> None:
    life = Life()
    pauses = [life.stream(understood=False, ordinary=ordinary) for _ in range(20)]
    assert pauses == pytest.approx([min(BACKOFF_FIRST_S * 2**n, BACKOFF_MAX_S) for n in range(20)])


def test_only_something_understood_resets_the_back_off() -> None:
    life = Life()
    for _ in range(12):
        life.stream(understood=False)
    assert life.stream(lasts_s=3600, understood=False) == BACKOFF_MAX_S
    assert life.stream() == 0.0
    assert life.stream(understood=False) == BACKOFF_FIRST_S


@pytest.mark.parametrize("ordinary", [False, True])
def test_a_control_plane_that_ends_every_stream_is_asked_twice_a_second_in_the_long_run(
    ordinary: bool,
) -> None:
    life = Life()
    assert life.streams_in(3, understood=True, ordinary=ordinary) < 30
    assert life.streams_in(3600, understood=True, ordinary=ordinary) < 2 * 3600
    assert life.streams_in(3600, understood=True, ordinary=ordinary) > 3600 / BACKOFF_MAX_S


def test_one_that_is_away_for_an_hour_is_asked_all_the_time_and_found_soon_after_it_is_back() -> None:
    life = Life()
    asked = life.streams_in(3600, understood=False, ordinary=False)
    assert 3600 / BACKOFF_MAX_S <= asked < 3600 / BACKOFF_MAX_S + 20
    assert life.stream(understood=False, ordinary=False) == BACKOFF_MAX_S
    assert life.stream(lasts_s=1.0, understood=True, ordinary=False) == BACKOFF_FIRST_S


def test_pauses_are_shorter_by_chance() -> None:
    pauses = [Pace().pause_s(understood=False, ordinary=False) for _ in range(200)]
    assert BACKOFF_FIRST_S / 2 <= min(pauses) < max(pauses) <= BACKOFF_FIRST_S
