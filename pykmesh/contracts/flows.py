"""The lines of the live flows: JSON objects, one a line, from telemetry to whoever observes.

A field may be added, none is renamed. A blank line says only that the stream lives.
"""

from __future__ import annotations

from typing import Final

import msgspec

LOST_PREFIX: Final = b'{"lost"'


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """One end. `port` is None and names are "" where they are not known."""

    address: str
    port: int | None
    workload: str
    namespace: str


class FlowService(msgspec.Struct, frozen=True, kw_only=True):
    """What the source asked for; `name` is its address when nobody knows its name."""

    name: str
    namespace: str
    port: int


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """A connection or datagram socket at its end, or one that was refused.

    `sent_bytes` went from source to destination, `received_bytes` came back, whichever end reports;
    None for UDP, where nobody counts them.
    """

    time: str
    """Of the end, RFC 3339 with microseconds, UTC."""
    verdict: str
    """closed, failed (never established) or refused (by the mesh)."""
    reason: str
    """Why it was refused (enum reason), or the errno of what failed; "" for an orderly end."""
    direction: str
    """Whose record it is: outbound of the source, inbound of the destination."""
    protocol: str
    source: Peer
    service: FlowService | None
    destination: Peer
    sent_bytes: int | None
    received_bytes: int | None
    duration_ms: float
    srtt_us: int
    retransmits: int


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """Flows that are missing here. `where`: ring (never recorded) or observer (this reader was too slow)."""

    time: str
    where: str
    flows: int


class LostLine(msgspec.Struct, frozen=True):
    lost: Lost


_decode_flow = msgspec.json.Decoder(Flow)
_decode_lost = msgspec.json.Decoder(LostLine)


class FlowLineError(Exception):
    """A line that is no flow; the text says why."""


def parse(line: bytes) -> Flow | Lost | None:
    """One line; None for a blank one. FlowLineError for anything else."""
    line = line.strip()
    if not line:
        return None
    try:
        return _decode_lost.decode(line).lost if line.startswith(LOST_PREFIX) else _decode_flow.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FlowLineError(f"no flow: {line[:80]!r}: {error}") from error
