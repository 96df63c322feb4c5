"""The encoding of each message is pinned: another version of a process must read it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykmesh.contracts import messages
from pykmesh.contracts.messages import (
    VERSION,
    ConfigBatch,
    ContractError,
    DnsOutcome,
    DnsReply,
    DnsRequest,
    MapReport,
    Message,
    NamesChanged,
    RefusedReply,
    RefusedRequest,
    ResolveReply,
    ResolveRequest,
    Resource,
    ResourceType,
    ServiceName,
    SnapshotPage,
    SnapshotRequest,
    Subject,
    WorkloadName,
)
from pykmesh.contracts.requests import Histogram, RequestSeries, RequestSums
from pykmesh.contracts.waypoints import (
    Endpoint,
    MeshService,
    ServicePort,
    WaypointsReply,
    WaypointsRequest,
)

NAMES = ("uid", "name", "ns", "wl", "sa", "td", "cn", "cr", "cl", "re", "zo", "se")
GOLDEN: list[tuple[Message, str]] = [
    (
        ConfigBatch(
            VERSION,
            "ab",
            7,
            ResourceType.AUTHORIZATION,
            ["gone"],
            [Resource("n", b"\x01\x02")],
            complete=True,
            synced=False,
        ),
        "99 01 a26162 07 01 91a4676f6e65 9192a16ec4020102 c3 c2 90",
    ),
    (
        ConfigBatch(VERSION, "ab", 300, ResourceType.ADDRESS, [], [], complete=False, synced=True),
        "99 01 a26162 cd012c 00 90 90 c2 c3 90",
    ),
    (SnapshotRequest(VERSION, "c.0"), "92 01 a3632e30"),
    (
        SnapshotPage(
            VERSION,
            "ab",
            7,
            synced=True,
            type=ResourceType.ADDRESS,
            resources=[Resource("n", b"")],
            next_cursor="",
            rejected=["r"],
        ),
        "98 01 a26162 07 c3 00 9192a16ec400 a0 91a172",
    ),
    (MapReport(VERSION, "ab", 9, 8, {"n": "full"}, 2), "96 01 a26162 09 08 81a16ea466756c6c 02"),
    (RefusedRequest(VERSION, ["n"]), "92 01 91a16e"),
    (RefusedReply(VERSION, {"n": "full"}), "92 01 81a16ea466756c6c"),
    (
        ResolveRequest(VERSION, [2**64 - 1], [("", b"\0" * 16)]),
        "93 01 91cfffffffffffffffff 9192a0c410" + "00" * 16,
    ),
    (NamesChanged(VERSION, [("", b"\0" * 16)], [None]), "93 01 9192a0c410" + "00" * 16 + "91c0"),
    (
        ResolveReply(VERSION, [ServiceName("s", "n", "h", 80), None], [None]),
        "93 01 9294a173a16ea16850c0 91c0",
    ),
    (
        ResolveReply(VERSION, [], [WorkloadName(*NAMES)]),
        "93 01 90 919c a3756964 a46e616d65" + "".join(f"a2{name.encode().hex()}" for name in NAMES[2:]),
    ),
    (
        DnsRequest(VERSION, "", [b"\0" * 16], b"\0" * 16, "web", is_6=True),
        "96 01 a0 91c410" + "00" * 16 + "c410" + "00" * 16 + "a3776562 c3",
    ),
    (
        DnsReply(VERSION, DnsOutcome.ANSWER, "web", [b"\0" * 16], [(b"\0" * 16, 53)]),
        "95 01 02 a3776562 91c410" + "00" * 16 + "91 92c410" + "00" * 16 + "35",
    ),
    (DnsReply(VERSION, DnsOutcome.NOT_READY), "95 01 00 a0 90 c0"),
    (
        WaypointsRequest(VERSION, ["a"], ["b"], ["c"], ["d"], ["e"], ["f"], ["g"], with_principals=True),
        "99 01 91a161 91a162 91a163 91a164 91a165 91a166 91a167 c3",
    ),
    (
        WaypointsReply(
            VERSION,
            is_synced=True,
            users={"a": ["b"]},
            services=[
                MeshService(
                    "b",
                    ["10.0.0.1"],
                    [ServicePort(80, [Endpoint("10.0.0.2", 8080, 1, "v1", ["fd00::2"])], ("s", 443))],
                    ["10.0.0.1"],
                )
            ],
            namespace_ids={"d": b"12345"},
            account_ids={"e": b"67890"},
            principals={"p": b"1234567890"},
            service_secret=b"1234567890" * 4,
        ),
        (
            "98 01 c3 81a16191a162 9194a16291a831302e302e302e31 919350 9195a831302e302e302e32cd1f9001a27631"
            "91a7666430303a3a32 92a173cd01bb 91a831302e302e302e31"
            "81a164c4053132333435 81a165c4053637383930 81a170c40a31323334353637383930"
            " c428" + "31323334353637383930" * 4
        ),
    ),
    (
        RequestSums(VERSION, "i", 1.5, 2, [RequestSeries(*"ceprfgs", *[Histogram([1] * 20, 0.5)] * 3)]),
        "95 01 a169 cb3ff8000000000000 02 91 9a a163 a165 a170 a172 a166 a167 a173"
        + f"92 dc0014 {'01' * 20} cb3fe0000000000000" * 3,
    ),
]
KINDS = [
    ConfigBatch,
    SnapshotRequest,
    SnapshotPage,
    MapReport,
    RefusedRequest,
    RefusedReply,
    ResolveRequest,
    ResolveReply,
    NamesChanged,
    DnsRequest,
    DnsReply,
    WaypointsRequest,
    WaypointsReply,
    RequestSums,
]


@pytest.mark.parametrize(("message", "encoded"), GOLDEN, ids=lambda value: type(value).__name__)
def test_each_message_has_the_bytes_that_it_always_had(message: Message, encoded: str) -> None:
    assert messages.encode(message) == bytes.fromhex(encoded)
    assert messages.decode(type(message), bytes.fromhex(encoded)) == message


def test_the_subjects_and_types_are_what_they_always_were() -> None:
    assert {str(subject) for subject in Subject} == {
        "pykmesh.v1.config.log",
        "pykmesh.v1.config.snapshot",
        "pykmesh.v1.map.report",
        "pykmesh.v1.map.refused",
        "pykmesh.v1.map.names",
        "pykmesh.v1.map.resolve",
        "pykmesh.v1.dns.resolve",
        "pykmesh.v1.map.waypoints",
        "pykmesh.v1.waypoint.requests",
    }
    assert messages.TYPE_URLS == {
        0: "type.googleapis.com/istio.workload.Address",
        1: "type.googleapis.com/istio.security.Authorization",
    }


@pytest.mark.parametrize(("message", "_"), GOLDEN, ids=lambda value: type(value).__name__)
def test_a_later_contract_may_add_fields_at_the_end(message: Message, _: str) -> None:
    fields = [*msgspec.structs.astuple(message), "new", {"more": 1}]
    assert messages.decode(type(message), msgspec.msgpack.encode(fields)) == message


def test_a_workload_without_the_field_that_was_added_is_still_read() -> None:
    before = [VERSION, [], [list(NAMES[:-1])]]
    found = messages.decode(ResolveReply, msgspec.msgpack.encode(before))
    assert found.addresses == [WorkloadName(*NAMES[:-1], service="")]


@pytest.mark.parametrize(("message", "_"), GOLDEN, ids=lambda value: type(value).__name__)
def test_another_version_of_the_contract_is_refused(message: Message, _: str) -> None:
    other = [VERSION + 1, *msgspec.structs.astuple(message)[1:]]
    with pytest.raises(ContractError, match=f"{type(message).__name__}: not version 1"):
        messages.decode(type(message), msgspec.msgpack.encode(other))


@pytest.mark.parametrize(("message", "encoded"), GOLDEN, ids=lambda value: type(value).__name__)
def test_a_message_that_is_cut_anywhere_is_refused(message: Message, encoded: str) -> None:
    data = bytes.fromhex(encoded)
    for end in range(len(data)):
        with pytest.raises(ContractError, match=type(message).__name__):
            messages.decode(type(message), data[:end])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, database=None)
@given(garbage=st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(lambda data: b"\x98\x01" + data)))
def test_garbage_is_refused_and_never_anything_else(kind: type[Message], garbage: bytes) -> None:
    try:
        found = messages.decode(kind, garbage)
    except ContractError as error:
        assert str(error).startswith(kind.__name__)  # noqa: PT017 (some bytes are messages)
    else:
        assert isinstance(found, kind)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(ContractError):
        messages.decode(SnapshotRequest, b"\x93\x01\xa0" + b"\x91" * 100_000 + b"\x90")


def test_a_batch_without_changes_that_completes_nothing_is_a_heartbeat() -> None:
    heartbeat = ConfigBatch(VERSION, "e", 1, ResourceType.ADDRESS, [], [], complete=False, synced=True)
    assert heartbeat.is_heartbeat
    assert not msgspec.structs.replace(heartbeat, complete=True).is_heartbeat
    assert not msgspec.structs.replace(heartbeat, removed=["n"]).is_heartbeat
