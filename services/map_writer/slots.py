"""How the endpoints of a list lie in its slots, and what weights make of them. Pure.

A value's first part says who the endpoint is; how it is weighed follows. Unweighed values end in zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pykmesh.kernel.records import ENDPOINT_OTHER, ENDPOINT_SHARE, ENDPOINT_VALUE

_WHOLE = 1 << 32
_BYTES = ENDPOINT_VALUE.size
Slots = list[bytes] | bytes
"""The values of a list. Until somebody looks at them one by one they may be back to back."""


def split(slots: Slots) -> list[bytes]:
    """Each by itself."""
    if isinstance(slots, bytes):
        return [slots[at : at + _BYTES] for at in range(0, len(slots), _BYTES)]
    return slots


def slot_of(packed: bytes, slot: int) -> bytes:
    return packed[slot * _BYTES : (slot + 1) * _BYTES]


def pack(slots: Slots) -> bytes:
    """All of them back to back: not of a list with holes."""
    return slots if isinstance(slots, bytes) else b"".join(slots)


def count(slots: Slots) -> int:
    return len(slots) // _BYTES if isinstance(slots, bytes) else len(slots)


def arrange(before: Sequence[bytes], wanted: Mapping[bytes, object]) -> list[bytes]:
    """The wanted values in slots: those that are there stay where they are, as far as that can be.

    Slots that become free take what is new, then what lies last.
    """
    if not before:
        return list(wanted)
    after, seen = list(before), set[bytes]()
    free: list[int] = []
    for slot, value in enumerate(before):
        if value in wanted and value not in seen:
            seen.add(value)
        else:
            free.append(slot)
    added = [value for value in wanted if value not in seen]
    for slot, value in zip(free, added, strict=False):
        after[slot] = value
    after += added[len(free) :]
    for slot in reversed(free[len(added) :]):
        last = after.pop()
        if slot < len(after):
            after[slot] = last
    return after


class Moved(NamedTuple):
    """A list in which few values came or went: what it is now, and which of its slots say something else."""

    packed: bytes
    slots: list[int]


def rearrange(packed: bytes, gone: Iterable[bytes], come: Sequence[bytes]) -> Moved | None:
    """What `arrange` makes of it, without a look at each.

    None where not all that goes is there, or some of what comes.
    """
    free = [_find(packed, value) for value in gone]
    if -1 in free or any(_find(packed, value) >= 0 for value in come):
        return None
    free.sort()
    after, changed = bytearray(packed), free[: len(come)]
    for slot, value in zip(free, come, strict=False):
        after[slot * _BYTES : (slot + 1) * _BYTES] = value
    for value in come[len(free) :]:
        changed.append(len(after) // _BYTES)
        after += value
    for slot in reversed(free[len(come) :]):
        last = bytes(after[-_BYTES:])
        del after[-_BYTES:]
        if slot * _BYTES < len(after):
            after[slot * _BYTES : (slot + 1) * _BYTES] = last
            changed.append(slot)
    return Moved(bytes(after), sorted({slot for slot in changed if slot * _BYTES < len(after)}))


def _find(packed: bytes, value: bytes) -> int:
    """-1: it is in none."""
    at = packed.find(value)
    while at > 0 and at % _BYTES:
        at = packed.find(value, at + 1)
    return at // _BYTES if at >= 0 else -1


def plain(value: bytes) -> bytes:
    """A value without its weighing; a hole (empty) stays one."""
    return value[:ENDPOINT_OTHER] + bytes(len(value) - ENDPOINT_OTHER) if value else value


def weighed(values: Sequence[bytes], weights: Mapping[bytes, int]) -> list[bytes]:
    """Plain values with what makes each be drawn in proportion to its weight (above zero)."""
    shares = share(weights[value] for value in values)
    return [
        value[:ENDPOINT_OTHER] + ENDPOINT_SHARE.pack(other, stays)[ENDPOINT_OTHER:]
        for value, (other, stays) in zip(values, shares, strict=True)
    ]


def weights_of(slots: Sequence[bytes]) -> dict[bytes, int]:
    """By plain values what `weighed` was given, in proportion: of all slots' draws, how many each gets."""
    found: dict[bytes, int] = {}
    for value in filter(None, slots):
        other, stays = ENDPOINT_SHARE.unpack(value)
        own = stays or _WHOLE
        found[plain(value)] = found.get(plain(value), 0) + own
        if own < _WHOLE and other < len(slots) and slots[other]:
            found[plain(slots[other])] = found.get(plain(slots[other]), 0) + _WHOLE - own
    return found


def share(weights: Iterable[int]) -> list[tuple[int, int]]:
    """Vose's alias method: for each slot the other one, and how many of 2^32 draws stay (0: all)."""
    found = list(weights)
    total, count = sum(found), len(found)
    # Of `total` draws of a slot, how many are left to it: at first as many as it has weight for all slots.
    left = [weight * count for weight in found]
    shares = [(0, 0)] * count
    poor = [slot for slot in range(count) if left[slot] < total]
    rich = [slot for slot in range(count) if left[slot] >= total]
    while poor and rich:
        slot, other = poor.pop(), rich[-1]
        shares[slot] = (other, max(1, left[slot] * _WHOLE // total))
        left[other] -= total - left[slot]
        if left[other] < total:
            poor.append(rich.pop())
    return shares
