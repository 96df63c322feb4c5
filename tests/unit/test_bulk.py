"""Many addresses together are read exactly as one by one, whatever their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import compress
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pykmesh.contracts import bulk, wire
from pykmesh.contracts.address import FieldError, Service, Workload, decode_address, workload_message
from pykmesh.contracts.bulk import Group, Ordinary, decode_addresses, names_of
from pykmesh.kernel.records import IP_BYTES, Ip, ip_from_wire, is_v4
from pykmesh.proto.workload_pb2 import Address

TEXT = st.text(max_size=5)
IP4, IP6 = st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)
MAPPED = IP4.map(lambda ip: bytes(10) + b"\xff\xff" + ip)
IPS = st.one_of(IP4, IP6, MAPPED, st.binary(max_size=6))
NUMBERS = st.integers(0, 2)
PORTS = st.lists(st.tuples(st.integers(0, 70000), st.integers(0, 70000)), max_size=2)


@st.composite
def workloads(draw: st.DrawFn) -> Address:
    found = Address()
    workload = found.workload
    workload.uid, workload.namespace, workload.network = draw(TEXT), draw(TEXT), draw(TEXT)
    workload.name, workload.hostname = draw(TEXT), draw(st.text(max_size=200))
    usual = st.permutations([draw(IP4), draw(IP6 | MAPPED)])
    ips = draw(st.lists(IPS, max_size=3) | usual)
    workload.addresses.extend(ips[: draw(st.integers(1, 3))])
    workload.tunnel_protocol, workload.status, workload.network_mode = (draw(NUMBERS) for _ in range(3))
    workload.authorization_policies.extend(draw(st.lists(TEXT, max_size=2)))
    for service, ports in draw(st.dictionaries(TEXT, PORTS, max_size=3)).items():
        entry = workload.services[service]
        for service_port, target_port in ports:
            entry.ports.add(service_port=service_port, target_port=target_port)
    if draw(st.booleans()):
        workload.waypoint.hbone_mtls_port = draw(st.integers(0, 1 << 31))
    if draw(st.booleans()):
        workload.capacity.value = draw(st.integers(0, 1 << 31))
    workload.locality.zone = draw(TEXT)
    return found


@st.composite
def services(draw: st.DrawFn) -> Address:
    found = Address()
    service = found.service
    service.name, service.namespace, service.hostname = draw(TEXT), draw(TEXT), draw(TEXT)
    for ip in draw(st.lists(IPS, max_size=3)):
        vip = service.addresses.add(address=ip, network=draw(TEXT))
        if draw(st.integers(0, 3)) == 0:
            vip.length = draw(st.integers(0, 130))
    for service_port, target_port in draw(PORTS) * draw(st.integers(1, 2)):
        service.ports.add(service_port=service_port, target_port=target_port)
    service.ip_families, service.visibility = draw(st.integers(0, 5)), draw(NUMBERS)
    service.canonical = draw(st.booleans())
    if draw(st.booleans()):
        service.load_balancing.mode = draw(st.integers(0, 4))
        service.load_balancing.routing_preference.extend(draw(st.lists(st.integers(0, 7), max_size=2)))
        service.load_balancing.health_policy = draw(NUMBERS)
    rare = draw(st.integers(0, 8))
    if rare == 1:
        service.waypoint.hostname.hostname = draw(TEXT)
    elif rare == 2:
        service.weighted_waypoints.add(weight=draw(NUMBERS))
    elif rare == 3:
        service.extensions.add(name=draw(TEXT))
    return found


@st.composite
def values(draw: st.DrawFn) -> bytes:
    """Workloads and services, some with bytes of theirs changed, cut off or repeated."""
    data = draw(st.one_of(workloads(), services())).SerializeToString()
    at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
    damage: Callable[[], bytes] = draw(
        st.sampled_from(
            [
                lambda: data,
                lambda: data[:at] + draw(st.binary(max_size=12)) + data[at + length :],
                lambda: data[:at],
                lambda: data + data,
                lambda: b"\x0a" + bytes([len(_FIXED)]) + _FIXED,
            ]
        )
    )
    return damage()


# A workload with fields of the wire types that are rare, and numbers of ten bytes.
_FIXED = b"\xa2\x01\x01p" + b"\x3d" + bytes(4) + b"\x39" + bytes(8) + b"\x88\x01" + b"\xff" * 9 + b"\x01"


def one_by_one(data: list[bytes]) -> list[Service | Workload | str]:
    found: list[Service | Workload | str] = []
    for value in data:
        try:
            found.append(decode_address(value))
        except FieldError as error:
            found.append(str(error))
    return found


ALIKE = st.sampled_from([1, 16])
"""With 1, parts are cut out by their lengths, as those of a large response are; with 16 one by one."""


@settings(max_examples=300, database=None, deadline=None)
@given(
    st.lists(st.binary(max_size=4) | st.sampled_from([b"ab", b"ab\0", b"\0\0", b"\0"]), max_size=40), ALIKE
)
def test_parts_are_what_was_put_together(data: list[bytes], alike: int) -> None:
    buffer = wire.Buffer(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "ALIKE", alike)
        assert list(buffer.parts(buffer.spans)) == data
        assert buffer.distinct(buffer.spans) == set(data)
        differs = buffer.differs(buffer.spans).tolist()
    if alike == 1:
        assert differs == [not n or data[n - 1] != value for n, value in enumerate(data)]


def name(found: Service | Workload | str) -> str:
    return found if isinstance(found, str) else found.uid if isinstance(found, Workload) else found.name


def together(data: list[bytes]) -> list[Service | Workload | str]:
    return [str(found) if isinstance(found, FieldError) else found for found in decode_addresses(data)]


@settings(max_examples=300, database=None, deadline=None)
@given(st.lists(values(), max_size=12), ALIKE)
@example([b""], 16)
@example([b"\x0a\x00", b"\x0a", b"\x0a\x80\x80\x80\x80\x80", b"\x0b\x0c", b"\x0a\xff\xff\xff\x7f"], 16)
def test_together_says_what_one_by_one_says(data: list[bytes], alike: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "FEWEST", 0)
        patch.setattr(wire, "ALIKE", alike)
        assert together(data) == one_by_one(data)
        assert list(map(str, names_of(data))) == list(map(name, one_by_one(data)))


@settings(max_examples=300, database=None, deadline=None)
@given(st.lists(values(), max_size=12), st.integers(0, 12), ALIKE)
def test_groups_say_of_ordinary_workloads_what_is_decoded_of_each(
    data: list[bytes], first: int, alike: int
) -> None:
    ordinary = Ordinary()
    parts = [part for part in (data[:first], data[first:]) if part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "ALIKE", alike)
        taken = [value for part in parts for value in compress(part, ordinary.take(part))]
    wanted = [found for found in map(decoded, data) if isinstance(found, Workload) and is_ordinary(found)]
    try:
        groups = list(ordinary.groups())
    except (FieldError, ValueError):
        assert any(isinstance(decoded(value), FieldError) for value in taken)
        return
    assert sorted(map(str, members(groups))) == sorted(map(str, wanted))


def is_ordinary(workload: Workload) -> bool:
    return (
        workload.healthy
        and len(workload.services) == workload.capacity == 1
        and len(workload.addresses) in (1, 2)
        and len({is_v4(ip) for ip in workload.addresses}) == len(workload.addresses)
        and all(
            len(ip) == 4 or not is_v4(ip_from_wire(ip)) for ip in workload_message(workload.raw).addresses
        )
        and (not workload.policies or (len(workload.policies) == 1 and any(workload.policies)))
        and not (workload.host_network or workload.waypoint)
        and not workload_message(workload.raw).hostname
    )


def members(groups: list[Group]) -> Iterator[Workload]:
    """Each member, put together again; the rest is as its message says."""
    for group in groups:
        size = group.each * IP_BYTES
        ips = [group.addresses[at : at + size] for at in range(0, len(group.addresses), size)]
        for is_6 in (False, True):
            of_family = group.of_family(is_6=is_6)
            assert of_family == b"".join(ip for ip in in_order(group.addresses) if is_v4(ip) != is_6)
        assert group.only(range(len(group.uids))) == group
        for uid, own, raw in zip(group.uids, ips, group.raws, strict=True):
            found = decode_address(raw)
            assert isinstance(found, Workload)
            yield msgspec.structs.replace(
                found,
                uid=uid,
                network=group.network,
                namespace=group.namespace,
                policies=group.policies,
                addresses=tuple(in_order(own)),
                services=((group.service, group.ports),),
            )


def in_order(addresses: bytes) -> Iterator[Ip]:
    return (Ip(addresses[at : at + IP_BYTES]) for at in range(0, len(addresses), IP_BYTES))


def decoded(value: bytes) -> Service | Workload | FieldError:
    try:
        return decode_address(value)
    except FieldError as error:
        return error


@pytest.mark.parametrize("bad", [b"", b"\xff", b"\x0a\x03\xa2\x01\x00", b"\x0a\x06\xa2\x01\x03p\xff\xfe"])
def test_a_bad_one_leaves_its_neighbours_alone(bad: bytes) -> None:
    good = [_pod(number) for number in range(50)]
    found = decode_addresses([*good[:20], bad, *good[20:]])
    assert isinstance(found.pop(20), FieldError)
    assert [item.uid for item in found if isinstance(item, Workload)] == [f"pod-{n}" for n in range(50)]


def _pod(number: int) -> bytes:
    fields: dict[str, Any] = {"uid": f"pod-{number}", "addresses": [bytes([10, 0, 0, number])]}
    return Address(workload=fields).SerializeToString()
