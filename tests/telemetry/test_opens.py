"""Open counters: what they grew by, and removing those that rest without losing what comes meanwhile."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import OPEN_KEY
from services.telemetry.opens import CROWDED_REST_S, REST_S, Opens
from tests.telemetry.kernel import LOCAL, OPENS, TCP, Instance, remote
from tests.telemetry.rows import Clock


class Kernel:
    """The map in memory; `before_take` lets a program count between reading and removing."""

    def __init__(self, max_entries: int = 1000) -> None:
        self.max_entries = max_entries
        self.values: dict[bytes, int] = {}
        self.taken: list[bytes] = []

    def before_take(self, key: bytes) -> None: ...

    def open(self, key: bytes, count: int = 1) -> None:
        self.values[key] = self.values.get(key, 0) + count

    def sums(self) -> dict[bytes, int]:
        return dict(self.values)

    def take(self, key: bytes) -> int | None:
        self.before_take(key)
        self.taken.append(key)
        return self.values.pop(key, None)


def read(opens: Opens) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for key, connections in opens.read():
        found[key] = found.get(key, 0) + connections
    return found


def test_only_the_growth_is_read():
    kernel, clock = Kernel(), Clock()
    opens = Opens(kernel, clock)
    kernel.open(b"a", 3)
    assert read(opens) == {b"a": 3}
    assert read(opens) == {}
    kernel.open(b"a")
    kernel.open(b"b")
    assert read(opens) == {b"a": 1, b"b": 1}


def test_what_the_counters_hold_at_a_restart_was_read_by_the_process_before():
    kernel, clock = Kernel(), Clock()
    kernel.open(b"a", 3)
    opens = Opens(kernel, clock)
    kernel.open(b"a")
    assert read(opens) == {b"a": 1}


def test_an_entry_that_rests_for_five_minutes_is_removed_and_counts_on_when_it_is_made_anew():
    kernel, clock = Kernel(), Clock()
    opens = Opens(kernel, clock)
    kernel.open(b"old")
    read(opens)
    clock.now += REST_S - 1
    kernel.open(b"new")
    assert read(opens) == {b"new": 1}
    clock.now += 2
    assert read(opens) == {}
    assert kernel.taken == [b"old"]
    assert opens.entries == 1
    kernel.open(b"old", 2)
    assert read(opens) == {b"old": 2}


def test_what_is_counted_between_reading_and_removing_is_not_lost():
    kernel, clock = Kernel(), Clock()
    opens = Opens(kernel, clock)
    kernel.open(b"a", 5)
    read(opens)
    clock.now += REST_S + 1
    kernel.before_take = lambda key: kernel.open(key, 2)
    assert read(opens) == {b"a": 2}
    assert kernel.values == {}


def test_in_a_crowded_map_entries_rest_for_less_long():
    kernel, clock = Kernel(max_entries=4), Clock()
    opens = Opens(kernel, clock)
    for key in (b"a", b"b", b"c", b"d"):
        kernel.open(key)
    read(opens)
    clock.now += CROWDED_REST_S + 1
    read(opens)
    assert len(kernel.taken) == 4


STEP = st.one_of(
    st.tuples(st.just("open"), st.sampled_from([b"a", b"b", b"c"]), st.integers(1, 5)),
    st.tuples(st.just("pass"), st.sampled_from([1.0, 11.0, REST_S + 1])),
    st.tuples(st.just("read")),
    st.tuples(st.just("race"), st.sampled_from([b"a", b"b", b"c"])),
)


@given(st.lists(STEP, max_size=60), st.sampled_from([3, 1000]))
def test_each_open_is_read_exactly_once(steps: list[tuple], max_entries: int):
    kernel, clock = Kernel(max_entries), Clock()
    opens = Opens(kernel, clock)
    made = counted = 0

    def race(key: bytes) -> None:
        nonlocal made
        kernel.open(key)
        made += 1

    for step in [*steps, ("read",)]:
        match step:
            case ("open", key, count):
                kernel.open(key, count)
                made += count
            case ("pass", seconds):
                clock.now += seconds
            case ("race", _):
                kernel.before_take = race
            case _:
                counted += sum(read(opens).values())
    kernel.before_take = lambda _: None
    assert counted + sum(read(opens).values()) == made


def test_the_kernels_counters_are_summed_over_processors_and_taken_out_in_one_step(small: Instance):
    with PinnedMap(small.maps_dir, "opens") as counters:
        clock = Clock()
        opens = Opens(counters, clock)
        small.emit(30, mode=OPENS, pairs=3, service=7)
        key = OPEN_KEY.pack(LOCAL, remote(0), 7, 1, TCP)
        assert read(opens)[key] == 10
        small.emit(3, mode=OPENS, pairs=3, service=7)
        assert sum(read(opens).values()) == 3
        clock.now += REST_S + 1
        assert read(opens) == {}
        assert counters.sums() == {}
        assert counters.take(key) is None
