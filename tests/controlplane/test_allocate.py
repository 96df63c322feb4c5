"""Addresses follow from names: the same from run to run, and never one that is written."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykmesh.controlplane.allocate import Allocation, allocate
from pykmesh.controlplane.settings import AddressRanges
from pykmesh.manifests.addresses import IP
from pykmesh.manifests.objects import Node, Object, Pod, Service, ServiceEntry, from_plain

from .manifest_texts import pod, service, service_entry

NAMES = st.lists(st.from_regex(r"[a-z]{1,4}", fullmatch=True), unique=True, max_size=40)
NARROW = AddressRanges(service_v4="10.96.0.0/26", service_v6="", pod_v4="10.244.0.0/26", pod_v6="")


def _pods(names: list[str]) -> list[Object]:
    return [from_plain(pod(name), Pod) for name in names]


def _addresses(allocation: Allocation) -> dict[str, tuple[IP, ...]]:
    return {obj.name: obj.ips for obj in allocation.objects if isinstance(obj, Pod)}


@given(NAMES, st.randoms())
def test_the_same_objects_get_the_same_addresses_in_any_order(names: list[str], random: object) -> None:
    once = _addresses(allocate(_pods(names), NARROW))
    random.shuffle(names)  # type: ignore[attr-defined]
    assert _addresses(allocate(_pods(names), NARROW)) == once
    assert len(set(once.values())) == len(names)
    assert all(ip_address(ip) in ip_network(NARROW.pod_v4) for ips in once.values() for ip in ips)


@given(NAMES.filter(bool))
def test_a_newcomer_moves_another_only_by_taking_its_address(names: list[str]) -> None:
    *old, new = names
    before = _addresses(allocate(_pods(old), NARROW))
    after = _addresses(allocate(_pods(names), NARROW))
    if after[new] not in before.values():
        assert before == {name: after[name] for name in old}


def test_a_newcomer_to_a_mesh_of_usual_size_moves_nobody() -> None:
    names = [f"pod-{i}" for i in range(300)]
    before = _addresses(allocate(_pods(names), AddressRanges()))
    after = _addresses(allocate(_pods([*names, "newcomer"]), AddressRanges()))
    assert before == {name: after[name] for name in names}


@given(NAMES, st.sets(st.integers(2, 62), max_size=22))
def test_a_written_address_is_never_handed_out(names: list[str], written: set[int]) -> None:
    explicit = [from_plain(pod(f"x-{i}", podIP=f"10.244.0.{i}"), Pod) for i in written]
    allocation = allocate([*explicit, *_pods(names[:39])], NARROW)
    given_out = [ip for ips in _addresses(allocation).values() for ip in ips]
    assert len(set(given_out)) == len(given_out)
    assert {f"10.244.0.{i}" for i in written} <= set(given_out)
    assert not allocation.shortages


def test_a_range_that_is_full_is_a_shortage_of_those_that_come_last() -> None:
    tiny = AddressRanges(pod_v4="10.244.0.0/29", pod_v6="")  # five addresses to give
    allocation = allocate(_pods(list("abcdefg")), tiny)
    assert [(shortage.ref.name, shortage.why) for shortage in allocation.shortages] == [
        ("f", "the range 10.244.0.0/29 is full"),
        ("g", "the range 10.244.0.0/29 is full"),
    ]


def test_a_written_range_of_addresses_is_left_alone() -> None:
    entry = service_entry("outside", "x.example.com", addresses=["10.244.0.0/27"], resolution="NONE")
    objects = [from_plain(entry, ServiceEntry), *_pods([f"pod-{i}" for i in range(30)])]
    taken = ip_network("10.244.0.0/27")
    ips = [ip for ips in _addresses(allocate(objects, NARROW)).values() for ip in ips]
    assert len(ips) == 30
    assert not any(ip_address(ip) in taken for ip in ips)


FAMILIES = {
    "nothing said": ({}, ["10.96."]),
    "IPv6 only": ({"ipFamilies": ["IPv6"]}, ["fd96::"]),
    "both, v6 first": ({"ipFamilies": ["IPv6", "IPv4"]}, ["fd96::", "10.96."]),
    "dual stack by policy": ({"ipFamilyPolicy": "PreferDualStack"}, ["10.96.", "fd96::"]),
    "the second of two": (
        {"ipFamilyPolicy": "RequireDualStack", "clusterIP": "10.0.0.1"},
        ["10.0.0.1", "fd96::"],
    ),
    "single stack by policy": ({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]}, ["fd96::"]),
    "written": ({"clusterIPs": ["10.0.0.1"]}, ["10.0.0.1"]),
    "headless": ({"clusterIP": "None"}, []),
    "external name": ({"type": "ExternalName"}, []),
}


@pytest.mark.parametrize(("spec", "prefixes"), FAMILIES.values(), ids=FAMILIES)
def test_a_service_gets_addresses_of_the_families_it_serves(
    spec: dict[str, Any], prefixes: list[str]
) -> None:
    (made,) = allocate([from_plain(service("web", **spec), Service)], AddressRanges()).objects
    assert isinstance(made, Service)
    assert [vip[: len(prefix)] for vip, prefix in zip(made.vips, prefixes, strict=True)] == prefixes


def test_a_pod_gets_an_address_of_each_range_and_one_of_the_host_network_that_of_its_node() -> None:
    node = {
        "metadata": {"name": "node-a"},
        "status": {"addresses": [{"type": "InternalIP", "address": "172.18.0.2"}]},
    }
    host = {**pod("agent"), "spec": {"hostNetwork": True, "nodeName": "node-a"}}
    objects = [from_plain(node, Node), from_plain(host, Pod), from_plain(pod("web-1"), Pod)]
    stray = {**pod("stray"), "spec": {"hostNetwork": True, "nodeName": "elsewhere"}}
    allocation = allocate([*objects, from_plain(stray, Pod)], AddressRanges())
    ips = _addresses(allocation)
    assert [shortage.ref.name for shortage in allocation.shortages] == ["stray"]
    assert ips["agent"] == (IP("172.18.0.2"),)
    assert [ip.family.value for ip in ips["web-1"]] == ["IPv4", "IPv6"]


def test_a_pod_that_has_ended_gets_none() -> None:
    assert _addresses(allocate([from_plain(pod("job", phase="Succeeded"), Pod)], NARROW)) == {"job": ()}


@pytest.mark.parametrize(
    ("spec", "count"),
    [({}, 4), ({"resolution": "NONE"}, 0), ({"addresses": ["240.1.1.1"]}, 0), ({"hosts": ["*.x"]}, 0)],
)
def test_each_host_of_a_service_entry_without_addresses_gets_two(spec: dict[str, Any], count: int) -> None:
    entry = service_entry("out", "", **{"hosts": ["a.example.com", "b.example.com"], **spec})
    (made,) = allocate([from_plain(entry, ServiceEntry)], AddressRanges()).objects
    assert isinstance(made, ServiceEntry)
    assert len({address.value for address in made.status.addresses}) == count


@pytest.mark.parametrize("cidr", ["10.96.0.1/16", "nonsense", "fd00::/112"])
def test_a_range_that_cannot_be_is_refused(cidr: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        AddressRanges(service_v4=cidr)
