"""The proxy's messages, and what it keeps of map_writer's answers."""

from __future__ import annotations

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykmesh.bus import BusUnavailableError
from pykmesh.contracts import messages
from pykmesh.contracts.messages import VERSION, DnsOutcome, DnsReply, DnsRequest
from services.dns_proxy import answers, wire
from services.dns_proxy.answers import Answers

ADDRESSES = [f"10.0.{number // 250}.{number % 250}" for number in range(100)]


def query(name: str = "Web.Shop.", kind: str = "A", **options: int) -> bytes:
    return dns.message.make_query(name, kind, **options).to_wire()  # type: ignore[arg-type]


def test_a_question_is_read() -> None:
    found = wire.read(query("Web.Shop.", "AAAA"))
    assert found is not None
    assert (found.name, found.is_for_addresses, found.is_6, found.is_transfer) == (
        "web.shop",
        True,
        True,
        False,
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        query()[:11],
        query()[:-1],
        dns.message.make_response(dns.message.from_wire(query())).to_wire(),
        dns.message.make_query("x.", "A", "CH").to_wire(),
        b"\1\2\x28\0" + query()[4:],  # an update
        b"\1\2\1\0\0\2\0\0\0\0\0\0" + query()[12:] + query()[12:],
    ],
    ids=["nothing", "no header", "cut off", "an answer", "another class", "another kind", "two questions"],
)
def test_what_is_no_plain_question_is_nobodys_but_the_servers(data: bytes) -> None:
    assert wire.read(data) is None


def test_an_answer_has_all_that_a_resolver_looks_at() -> None:
    found = wire.read(query())
    assert found is not None
    reply = dns.message.from_wire(wire.answer(found, ["10.0.0.1", "10.0.0.2"], "", 512))
    assert reply.id == found.message.id
    assert reply.flags & (dns.flags.QR | dns.flags.AA | dns.flags.RA | dns.flags.RD) == reply.flags
    (records,) = reply.answer
    assert (records.name.to_text(), records.ttl) == ("Web.Shop.", 30)
    assert {record.to_text() for record in records} == {"10.0.0.1", "10.0.0.2"}


def test_an_alias_is_a_cname_before_the_addresses() -> None:
    found = wire.read(query("api.example.com.cluster.local."))
    assert found is not None
    reply = dns.message.from_wire(wire.answer(found, ["10.0.0.1"], "api.example.com", 512))
    assert [rrset.to_text() for rrset in reply.answer] == [
        "api.example.com.cluster.local. 30 IN CNAME api.example.com.",
        "api.example.com. 30 IN A 10.0.0.1",
    ]


def test_a_name_without_addresses_is_there_all_the_same() -> None:
    found = wire.read(query())
    assert found is not None
    for alias in ("", "web.shop"):
        reply = dns.message.from_wire(wire.answer(found, [], alias, 512))
        assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])


@pytest.mark.parametrize(("options", "room"), [({}, 512), ({"payload": 1232}, 1232), ({"payload": 100}, 512)])
def test_what_does_not_fit_is_left_away_and_said(options: dict[str, int], room: int) -> None:
    found = wire.read(query(**options))
    assert found is not None
    assert wire.udp_room(found) == room
    data = wire.answer(found, ADDRESSES, "", room)
    assert room - 16 < len(data) <= room
    part = dns.message.from_wire(data)
    assert part.flags & dns.flags.TC
    assert {record.to_text() for record in part.answer[0]} < set(ADDRESSES)
    whole = dns.message.from_wire(wire.answer(found, ADDRESSES, "", wire.MESSAGE_BYTES_MAX))
    assert not whole.flags & dns.flags.TC
    assert len(whole.answer[0]) == len(ADDRESSES)


def test_a_failure_repeats_the_question() -> None:
    reply = dns.message.from_wire(wire.failure(query()))
    assert (reply.rcode(), len(reply.question), reply.answer) == (dns.rcode.SERVFAIL, 1, [])
    assert dns.message.from_wire(wire.failure(b"\0" * 12)).rcode() == dns.rcode.SERVFAIL


@given(st.binary(min_size=12, max_size=80), st.booleans())
def test_any_bytes_are_read_and_failed_without_an_error(data: bytes, is_query: bool) -> None:
    if is_query:
        data = b"\1\2\1\0\0\1\0\0\0\0\0\0" + data[12:]
    wire.read(data)
    assert 12 <= wire.question_end(data) <= len(data)
    assert wire.failure(data)[:2] == data[:2]
    try:
        dns.message.from_wire(wire.failure(data), ignore_trailing=True)
    except dns.exception.DNSException:
        assert wire.read(data) is None


def test_only_the_answer_to_the_question_is_taken() -> None:
    asked = query("Web.Shop.")
    found = wire.read(asked)
    assert found is not None
    reply = wire.answer(found, ["10.0.0.1"], "", 512)
    assert wire.answers(reply, asked)
    assert wire.answers(reply.replace(b"Web", b"wEB"), asked)
    other_number = bytes([reply[0] ^ 1]) + reply[1:]
    for other in (b"", asked, other_number, reply.replace(b"Web", b"Wob")):
        assert not wire.answers(other, asked)


SOA = "z.test. 5 IN SOA ns.z.test. root.z.test. {} 3 3 3 3"
A = "a.z.test. 5 IN A 192.0.2.1"


def ends(kind: str, *messages: list[str | int], known: int | None = None) -> list[bool]:
    """Of each message, whether it is the last one. Its records, a SOA by its serial number."""
    asked = dns.message.make_query("z.test.", kind)
    if known is not None:
        asked.authority.append(dns.rrset.from_text("z.test.", *SOA.format(known).split(" ", 4)[1:]))
    found = wire.read(asked.to_wire())
    is_last = wire.end_of_answers(found)
    said = []
    for records in messages:
        reply = dns.message.make_response(asked)
        for record in records:
            text = SOA.format(record) if isinstance(record, int) else record
            name, ttl, of, kind_, data = text.split(" ", 4)
            reply.answer.append(dns.rrset.from_text(name, int(ttl), of, kind_, data))
        said.append(is_last(reply.to_wire()))
    return said


@pytest.mark.parametrize(
    ("expected", "kind", "known", "messages"),
    [
        ([True], "A", None, [[A]]),
        ([True], "AXFR", None, [[]]),
        ([True], "AXFR", None, [[A]]),
        ([True], "AXFR", None, [[7, A, 7]]),
        ([True], "AXFR", None, [[7, 7]]),
        ([False, False, True], "AXFR", None, [[7], [A, A], [A, 7]]),
        ([True], "IXFR", 7, [[7]]),
        ([True], "IXFR", 8, [[7]]),
        ([False, True], "IXFR", 6, [[7], [A, 7]]),
        ([True], "IXFR", 5, [[7, 5, A, 6, A, 6, A, 7, A, 7]]),
        ([False, False, True], "IXFR", 5, [[7], [5, A, 7], [A, 7]]),
        ([True], "IXFR", 2**32 - 1, [[2**32 - 2]]),
        ([False, True], "IXFR", 2**32 - 1, [[1], [A, 1]]),
    ],
)
def test_a_transfer_ends_with_what_it_began_with(
    expected: list[bool], kind: str, known: int | None, messages: list[list[str | int]]
) -> None:
    assert ends(kind, *messages, known=known) == expected


def test_a_transfer_ends_with_what_fails_or_cannot_be_read() -> None:
    found = wire.read(query("z.test.", "AXFR"))
    failed = dns.message.make_response(dns.message.from_wire(query("z.test.", "AXFR")))
    failed.set_rcode(dns.rcode.REFUSED)
    for message in (b"", failed.to_wire(), failed.to_wire()[:3], b"\0\0\x80\0\0\0\0\2\0\0\0\0\xc0"):
        assert wire.end_of_answers(found)(message)


class FakeBus:
    """Answers with what it is told, or not at all."""

    connected = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.reply: DnsReply | None = None

    async def request(self, _subject: str, data: bytes, _timeout_s: float) -> bytes:
        self.asked.append(messages.decode(DnsRequest, data).name)
        if self.reply is None:
            raise BusUnavailableError("nobody")
        return messages.encode(self.reply)


ANSWER = DnsReply(VERSION, DnsOutcome.ANSWER, "", [bytes(16)], [(bytes(16), 5353)])
UNKNOWN = DnsReply(VERSION, DnsOutcome.UNKNOWN_CLIENT)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(answers, "time", found)
    return found


async def find(found: Answers, name: str = "web") -> DnsReply:
    return await found.find((bytes(16),), bytes(16), name, is_6=False)


@pytest.mark.anyio
async def test_a_question_is_not_asked_again_for_a_moment(clock: Clock) -> None:
    kept, bus = Answers("", 0.1), FakeBus()
    kept.bus, bus.reply = bus, ANSWER  # type: ignore[assignment]
    for _ in range(5):
        assert await find(kept) == ANSWER
    clock.now += answers.FRESH_S
    await find(kept)
    assert bus.asked == ["web", "web"]


@pytest.mark.anyio
async def test_an_answer_outlives_map_writer_by_its_time_to_live_and_the_way_by_more(clock: Clock) -> None:
    kept, bus = Answers("", 0.1), FakeBus()
    kept.bus, bus.reply = bus, ANSWER  # type: ignore[assignment]
    await find(kept)
    bus.reply = None
    clock.now += wire.TTL_S - 1
    assert await find(kept) == ANSWER
    clock.now += 2
    forward = DnsReply(VERSION, DnsOutcome.FORWARD, "", [], ANSWER.upstreams)
    assert await find(kept) == forward
    assert await find(kept, "never asked") == forward
    assert kept.unanswered == 3


@pytest.mark.anyio
async def test_without_a_bus_every_question_is_the_servers(clock: Clock) -> None:
    assert await find(Answers("", 0.1)) == DnsReply(VERSION, DnsOutcome.FORWARD, "", [], None)


@pytest.mark.anyio
async def test_who_is_unknown_is_asked_for_again(clock: Clock) -> None:
    kept, bus = Answers("", 0.1), FakeBus()
    kept.bus, bus.reply = bus, UNKNOWN  # type: ignore[assignment]
    assert await find(kept) == UNKNOWN
    bus.reply = ANSWER
    assert await find(kept) == ANSWER


@pytest.mark.anyio
async def test_what_is_kept_is_bounded_and_names_do_not_push_the_way_out(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "KEPT_MAX", 10)
    kept, bus = Answers("", 0.1), FakeBus()
    kept.bus, bus.reply = bus, ANSWER  # type: ignore[assignment]
    await find(kept)
    other = (bytes(16),), bytes([1] * 16)
    for number in range(50):
        await kept.find(*other, f"name-{number}", is_6=False)
    assert len(kept) == 10
    bus.reply = None
    assert (await find(kept, "never asked")).upstreams == ANSWER.upstreams
