"""Messages of DNS (RFC 1035): what of them the proxy reads, and the ones that it makes. Pure.

A message that it does not understand is nobody's but the server's: it is sent on as it came.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.SOA
import dns.rdtypes.IN.A
import dns.rdtypes.IN.AAAA
import dns.rrset

TTL_S: Final = 30
UDP_BYTES_MIN: Final = 512
MESSAGE_BYTES_MAX: Final = 65535
HEADER_BYTES: Final = 12
_RECORD_BYTES: Final = (16, 28)
"""Of an A and an AAAA record whose name stood in the message before."""
_TRANSFERS: Final = frozenset({dns.rdatatype.AXFR, dns.rdatatype.IXFR})
_RECORD: Final = struct.Struct("!HHIH")
"""Type, class, time to live and length of the data, which follow the name of a record."""
_SOA_NUMBERS_BYTES: Final = 20
"""Of a SOA's data its end, which begins with the serial number."""
_HALF_OF_SERIALS: Final = 1 << 31


class Query(NamedTuple):
    """A question about one name. `name` is in lower case, without its last dot."""

    message: dns.message.QueryMessage
    name: str
    kind: dns.rdatatype.RdataType

    @property
    def is_6(self) -> bool:
        return self.kind == dns.rdatatype.AAAA

    @property
    def is_for_addresses(self) -> bool:
        return self.kind in (dns.rdatatype.A, dns.rdatatype.AAAA)

    @property
    def is_transfer(self) -> bool:
        """The answer may be several messages (RFC 5936)."""
        return self.kind in _TRANSFERS


def read(data: bytes) -> Query | None:
    """None for what is no plain question of the Internet's class."""
    try:
        message = dns.message.from_wire(data, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError):
        return None
    if not isinstance(message, dns.message.QueryMessage) or message.flags & dns.flags.QR:
        return None
    if message.opcode() != dns.opcode.QUERY or len(message.question) != 1:
        return None
    asked = message.question[0]
    if asked.rdclass != dns.rdataclass.IN:
        return None
    return Query(message, asked.name.to_text(omit_final_dot=True).lower(), asked.rdtype)


def answer(query: Query, addresses: Sequence[str], alias: str, max_bytes: int) -> bytes:
    """Addresses, perhaps none, in any order; at `alias` when the asked name is one for it.

    Of more than fit the first come, and the message says so (TC): not every resolver asks again by TCP.
    """
    each = _RECORD_BYTES[query.is_6]
    tried = addresses[: max_bytes // each + 1]
    whole = _answer(query, tried, alias).to_wire(max_size=MESSAGE_BYTES_MAX)
    if len(whole) <= max_bytes and len(tried) == len(addresses):
        return whole
    fitting = (max_bytes - len(whole)) // each + len(tried)
    part = _answer(query, addresses[: max(fitting, 0)], alias)
    part.flags |= dns.flags.TC
    return part.to_wire(max_size=max_bytes, prefer_truncation=True)


def _answer(query: Query, addresses: Sequence[str], alias: str) -> dns.message.Message:
    message = dns.message.make_response(query.message, recursion_available=True)
    message.flags |= dns.flags.AA
    owner = query.message.question[0].name
    if alias and addresses:
        target = dns.name.from_text(alias)
        cname = dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.CNAME, target.to_text())
        message.answer.append(_records(owner, [cname]))
        owner = target
    if addresses:
        kind = dns.rdtypes.IN.AAAA.AAAA if query.is_6 else dns.rdtypes.IN.A.A
        message.answer.append(_records(owner, [kind(dns.rdataclass.IN, query.kind, ip) for ip in addresses]))
    return message


def _records(owner: dns.name.Name, found: Collection[dns.rdata.Rdata]) -> dns.rrset.RRset:
    return dns.rrset.from_rdata_list(owner, TTL_S, found)


def failure(data: bytes) -> bytes:
    """SERVFAIL, to a message of at least a header, with nothing but its question if it has one."""
    end = question_end(data)
    flags = int.from_bytes(data[2:4], "big")
    kept = flags & (0x7800 | dns.flags.RD)  # the opcode
    reply_flags = kept | dns.flags.QR | dns.flags.RA | dns.rcode.SERVFAIL
    counts = (1).to_bytes(2, "big") if end > HEADER_BYTES else bytes(2)
    return data[:2] + reply_flags.to_bytes(2, "big") + counts + bytes(6) + data[HEADER_BYTES:end]


def udp_room(query: Query) -> int:
    """How large an answer by UDP may be (RFC 6891)."""
    return max(query.message.payload, UDP_BYTES_MIN) if query.message.edns >= 0 else UDP_BYTES_MIN


def question_end(data: bytes) -> int:
    """Where the first question ends; the header's end when there is none that can be read."""
    at = HEADER_BYTES
    if data[4:6] == b"\0\0":
        return HEADER_BYTES
    while at < len(data) and data[at]:
        if data[at] & 0xC0:
            return HEADER_BYTES
        at += 1 + data[at]
    return at + 5 if at + 5 <= len(data) else HEADER_BYTES


def answers(reply: bytes, query: bytes) -> bool:
    """Whether a message is the answer to another one, by number, kind and question; case does not count."""
    if len(reply) < HEADER_BYTES or reply[:2] != query[:2] or not reply[2] & 0x80:
        return False
    end = question_end(query)
    asked = query[HEADER_BYTES:end]
    return reply[4:6] == b"\0\0" or reply[HEADER_BYTES:end].lower() == asked.lower()


def end_of_answers(query: Query | None) -> Callable[[bytes], bool]:
    """What says of each message of the answer, in order, whether it is the last one."""
    return _Transfer(query).ends_with if query is not None and query.is_transfer else lambda _: True


class _Transfer:
    """A zone's transfer ends with the SOA record that it begins with (RFC 5936, 2.2).

    One of changes has it between them, too: where the last of them begins to add (RFC 1995, 4). One that
    is nothing else says that the client is up to date. What does not begin with it is no transfer.
    """

    def __init__(self, query: Query) -> None:
        known = [record for rrset in query.message.authority for record in rrset]
        self._known = next((soa.serial for soa in known if isinstance(soa, dns.rdtypes.ANY.SOA.SOA)), None)
        self._serial: int | None = None
        self._records = 0
        self._left = 1

    def ends_with(self, message: bytes) -> bool:
        """Also with a message that fails, or cannot be read."""
        try:
            if message[3] & 0xF:
                return True
            for serial in _serials(message):
                self._take(serial)
        except (IndexError, struct.error):
            return True
        return self._serial is None or self._left <= 0 or (self._records == 1 and not self._is_news())

    def _take(self, serial: int | None) -> None:
        self._records += 1
        if self._records == 1:
            self._serial = serial
        elif serial is not None and serial == self._serial:
            self._left -= 1
        elif serial is not None and self._records == 2:
            self._left = 2

    def _is_news(self) -> bool:
        """By the arithmetic of serial numbers (RFC 1982)."""
        if self._serial is None or self._known is None:
            return True
        return 0 < (self._serial - self._known) % (2 * _HALF_OF_SERIALS) < _HALF_OF_SERIALS


def _serials(message: bytes) -> Iterator[int | None]:
    """Of each record of an answer: a SOA's serial number, None of others. IndexError, struct.error."""
    at = question_end(message)
    for _ in range(int.from_bytes(message[6:8], "big")):
        at = _name_end(message, at)
        kind, _, _, length = _RECORD.unpack_from(message, at)
        at += _RECORD.size + length
        is_soa = kind == dns.rdatatype.SOA
        yield int.from_bytes(message[at - _SOA_NUMBERS_BYTES :][:4], "big") if is_soa else None


def _name_end(message: bytes, at: int) -> int:
    """IndexError."""
    while message[at]:
        if message[at] & 0xC0:
            return at + 2
        at += 1 + message[at]
    return at + 1
