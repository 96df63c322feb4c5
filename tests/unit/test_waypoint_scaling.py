"""The scaling decision, by itself."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pykmesh.contracts.enrollment import INSTANCES_MAX
from services.waypoint_mgr.scaling import (
    CONNECTIONS,
    CPU,
    LEAST,
    MEMORY,
    MOST,
    SCALE_IN_AFTER,
    Found,
    Load,
    Policy,
    decide,
    policy_of,
)

TEN_MOST = Policy(most=10, connections=100)


@pytest.mark.parametrize(
    ("size", "processors", "connections", "expected"),
    [
        (1, 0.70, 1, 1),
        (1, 0.76, 1, 1),  # within a tenth of the target
        (1, 0.80, 1, 2),
        (2, 1.90, 1, 3),
        (1, 1.00, 1, 2),
        (2, 0.20, 260, 3),  # by connections
        (2, 1.90, 900, 4),  # at most twice as many at once
        (4, 0.10, 1, 1),
        (4, 1.40, 1, 2),
    ],
)
def test_the_size_meets_the_target_that_asks_for_most(
    size: int, processors: float, connections: int, expected: int
) -> None:
    assert decide(TEN_MOST, size, Load(size, processors, connections), [], 0.0).size == expected


def test_in_only_after_a_while_out_at_once() -> None:
    policy = Policy(most=10, scale_in_after_s=60)
    busy, calm = Load(2, 1.9, 5), Load(3, 0.2, 5)
    out = decide(policy, 2, busy, [], 0.0)
    assert out.size == 3
    before = [Found(0.0, out.asked)]
    held = decide(policy, 3, calm, before, 59.0)
    assert held.size == 3
    assert "3 were needed within the last 60 s" in held.why
    assert decide(policy, 3, calm, before, 61.0).size == 1


def test_to_none_only_where_that_is_allowed_and_nothing_is_going_on() -> None:
    idle, open_one = Load(1, 0.001, 0), Load(1, 0.001, 1)
    assert decide(Policy(least=0), 1, idle, [], 0.0).size == 0
    assert decide(Policy(least=1), 1, idle, [], 0.0).size == 1
    assert decide(Policy(least=0), 1, open_one, [], 0.0).size == 1
    assert decide(Policy(least=0), 0, Load(0, 0.0, 0), [], 0.0).size == 0
    hasty = Policy(least=0, scale_in_after_s=0)
    assert decide(hasty, 1, idle, [Found(0.0, 1)], 9.0).size == 1, "the client is on its way"
    assert decide(hasty, 1, idle, [Found(0.0, 1)], 11.0).size == 0


def test_while_none_is_ready_there_is_no_opinion() -> None:
    assert decide(Policy(), 3, Load(0, 0.0, 0), [], 0.0).size == 3


@given(
    least=st.integers(0, 5),
    more=st.integers(0, 5),
    size=st.integers(0, 12),
    ready=st.integers(0, 12),
    processors=st.floats(0, 64),
    connections=st.integers(0, 10_000),
    before=st.lists(st.builds(Found, st.floats(0, 100), st.integers(0, 40)), max_size=5),
)
def test_any_load_keeps_within_the_limits_and_says_why(
    least: int, more: int, size: int, ready: int, processors: float, connections: int, before: list[Found]
) -> None:
    policy = Policy(least=least, most=max(least + more, 1), connections=10)
    found = decide(policy, size, Load(ready, processors, connections), before, 100.0)
    assert policy.least <= found.size <= policy.most
    assert found.why


@given(size=st.integers(1, 10), processors=st.floats(0, 10), connections=st.integers(0, 5000))
def test_more_load_never_asks_for_fewer(size: int, processors: float, connections: int) -> None:
    less = decide(TEN_MOST, size, Load(size, processors, connections), [], 0.0)
    more = decide(TEN_MOST, size, Load(size, processors * 2 + 0.1, connections * 2 + 1), [], 0.0)
    assert more.size >= less.size


def test_annotations_are_read_and_wrong_ones_told() -> None:
    said = {LEAST: "2", MOST: "8", CPU: "55.5", CONNECTIONS: "100", SCALE_IN_AFTER: "90s", MEMORY: "256"}
    assert policy_of({**said, "other": "x"}) == (Policy(2, 8, 55.5, 100, 90.0, 256), [])
    assert policy_of({}) == (Policy(), [])
    assert policy_of({LEAST: "6"}) == (Policy(least=6, most=6), [])


@pytest.mark.parametrize(
    ("name", "text"),
    [(LEAST, "-1"), (LEAST, "1.5"), (MOST, "0"), (MOST, str(INSTANCES_MAX + 1)), (CPU, "0"), (CPU, "nan"),
     (CPU, "95"), (CONNECTIONS, "none"), (SCALE_IN_AFTER, "1h"), (MEMORY, "63"), (SCALE_IN_AFTER, "inf")],
)  # fmt: skip
def test_a_number_that_does_not_fit_is_named_and_left_out(name: str, text: str) -> None:
    policy, (error,) = policy_of({name: text})
    assert policy == Policy()
    assert name in error
    assert repr(text) in error


def test_most_below_least_is_told() -> None:
    policy, (error,) = policy_of({LEAST: "5", MOST: "3"})
    assert (policy.least, policy.most) == (5, 5)
    assert MOST in error
