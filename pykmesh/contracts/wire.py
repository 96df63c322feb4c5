"""Protobuf messages read many at a time: their fields as columns, without an object for each.

All messages are walked in step, one field of each at a time, with numpy. It knows varints of up to
four bytes and length-delimited fields, which is all that most messages have; a message with anything
else in it, or that is broken, is reported as odd: for a real protobuf parser.

The source of the rules: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import Final, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_T = TypeVar("_T")

_VARINT: Final = 0
_BYTES: Final = 2
_VARINT_BYTES: Final = 4
_PADDING: Final = bytes(16)
ALIKE: Final = 16
"""Parts of one length are cut out together, where so many have it on the average."""


class Spans(NamedTuple):
    """Parts of a buffer: one for each message, from `start` until before `end`."""

    start: Ints
    end: Ints

    def where(self, which: Bools | Ints) -> Spans:
        return Spans(self.start[which], self.end[which])


class Buffer:
    """Messages back to back."""

    def __init__(self, messages: Sequence[bytes]) -> None:
        ends = np.cumsum(np.fromiter(map(len, messages), np.int64, len(messages)))
        self.spans = Spans(np.concatenate((np.zeros(1, np.int64), ends[:-1])) if len(ends) else ends, ends)
        self.bytes = b"".join((*messages, _PADDING))
        self._array = np.frombuffer(self.bytes, np.uint8)

    def fields(self, spans: Spans) -> Fields:
        """Every field of the messages at these spans."""
        odd = np.zeros(len(spans.start), np.bool_)
        rows, at, end = np.arange(len(odd)), spans.start, spans.end
        found: list[tuple[Ints, Ints, Ints, Ints]] = []
        while True:
            live = at < end
            if not live.all():
                rows, at, end = rows[live], at[live], end[live]
            if not rows.size:
                break
            tag, at, long_tag = self._varint(at)
            value, at, long_value = self._varint(at)
            delimited = (tag & 7) == _BYTES
            after = np.where(delimited, at + value, at)
            other = ~(delimited | ((tag & 7) == _VARINT))
            bad = long_tag | long_value | other | (after > end) | (tag < 1 << 3)
            value = np.where(delimited, at, value)
            if bad.any():
                odd[rows[bad]] = True
                good = ~bad
                rows, tag, value, after, end = rows[good], tag[good], value[good], after[good], end[good]
            found.append((rows, tag, value, after))
            at = after
        columns = zip(*found, strict=True) if found else ()
        return Fields(odd, *map(np.concatenate, columns)) if found else Fields(odd, *_NONE)

    def parts(self, spans: Spans) -> Iterable[bytes]:
        """What is at each span."""
        lengths = spans.end - spans.start
        kinds = _each_once(lengths)
        if len(kinds) == 1:
            return self._cut(spans.start, kinds[0])
        if len(kinds) > len(lengths) // ALIKE:
            return map(self.bytes.__getitem__, map(slice, spans.start.tolist(), spans.end.tolist()))
        found = np.empty(len(lengths), np.object_)
        for length in kinds:
            which = np.flatnonzero(lengths == length)
            found[which] = self._cut(spans.start[which], length)
        return cast("list[bytes]", found.tolist())

    def distinct(self, spans: Spans) -> set[bytes]:
        """What is at these spans, each once; often neighbours say the same."""
        return set(self.parts(spans.where(self.differs(spans))))

    def differs(self, spans: Spans) -> Bools:
        """Which may say something else than the one before: no other does. The first does."""
        lengths = spans.end - spans.start
        found = changes(lengths)
        kinds = _each_once(lengths[~found])
        if len(kinds) > len(lengths) // ALIKE:
            return np.ones(len(lengths), np.bool_)  # nobody is the worse for it
        for length in kinds:
            which = np.flatnonzero((lengths == length) & ~found)
            here, before = (self._at(spans.start[where], length) for where in (which, which - 1))
            found[which] = here != before
        return found

    def _cut(self, starts: Ints, length: int) -> list[bytes]:
        """So many bytes from each position on."""
        if not length:
            return [b""] * len(starts)
        return cast("list[bytes]", self._at(starts, length).tolist())

    def _at(self, starts: Ints, length: int) -> npt.NDArray[np.void]:
        """The same as an array: numpy copies and compares them as one thing each."""
        if not length:
            return np.zeros(len(starts), "V1")
        everywhere = np.ndarray((len(self.bytes) - length + 1,), f"V{length}", self.bytes, strides=(1,))
        return cast("npt.NDArray[np.void]", everywhere[starts])

    def padded(self, spans: Spans, prefix: bytes) -> npt.NDArray[np.uint8]:
        """A row for each span: its last bytes, with as much of `prefix` before them as fills the row."""
        width = len(prefix)
        found = np.empty((len(spans.start), width), np.uint8)
        found[:] = np.frombuffer(prefix, np.uint8)
        sizes = np.minimum(spans.end - spans.start, width)
        for size in np.flatnonzero(np.bincount(sizes)).tolist():
            which = np.flatnonzero(sizes == size)
            found[which, width - size :] = self._array[spans.end[which, None] + np.arange(-size, 0)]
        return found

    def _varint(self, at: Ints) -> tuple[Ints, Ints, Bools]:
        """Values, the positions behind them, and which are longer than this reads."""
        byte = self._array[at].astype(np.int64)
        value, at = byte & 0x7F, at + 1
        more = byte > 0x7F
        shift = 0
        while more.any() and shift < 7 * (_VARINT_BYTES - 1):
            shift += 7
            which = np.flatnonzero(more)
            byte = self._array[at[which]].astype(np.int64)
            value[which] |= (byte & 0x7F) << shift
            at[which] += 1
            more = np.zeros(len(at), np.bool_)
            more[which[byte > 0x7F]] = True
        return value, at, more


_NONE: Final = tuple(np.zeros(0, np.int64) for _ in range(4))


class Fields:
    """What `Buffer.fields` found. `odd[n]`: nothing said here of message n counts."""

    def __init__(self, odd: Bools, rows: Ints, tags: Ints, values: Ints, ends: Ints) -> None:
        self.odd = odd
        self._rows, self._tags, self._values, self._ends = rows, tags, values, ends

    def numbers(self, field: int) -> Ints:
        """A singular varint of each message; 0 where it has none. Of several the last counts."""
        found = np.zeros(len(self.odd), np.int64)
        which = self._tags == (field << 3 | _VARINT)
        found[self._rows[which]] = self._values[which]
        return found

    def spans(self, field: int) -> Spans:
        """A singular string, bytes or message of each; an empty span where it has none."""
        start, end = np.zeros(len(self.odd), np.int64), np.zeros(len(self.odd), np.int64)
        which = self._tags == (field << 3 | _BYTES)
        rows = self._rows[which]
        start[rows], end[rows] = self._values[which], self._ends[which]
        return Spans(start, end)

    def repeated(self, field: int) -> tuple[Ints, Spans]:
        """How many of a repeated string, bytes or message each has, and all of them in order."""
        which = np.flatnonzero(self._tags == (field << 3 | _BYTES))
        rows = self._rows[which]
        which = which[np.argsort(rows, kind="stable")]
        counts = np.bincount(rows, minlength=len(self.odd))
        return counts, Spans(self._values[which], self._ends[which])

    def counts(self, field: int) -> Ints:
        """How many of a string, bytes or message each has."""
        return np.bincount(self._rows[self._tags == (field << 3 | _BYTES)], minlength=len(self.odd))

    def has(self, field: int) -> Bools:
        """Which messages have a varint of this number, be it 0."""
        found = np.zeros(len(self.odd), np.bool_)
        found[self._rows[self._tags == (field << 3 | _VARINT)]] = True
        return found

    def only(self, field: int) -> Bools:
        """Which messages are this one string, bytes or message, once, and nothing else."""
        found: Bools = np.bincount(self._rows, minlength=len(self.odd)) == 1
        found[self._rows[self._tags != (field << 3 | _BYTES)]] = False
        found[self.odd] = False
        return found


def changes(numbers: Ints) -> Bools:
    """Which are not as the one before. The first is not."""
    found = np.ones(len(numbers), np.bool_)
    found[1:] = numbers[1:] != numbers[:-1]
    return found


def _each_once(numbers: Ints) -> list[int]:
    ordered = np.sort(numbers)
    return cast("list[int]", ordered[changes(ordered)].tolist())


def rows(array: npt.NDArray[np.uint8]) -> list[bytes]:
    """Each row of bytes as an object."""
    found: list[bytes] = array.view(f"V{array.shape[1]}").ravel().tolist()
    return found


def grouped(counts: Ints, items: Iterable[_T]) -> Iterator[tuple[_T, ...]]:
    """The items of a repeated field, message by message."""
    if not counts.any():
        return repeat((), len(counts))
    if (counts == 1).all():
        return zip(items, strict=False)
    left = iter(items)
    return (tuple(islice(left, count)) for count in counts.tolist())
