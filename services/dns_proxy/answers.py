"""What the mesh knows of a name, asked of map_writer and kept for a moment.

An answer counts for a moment without asking again. While map_writer is silent, it counts for as long as who
got it may keep it (its time to live); a question that never was answered is the server's, by the way to it
that is known.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final, NamedTuple, TypeVar

from pykmesh.bus import Bus, BusUnavailableError
from pykmesh.contracts import messages
from pykmesh.contracts.messages import ContractError, DnsOutcome, DnsReply, DnsRequest, Subject
from services.dns_proxy.wire import TTL_S

FRESH_S: Final = 0.2
KEPT_MAX: Final = 8192
WAYS_MAX: Final = 8192
SILENCE_S: Final = 1.0
"""How long map_writer is not waited for again after it let a question time out."""
Way = tuple[tuple[bytes, ...], bytes]
"""A client, by its addresses, and the server that it asks."""
Key = tuple[Way, str, bool]
_K = TypeVar("_K")
_V = TypeVar("_V")


class Kept(NamedTuple):
    reply: DnsReply
    at: float


class Answers:
    def __init__(self, network: str, deadline_s: float) -> None:
        self.bus: Bus | None = None
        self._network = network
        self._deadline_s = deadline_s
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._ways: OrderedDict[Way, list[tuple[bytes, int]] | None] = OrderedDict()
        """They outlast the names that were asked, however many these are."""
        self._silent_until = 0.0
        self.unanswered = 0
        """Questions that map_writer did not answer in time."""

    def __len__(self) -> int:
        return len(self._kept)

    async def find(self, client: tuple[bytes, ...], server: bytes, name: str, *, is_6: bool) -> DnsReply:
        """`name` "" asks for the way to the server alone."""
        way, now = (client, server), time.monotonic()
        key = (way, name, is_6)
        kept = self._kept.get(key)
        if kept is not None and now - kept.at < FRESH_S:
            return kept.reply
        reply = await self._ask(DnsRequest(messages.VERSION, self._network, [*client], server, name, is_6))
        if reply is not None:
            if reply.outcome is not DnsOutcome.UNKNOWN_CLIENT:
                _keep(self._kept, key, Kept(reply, now), KEPT_MAX)
                _keep(self._ways, way, reply.upstreams, WAYS_MAX)
            return reply
        self.unanswered += 1
        if kept is not None and now - kept.at <= TTL_S:
            return kept.reply
        return DnsReply(messages.VERSION, DnsOutcome.FORWARD, "", [], self._ways.get(way))

    async def _ask(self, request: DnsRequest) -> DnsReply | None:
        """None when there is no answer in time, or none yet."""
        if self.bus is None or not self.bus.connected or time.monotonic() < self._silent_until:
            return None
        started = time.monotonic()
        try:
            data = await self.bus.request(Subject.DNS_RESOLVE, messages.encode(request), self._deadline_s)
            reply = messages.decode(DnsReply, data)
        except (BusUnavailableError, ContractError):
            if time.monotonic() - started >= self._deadline_s:
                self._silent_until = time.monotonic() + SILENCE_S
            return None
        return None if reply.outcome is DnsOutcome.NOT_READY else reply


def _keep(index: OrderedDict[_K, _V], key: _K, value: _V, most: int) -> None:
    """What was kept longest ago gives way."""
    index[key] = value
    index.move_to_end(key)
    if len(index) > most:
        index.popitem(last=False)
