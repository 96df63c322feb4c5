"""The kernel's maps in plain terms, and what must always be true of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pykmesh.kernel.layout import AddressKind, Reason
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ADDRESS_VALUE,
    ENDPOINT_KEY,
    ENDPOINT_VALUE,
    RANGE_KEY,
    RANGE_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    ip_to_text,
    port_number,
    range_to_text,
)


class Entry(NamedTuple):
    """What is behind an address and port: why it is refused or left alone, and the endpoints."""

    verdict: str
    endpoints: frozenset[str] = frozenset()


class Address(NamedTuple):
    """What an address is: `service` or `workload`, and what becomes of connections to itself."""

    kind: str
    verdict: str


class View(NamedTuple):
    """By `address` and by `address port`, for one network."""

    services: dict[str, Entry]
    addresses: dict[str, Address]


Raw = dict[str, dict[bytes, bytes]]


def read_raw(maps_dir: Path) -> Raw:
    """Services first: what they count was there when they were read, unless it went meanwhile."""
    found: Raw = {}
    for name in ("ranges", "services", "endpoints", "addresses"):
        with PinnedMap(maps_dir, name) as pinned:
            found[name] = dict(pinned.items())
    return found


def read(maps_dir: Path, network: int = 0) -> View:
    """Fails when an entry counts what is not there or not its own, or when something is left over."""
    return view(read_raw(maps_dir), network)


def view(raw: Raw, network: int = 0) -> View:
    ranges = dict(_range(key, value) for key, value in raw["ranges"].items())
    slots = {ENDPOINT_KEY.unpack(key): value for key, value in raw["endpoints"].items()}
    services: dict[str, Entry] = {}
    counted: set[tuple[int, int]] = set()
    for key, value in raw["services"].items():
        ip, number, port = SERVICE_KEY.unpack(key)
        list_id, count, verdict, _, _ = SERVICE_VALUE.unpack(value)
        endpoints = [_endpoint(list_id, slots[list_id, slot]) for slot in range(count)]
        assert len(set(endpoints)) == count, f"{ip_to_text(ip)}: an endpoint twice in {endpoints}"
        counted |= {(list_id, slot) for slot in range(count)}
        if number == network or (ip, number) in ranges:
            entry = Entry(Reason(verdict).label, frozenset(endpoints))
            shown = ranges.get((ip, number), ip_to_text(ip))
            services[f"{shown} {port_number(port)}"] = entry
    left_over = slots.keys() - counted
    assert not left_over, f"endpoints that nothing counts: {left_over}"
    return View(services, _addresses(raw["addresses"], network, ranges))


def _range(key: bytes, value: bytes) -> tuple[tuple[bytes, int], str]:
    """What stands for a range in the other maps, and the range as text."""
    bits, _, ip = RANGE_KEY.unpack(key)
    return RANGE_VALUE.unpack(value), range_to_text(ip, bits - 32)


def _endpoint(list_id: int, value: bytes) -> str:
    owner, ip, port = ENDPOINT_VALUE.unpack(value)
    assert owner == list_id, f"a slot of {list_id:x} holds an endpoint of {owner:x}"
    return f"{ip_to_text(ip)} {port_number(port)}"


def _addresses(
    raw: dict[bytes, bytes], network: int, ranges: dict[tuple[bytes, int], str]
) -> dict[str, Address]:
    found = {}
    for key, value in raw.items():
        ip, number = ADDRESS_KEY.unpack(key)
        if number == network or (ip, number) in ranges:
            kind, verdict, _ = ADDRESS_VALUE.unpack(value)
            found[ranges.get((ip, number), ip_to_text(ip))] = Address(
                AddressKind(kind).name.lower(), Reason(verdict).label
            )
    return found


class Sampler:
    """Reads the maps again and again; `samples` counts, `worst` is what was missing."""

    def __init__(self, look: Callable[[], set[str]]) -> None:
        self._look = look
        self._stop = threading.Event()
        self.samples = 0
        self.missing: set[str] = set()
        self.error = ""

    def run(self, always: set[str]) -> None:
        try:
            while not self._stop.wait(0.002):
                self.missing |= always - self._look()
                self.samples += 1
        except Exception as error:  # noqa: BLE001 (told by the thread that waits)
            self.error = repr(error)

    def stop(self) -> None:
        self._stop.set()


@contextmanager
def nothing_goes_missing(maps_dir: Path) -> Iterator[Sampler]:
    """Everything that the maps hold now is there at each moment of the block.

    Entries are looked at by their keys and, for endpoints, by what they say.
    """

    def look() -> set[str]:
        raw = read_raw(maps_dir)
        return {f"{name} {key.hex()}" for name, held in raw.items() for key in held}

    sampler = Sampler(look)
    thread = threading.Thread(target=sampler.run, args=(look(),))
    thread.start()
    try:
        yield sampler
    finally:
        sampler.stop()
        thread.join(10)
    assert not sampler.error, sampler.error
    assert sampler.samples > 0
    assert not sampler.missing, f"gone for a moment: {sampler.missing}"
