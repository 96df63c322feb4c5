"""The ring's reader on the kernel's ring: nothing twice, nothing lost, in the order of writing."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from pykmesh.kernel.maps import PinError, PinnedMap
from pykmesh.kernel.ring import RingHeldError, RingReader
from tests.telemetry.kernel import DISCARDS, SHORT, Instance

CAPACITY = 481


def take_all(ring: RingReader, step: int = 100) -> list[int]:
    numbers: list[int] = []
    while len(records := ring.take(step)):
        assert len(records) <= step
        numbers += records["retransmits"].tolist()
        ring.advance(len(records))
    return numbers


def test_records_come_in_the_order_of_writing_and_no_more_than_asked_for(small: Instance):
    small.emit(250)
    with RingReader(small.maps_dir) as ring:
        assert take_all(ring, step=7) == list(range(250))
        assert ring.lag_bytes == 0
        assert len(ring.take(10)) == 0


def test_a_ring_is_read_over_its_end_many_times(small: Instance):
    numbers: list[int] = []
    with RingReader(small.maps_dir) as ring:
        for _ in range(20):
            small.emit(333)
            numbers += take_all(ring)
    assert numbers == list(range(20 * 333))
    assert small.lost() == 0


def test_a_full_ring_loses_what_does_not_fit_and_counts_it_exactly(small: Instance):
    written = small.emit(1000)
    assert written == CAPACITY
    with RingReader(small.maps_dir) as ring:
        assert ring.lag_bytes == CAPACITY * 136
        assert len(take_all(ring)) + small.lost() == 1000
    assert small.lost() == 1000 - CAPACITY


def test_a_reader_that_ends_leaves_what_it_did_not_finish_to_the_next(small: Instance):
    small.emit(100)
    with RingReader(small.maps_dir) as first:
        assert first.position == 0
        assert first.take(60)["retransmits"][-1] == 59
        first.advance(40)
    small.emit(50)
    with RingReader(small.maps_dir) as second:
        assert second.position > 0
        assert take_all(second) == list(range(40, 150))


def test_a_second_reader_is_refused_while_the_first_reads(small: Instance):
    with RingReader(small.maps_dir), pytest.raises(RingHeldError, match="another process"):
        RingReader(small.maps_dir)
    RingReader(small.maps_dir).close()


def test_more_than_was_taken_cannot_be_given_back(small: Instance):
    small.emit(5)
    with RingReader(small.maps_dir) as ring:
        ring.take(3)
        with pytest.raises(ValueError, match="4 records used of 3"):
            ring.advance(4)


@pytest.mark.parametrize("odd", [DISCARDS, SHORT])
def test_what_is_no_record_is_passed_over_and_counted(small: Instance, odd: int):
    small.emit(3)
    small.emit(2, mode=odd)
    small.emit(4)
    small.emit(1, mode=odd)
    small.emit(1)
    with RingReader(small.maps_dir) as ring:
        assert take_all(ring) == [0, 1, 2, 5, 6, 7, 8, 10]
        assert ring.skipped == 3


def test_a_record_that_is_being_written_holds_up_what_follows_it_until_it_is_done(small: Instance):
    """A second mapping stands in for the programs: the header's busy bit is theirs to set."""
    small.emit(3)
    with RingReader(small.maps_dir) as ring, PinnedMap(small.maps_dir, "flows") as flows:
        ring._data = _writable_copy(flows, ring.size_bytes)
        lengths = np.frombuffer(ring._data, "<u4")[mmap.PAGESIZE // 4 :]
        lengths[136 // 4] |= 1 << 31
        assert take_all(ring) == [0]
        assert ring.skipped == 0
        lengths[136 // 4] &= ~np.uint32(1 << 31)
        assert take_all(ring) == [1, 2]
        assert ring.skipped == 0


def _writable_copy(flows: PinnedMap, size: int) -> mmap.mmap:
    length = mmap.PAGESIZE + 2 * size
    shared = mmap.mmap(flows.fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE)
    copied = mmap.mmap(-1, length)
    copied[:] = shared[:]
    return copied


def test_a_ring_that_is_not_pinned_is_named(small: Instance):
    with pytest.raises(PinError, match="no pin"):
        RingReader(small.maps_dir / "elsewhere")
