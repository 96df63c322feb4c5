"""The corpus, and what hypothesis makes of it: nothing raises but what is said to, nor takes much memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS, quiet

MEMORY_BYTES = 64 << 20
HANGS_MS = 20_000


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_found_breaks_nothing(target: str) -> None:
    kept = corpus.read(target)
    assert len(kept) > 5
    tracemalloc.start()
    try:
        for data in kept:
            TARGETS[target](data)
            assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES, data[:200]
            tracemalloc.reset_peak()
    finally:
        tracemalloc.stop()


@st.composite
def changed(draw: st.DrawFn, kept: list[bytes]) -> bytes:
    """Something that is kept, with a piece taken out and another one put in its place."""
    data, other = draw(st.sampled_from(kept)), draw(st.sampled_from(kept) | st.binary(max_size=16))
    first, last = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    return data[:first] + other[: draw(st.integers(0, 64))] + data[last:]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_like_it_breaks_nothing(target: str) -> None:
    @settings(max_examples=150, deadline=HANGS_MS, suppress_health_check=list(HealthCheck))
    @given(changed(corpus.read(target)))
    def play(data: bytes) -> None:
        tracemalloc.reset_peak()
        TARGETS[target](data)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES

    tracemalloc.start()
    try:
        play()
    finally:
        tracemalloc.stop()
