"""Ranges of addresses that are services', found by what they overlap: one holds the other, or none of it.

An IPv6 range may lie around IPv4 as bytes do (`::/0`): it has nothing to do with it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterator

from pykmesh.contracts.address import Range
from pykmesh.kernel.records import Ip, is_v4

_BITS = 128


class Ranges:
    def __init__(self) -> None:
        self._owners: defaultdict[Range, dict[str, None]] = defaultdict(dict)
        self._sorted: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        """Of each network: first address and bits."""
        self._bits: defaultdict[str, Counter[int]] = defaultdict(Counter)

    def add(self, found: Range, service: str) -> None:
        if found not in self._owners:
            insort(self._sorted[found.network], _order(found))
            self._bits[found.network][found.bits] += 1
        self._owners[found][service] = None

    def remove(self, found: Range, service: str) -> None:
        """Again is no error: a service may name a range twice."""
        owners = self._owners.get(found)
        if owners is None:
            return
        owners.pop(service, None)
        if not owners:
            del self._owners[found]
            self._sorted[found.network].remove(_order(found))
            self._bits[found.network] -= Counter([found.bits])

    def owners(self, found: Range) -> dict[str, None]:
        return self._owners.get(found, {})

    def inside(self, found: Range) -> Iterator[Range]:
        """Those of longer prefixes."""
        ordered, first = self._sorted[found.network], int.from_bytes(found.ip, "big")
        last = first | (1 << (_BITS - found.bits)) - 1
        begin, end = bisect_left(ordered, (first, found.bits + 1)), bisect_right(ordered, (last, _BITS))
        for number, bits in ordered[begin:end]:
            longer = Range(found.network, Ip(number.to_bytes(_BITS // 8, "big")), bits)
            if is_v4(longer.ip) == is_v4(found.ip):
                yield longer

    def around(self, found: Range) -> Iterator[Range]:
        """Those of shorter prefixes."""
        number = int.from_bytes(found.ip, "big")
        for bits in self._bits[found.network]:
            if bits < found.bits:
                first = number >> (_BITS - bits) << (_BITS - bits)
                wider = Range(found.network, Ip(first.to_bytes(_BITS // 8, "big")), bits)
                if wider in self._owners and is_v4(wider.ip) == is_v4(found.ip):
                    yield wider


def _order(found: Range) -> tuple[int, int]:
    return int.from_bytes(found.ip, "big"), found.bits
