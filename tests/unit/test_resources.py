"""Resources of a response, many at a time, are unwrapped exactly as one by one."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pykmesh.proto.discovery_pb2 import Resource
from services.xds_client import protocol, resources
from services.xds_client.resources import unwrap

TEXT = st.text(max_size=4)


@st.composite
def wrapped(draw: st.DrawFn) -> bytes:
    """Resources, some with fields that are rare, some with bytes changed, cut off or repeated."""
    found = Resource(name=draw(TEXT), version=draw(TEXT), aliases=draw(st.lists(TEXT, max_size=2)))
    found.resource.type_url, found.resource.value = draw(TEXT), draw(st.binary(max_size=200))
    data = found.SerializeToString()
    at = draw(st.integers(0, len(data)))
    damaged = (data[:at] + draw(st.binary(max_size=6)) + data[at:], data[:at], data + data)
    return data if draw(st.booleans()) else draw(st.sampled_from(damaged))


@settings(max_examples=300, database=None, deadline=None)
@given(st.lists(wrapped(), max_size=8))
@example([b'\n\x010\x12\x03\n\x010"\x02\x00\xc2\x80"\x00'])
@example([b"\n\x02\x00\xc2\x80\x12\x03\n\x010"])
def test_together_says_what_one_by_one_says(data: list[bytes]) -> None:
    one_by_one = unwrap(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "FEWEST", 0)
        assert unwrap(data) == one_by_one


@st.composite
def responses(draw: st.DrawFn) -> bytes:
    """Some with bytes changed, cut off or repeated."""
    found = protocol.Response(type_url=draw(TEXT), nonce=draw(TEXT), removed_resources=draw(st.lists(TEXT)))
    found.resources.extend(draw(st.lists(st.binary(max_size=300))))
    data: bytes = found.SerializeToString()
    at = draw(st.integers(0, len(data)))
    damaged = (data[:at] + draw(st.binary(max_size=6)) + data[at:], data[:at], data + data)
    return data if draw(st.booleans()) else draw(st.sampled_from(damaged))


@settings(max_examples=300, database=None, deadline=None)
@given(responses(), st.integers(1, 200))
def test_a_response_in_slices_is_what_it_is_whole(data: bytes, slice_bytes: int) -> None:
    try:
        whole = protocol.Response.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError, match="no DeltaDiscoveryResponse"):
            protocol.parse(data, slice_bytes)
    else:
        assert protocol.parse(data, slice_bytes) == whole


def test_a_broken_one_leaves_its_neighbours_alone() -> None:
    good = [Resource(name=f"r-{number}").SerializeToString() for number in range(40)]
    found = unwrap([*good[:7], b"\xff", *good[7:]])
    assert found.broken.keys() == {7}
    assert found.broken[7].startswith("not a Resource message")
    assert [name for name in found.names if name] == [f"r-{number}" for number in range(40)]
