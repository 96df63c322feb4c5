"""What the mesh knows of a name, asked of map_writer and kept for a moment.

A burst of the same question is one question. While map_writer is silent, an answer counts for as long as
who got it may keep it (its time to live); a question that never was answered is the server's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final, NamedTuple

from pykmesh.bus import Bus, BusUnavailableError
from pykmesh.contracts import messages
from pykmesh.contracts.messages import ContractError, DnsOutcome, DnsReply, DnsRequest, Subject
from services.dns_proxy.wire import TTL_S

FRESH_S: Final = 0.2
KEPT_MAX: Final = 8192
SILENCE_S: Final = 1.0
"""How long map_writer is not waited for again after it let a question time out."""
Key = tuple[tuple[bytes, ...], bytes, str, bool]


class Kept(NamedTuple):
    reply: DnsReply
    at: float


class Answers:
    def __init__(self, network: str, deadline_s: float) -> None:
        self.bus: Bus | None = None
        self._network = network
        self._deadline_s = deadline_s
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._silent_until = 0.0
        self.unanswered = 0
        """Questions that map_writer did not answer in time."""

    def __len__(self) -> int:
        return len(self._kept)

    async def find(self, client: tuple[bytes, ...], server: bytes, name: str, *, is_6: bool) -> DnsReply:
        """`name` "" asks for the way to the server alone."""
        key, now = (client, server, name, is_6), time.monotonic()
        kept = self._kept.get(key)
        if kept is not None and now - kept.at < FRESH_S:
            return kept.reply
        reply = await self._ask(DnsRequest(messages.VERSION, self._network, [*client], server, name, is_6))
        if reply is not None:
            if reply.outcome is not DnsOutcome.UNKNOWN_CLIENT:
                self._keep(key, Kept(reply, now))
            return reply
        self.unanswered += 1
        if kept is None or now - kept.at > TTL_S:
            kept = self._kept.get((client, server, "", False))
            way = kept.reply.upstreams if kept else None
            return DnsReply(messages.VERSION, DnsOutcome.FORWARD, "", [], way)
        return kept.reply

    def _keep(self, key: Key, kept: Kept) -> None:
        """The way to a server is kept by itself, too: it outlasts the names that were asked."""
        client, server, _, _ = key
        way = DnsReply(messages.VERSION, DnsOutcome.FORWARD, "", [], kept.reply.upstreams)
        for each, value in ((client, server, "", False), Kept(way, kept.at)), (key, kept):
            self._kept[each] = value
            self._kept.move_to_end(each)
        while len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)

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
