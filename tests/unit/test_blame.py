"""Objects that no Envoy takes are found among any number of others, with few questions."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykmesh.manifests.objects import ObjectRef
from services.waypoint_mgr.blame import guilty

pytestmark = pytest.mark.anyio
ALL = [ObjectRef("HTTPRoute", "shop", f"r{number}") for number in range(64)]


class Envoy:
    """Refuses whatever is made with one of these, and what is made with nothing if `always`."""

    def __init__(self, bad: Collection[ObjectRef], *, always: bool = False) -> None:
        self._bad, self._always = bad, always
        self.asked = 0

    async def refusal_without(self, refs: Collection[ObjectRef]) -> str:
        self.asked += 1
        left = [str(each) for each in ALL if each in self._bad and each not in refs]
        return "always" if self._always else " and ".join(left)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(ALL), max_size=5))
async def test_those_are_found_and_no_others(bad: set[ObjectRef]) -> None:
    envoy = Envoy(bad)
    assert await guilty(ALL, envoy.refusal_without) == {each: str(each) for each in bad}
    assert envoy.asked <= 2 + len(bad) * 2 * math.log2(len(ALL)) + 1


async def test_where_it_is_for_none_of_them_none_is_blamed() -> None:
    assert await guilty(ALL, Envoy((), always=True).refusal_without) == {}
    assert await guilty([], Envoy(()).refusal_without) == {}
