"""Slots of a list, and the shares that make weights of them."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pykmesh.kernel.records import ENDPOINT_VALUE, ip_from_text, port_bytes
from services.map_writer.slots import arrange, pack, plain, rearrange, share, split, weighed

VALUES = st.lists(st.integers(0, 9).map(lambda n: bytes([n])), max_size=10)


@settings(max_examples=500, database=None)
@given(VALUES, VALUES)
def test_slots_hold_what_is_wanted_once_and_move_only_what_must(
    before: list[bytes], wanted: list[bytes]
) -> None:
    after = arrange(before, dict.fromkeys(wanted))
    assert sorted(after) == sorted(set(wanted))
    first = {value: slot for slot, value in reversed(list(enumerate(before)))}
    stays = [value for value in set(wanted) & set(before) if first[value] < len(after)]
    assert all(after[first[value]] == value for value in stays)


WHOLE = st.integers(0, 9).map(lambda n: bytes([n % 3] * 7 + [n]) * (ENDPOINT_VALUE.size // 8))
"""Values of which parts are found in others."""


@settings(max_examples=500, database=None)
@given(st.lists(WHOLE, unique=True), st.sets(WHOLE), st.lists(WHOLE, unique=True))
def test_a_packed_list_is_rearranged_as_one_that_is_looked_at(
    before: list[bytes], gone: set[bytes], come: list[bytes]
) -> None:
    found = rearrange(pack(before), gone, come)
    if not gone <= set(before) or set(before) & set(come):
        assert found is None
        return
    after = arrange(before, dict.fromkeys([value for value in before if value not in gone] + come))
    assert found is not None
    assert split(found.packed) == after
    assert found.slots == [n for n, value in enumerate(after) if before[n : n + 1] != [value]]


@settings(max_examples=500, database=None)
@given(st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=40))
@example([2**32 - 1, 1])
@example([1] * 40)
def test_every_slot_is_drawn_by_its_weight(weights: list[int]) -> None:
    shares = share(weights)
    drawn = [Fraction(0)] * len(weights)
    for slot, (other, stays) in enumerate(shares):
        own = Fraction(stays, 2**32) if stays else Fraction(1)
        drawn[slot] += own
        drawn[other] += 1 - own
    for got, weight in zip(drawn, weights, strict=True):
        assert abs(got / len(weights) - Fraction(weight, sum(weights))) < Fraction(1, 2**31)


def test_a_hole_that_a_crash_left_in_a_weighed_list_is_a_free_slot() -> None:
    first, second = (ENDPOINT_VALUE.pack(7, ip_from_text(f"10.0.0.{n}"), port_bytes(80)) for n in (1, 2))
    held = weighed([first, second], {first: 1, second: 3})
    known = list(map(plain, [held[0], b"", held[1]]))
    assert known == [first, b"", second]
    assert arrange(known, dict.fromkeys([first, second])) == [first, second]
