"""The edge to the maps, on small real ones."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from pykmesh.kernel import hooks, layout, libbpf, maps, pins
from pykmesh.kernel.maps import MapFullError, PinError, PinnedMap
from pykmesh.kernel.records import ADDRESS_KEY, ADDRESS_VALUE, OPEN_KEY, Ip
from services.map_writer import writer
from services.map_writer.planner import Step
from services.map_writer.writer import Maps, Writing

pytestmark = pytest.mark.kernel

ROOM = 16
SIZES = dict.fromkeys(("services", "endpoints", "addresses", "ranges", "pods", "opens", "datagrams"), ROOM)


@pytest.fixture(scope="module")
def maps_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("needs root: maps are made and pinned")
    pin_dir = tmp_path_factory.mktemp("maps") / "bpf" / "test"
    pins.prepare(pin_dir)
    try:
        fixed = hooks.ProgramSettings("test", 0, hooks.can_set_retval(), has_telemetry=True)
        hooks.Programs(pins.maps_dir(pin_dir), {**SIZES, "flows": 65536}, fixed).close()
        yield pins.maps_dir(pin_dir)
    finally:
        subprocess.run(["umount", "--lazy", pin_dir], check=True, timeout=10)


@pytest.fixture(params=["batches", "each by itself"])
def addresses(
    maps_dir: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PinnedMap]:
    """An empty map of 16 entries; as if of a type for which the kernel has no batches too."""
    if request.param == "each by itself":
        for name in ("update_batch", "delete_batch", "lookup_batch"):
            monkeypatch.setattr(libbpf, name, lambda *_: (-maps._ENOTSUPP, 0))
    with PinnedMap(maps_dir, "addresses") as found:
        yield found
        found.erase(b"".join(key for key, _ in list(found.items())))
        assert len(found) == 0


def key(number: int) -> bytes:
    return ADDRESS_KEY.pack(Ip(number.to_bytes(16, "big")), 0)


def value(number: int) -> bytes:
    return key(number) + ADDRESS_VALUE.pack(1, number, 0)[ADDRESS_KEY.size :]


def batch(numbers: range | list[int]) -> tuple[bytes, bytes]:
    return b"".join(map(key, numbers)), b"".join(map(value, numbers))


@pytest.mark.parametrize("count", [0, 1, 2, ROOM])
def test_what_is_written_is_read(addresses: PinnedMap, count: int) -> None:
    addresses.write(*batch(range(count)))
    assert dict(addresses.items()) == {key(n): value(n) for n in range(count)}
    assert len(addresses) == count


@pytest.mark.parametrize("count", [ROOM + 1, 10 * ROOM])
def test_a_batch_longer_than_the_map_fills_it_and_says_how_far_it_got(
    addresses: PinnedMap, count: int
) -> None:
    with pytest.raises(MapFullError, match="map addresses is full") as error:
        addresses.write(*batch(range(count)))
    assert error.value.written == ROOM
    assert dict(addresses.items()) == {key(n): value(n) for n in range(ROOM)}


def test_one_entry_too_many_is_told_alike(addresses: PinnedMap) -> None:
    addresses.write(*batch(range(ROOM)))
    with pytest.raises(MapFullError) as error:
        addresses.write(key(99), value(99))
    assert error.value.written == 0
    addresses.write(key(3), value(7))  # an entry that is there needs no room
    assert addresses.get(key(3)) == value(7)


def test_an_entry_written_twice_in_a_batch_has_its_last_value(addresses: PinnedMap) -> None:
    addresses.write(key(1) * 3, value(1) + value(2) + value(3))
    assert dict(addresses.items()) == {key(1): value(3)}


@pytest.mark.parametrize("present", [[], [0], [4], [0, 4], [1, 2, 3], [0, 1, 2, 3, 4]])
def test_keys_that_are_not_there_are_passed_over_when_erased(
    addresses: PinnedMap, present: list[int]
) -> None:
    addresses.write(*batch(present))
    addresses.put(key(9), value(9))
    addresses.erase(b"".join(map(key, range(5))))
    assert dict(addresses.items()) == {key(9): value(9)}
    addresses.erase(b"")
    assert addresses.remove(key(9))
    assert not addresses.remove(key(9))


def test_keys_and_values_that_do_not_go_together_are_refused(addresses: PinnedMap) -> None:
    with pytest.raises(ValueError, match="2 keys of map addresses, 40 bytes of values"):
        addresses.write(key(1) + key(2), value(1))


def test_a_map_of_more_entries_than_a_chunk_is_read_whole(
    addresses: PinnedMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "READ_CHUNK", 1)  # smaller than a bucket may be: it grows
    addresses.write(*batch(range(ROOM)))
    assert dict(addresses.items()) == {key(n): value(n) for n in range(ROOM)}


def test_per_cpu_counters_are_summed(maps_dir: Path) -> None:
    cpus = maps.possible_cpus()
    open_key = OPEN_KEY.pack(bytes(16), bytes(16), 1, 1, 6)
    with PinnedMap(maps_dir, "opens") as opens:
        for number, counts in ((1, range(1, cpus + 1)), (2, [2**40] * cpus)):
            row = b"".join(count.to_bytes(8, "little") for count in counts)
            opens.put(OPEN_KEY.pack(bytes(16), bytes(16), number, 1, 6), row)
        assert opens.sums() == {
            open_key: cpus * (cpus + 1) // 2, OPEN_KEY.pack(bytes(16), bytes(16), 2, 1, 6): cpus * 2**40,
        }  # fmt: skip
        assert opens.take(open_key) == cpus * (cpus + 1) // 2
        assert opens.take(open_key) is None
        assert len(opens) == 1
    with PinnedMap(maps_dir, "counters") as counters:
        assert counters.counter_sums() == [0] * len(layout.Reason)


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("0-3\n", 4), ("0-3,8-11", 8), ("0,2,4-5", 4)])
def test_processors_are_counted_even_where_their_numbers_have_gaps(text: str, count: int) -> None:
    assert maps._count_in_list(text) == count


def test_a_pin_that_is_not_there_says_what_is(maps_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(PinError, match="is bpf_loader up"):
        PinnedMap(tmp_path, "services")
    other = maps_dir / "services@00000000"
    with PinnedMap(maps_dir, "addresses") as found:
        libbpf.obj_pin(found.fd, str(other))
    real = maps_dir / layout.map_layout("services").pin
    kept = maps_dir / "kept"
    real.rename(kept)
    try:
        with pytest.raises(PinError, match="there is services@00000000 of another layout"):
            PinnedMap(maps_dir, "services")
        with PinnedMap(maps_dir, "endpoints") as found:
            libbpf.obj_pin(found.fd, str(real))
        with pytest.raises(PinError, match="is not what its name says"):
            PinnedMap(maps_dir, "services")
        real.unlink()
    finally:
        kept.rename(real)
        other.unlink()


def test_a_plan_is_applied_in_order_and_read_again(maps_dir: Path, addresses: PinnedMap) -> None:
    found = Maps(maps_dir.parent)
    try:
        assert found.limits == (ROOM, ROOM, ROOM, ROOM)
        keys, values = batch(range(4))
        found.apply(Step("addresses", keys, values))
        found.apply(Step("addresses", key(1) + key(8), b""))
        held = found.read()
        assert held.addresses == {key(n): value(n)[ADDRESS_KEY.size :] for n in (0, 2, 3)}
        assert (held.services, held.lists, held.endpoints) == ({}, {}, 0)
        with pytest.raises(MapFullError):
            found.apply(Step("addresses", *batch(range(100))))
        assert addresses.get(key(0)) == value(0)
        with pytest.raises(MapFullError):  # what was planned behind it does not follow
            found.apply(Step("addresses", key(0), b""))
        assert found.read_again().addresses
        found.apply(Step("addresses", key(0), b""))
        assert addresses.get(key(0)) is None
        assert found.memory_bytes()["addresses"] > 0
    finally:
        found.close()


@pytest.fixture
def written(
    maps_dir: Path, addresses: PinnedMap, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Writing, PinnedMap]]:
    """Every step goes through the thread."""
    monkeypatch.setattr(writer, "SMALL_BYTES", 1)
    found = Maps(maps_dir.parent)
    try:
        yield Writing(found), addresses
    finally:
        found.close()


def steps(*batches: range) -> list[Step]:
    return [Step("addresses", *batch(numbers)) for numbers in batches]


def test_nothing_is_written_behind_a_step_that_fails_until_maps_are_read_again(
    written: tuple[Writing, PinnedMap],
) -> None:
    writing, addresses = written

    async def run() -> None:
        with pytest.raises(MapFullError):
            await writing.take(steps(range(4), range(4, 40), range(50, 51), range(51, 52)))
        assert addresses.get(key(50)) is None
        addresses.erase(batch(range(4, 40))[0])
        with pytest.raises(MapFullError):
            await writing.take(steps(range(60, 61)))
        assert len((await writing.read_again()).addresses) == 4
        assert await writing.take(steps(range(60, 61), range(61, 63))) == {"addresses": 3}

    asyncio.run(run())
    assert set(dict(addresses.items())) == {*map(key, (*range(4), 60, 61, 62))}


def test_steps_that_wait_are_written_in_order_or_not_at_all_when_the_process_ends(
    written: tuple[Writing, PinnedMap],
) -> None:
    """One that were taken back before its turn would be missing before those behind it."""
    writing, addresses = written
    held_up = threading.Event()
    writing._thread.submit(held_up.wait)

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(writing.take, steps(*(range(n, n + 1) for n in range(10))))
            await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()
            threading.Timer(0.05, held_up.set).start()

    asyncio.run(run())
    writing._thread.shutdown()
    found = [number for number in range(10) if addresses.get(key(number))]
    assert found
    assert found == list(range(len(found)))
