"""What is read of an Address and of a policy, case by case; everything else is refused with its field."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from pykmesh.contracts import address
from pykmesh.contracts.address import (
    Families,
    FieldError,
    Mode,
    Policy,
    Range,
    Service,
    Waypoint,
    Workload,
    decode_address,
    decode_policy,
)
from pykmesh.kernel.records import Ip, ip_from_text
from pykmesh.proto.authorization_pb2 import Authorization
from pykmesh.proto.workload_pb2 import Address, Selection

Fields = dict[str, Any]
SERVICE = {"namespace": "shop", "hostname": "web.shop"}
WORKLOAD = {"uid": "C//Pod/shop/p"}
IP4, IP6 = ip_from_text("10.0.0.1"), ip_from_text("fd00::1")
DEFAULT_SERVICE = Service(
    name="shop/web.shop",
    hostname="web.shop",
    vips=(),
    ranges=(),
    ports=(),
    families=Families.AUTOMATIC,
    mode=Mode.UNSPECIFIED,
    scopes=(),
    allows_unhealthy=False,
    waypoints=(),
    canonical=False,
)


def message(kind: str, fields: Fields) -> bytes:
    """Fields as JSON has them; addresses are written as text."""
    return json_format.ParseDict({kind: _packed(fields)}, Address()).SerializeToString()


def _packed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_packed(item) for item in value]
    if isinstance(value, ipaddress.IPv4Address | ipaddress.IPv6Address):
        return json_format.MessageToDict(
            Address.FromString(
                b"\x0a" + bytes([len(value.packed) + 2]) + b"\x1a" + bytes([len(value.packed)]) + value.packed
            )
        )["workload"]["addresses"][0]
    return value


def extension(selection: Selection) -> Fields:
    config = {"@type": "type.googleapis.com/pykmesh.workload.v1.Selection"}
    return {"name": "pykmesh.io/selection", "config": config | json_format.MessageToDict(selection)}


V4, V6 = ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("fd00::1")
SERVICES: dict[str, tuple[Fields, Fields]] = {
    "a headless service": ({}, {}),
    "addresses of both families": (
        {"addresses": [{"address": V4}, {"network": "east", "address": V6}]},
        {"vips": (("", IP4), ("east", IP6))},
    ),
    "single addresses with a length": (
        {"addresses": [{"address": V4, "length": 32}, {"address": V6, "length": 128}]},
        {"vips": (("", IP4), ("", IP6))},
    ),
    "ranges, which begin where they begin": (
        {"addresses": [{"address": V4, "length": 24}, {"network": "east", "address": V6, "length": 0}]},
        {"ranges": (Range("", ip_from_text("10.0.0.0"), 120), Range("east", ip_from_text("::"), 0))},
    ),
    "an IPv4 address written as IPv6": (
        {"addresses": [{"address": ipaddress.ip_address("::ffff:10.0.0.1")}]},
        {"vips": (("", IP4),)},
    ),
    "ports, one of them by name": (
        {"ports": [{"servicePort": 80, "targetPort": 8080}, {"servicePort": 65535}]},
        {"ports": ((80, 8080), (65535, 0))},
    ),
    "a port twice, for UDP and TCP": (
        {"ports": [{"servicePort": 53, "targetPort": 5353}, {"servicePort": 53, "targetPort": 5354}]},
        {"ports": ((53, 5354),)},
    ),
    "families": ({"ipFamilies": "DUAL"}, {"families": Families.DUAL}),
    "a waypoint by name": (
        {"waypoint": {"hostname": {"namespace": "shop", "hostname": "wp"}, "hboneMtlsPort": 15008}},
        {"waypoints": (Waypoint(service="shop/wp"),)},
    ),
    "a waypoint by address": (
        {"waypoint": {"address": {"network": "n", "address": V4}, "hboneMtlsPort": 15008}},
        {"waypoints": (Waypoint(network="n", ip=IP4),)},
    ),
    "a waypoint of which nothing is said": ({"waypoint": {}}, {"waypoints": (Waypoint(),)}),
    "weighted waypoints": (
        {
            "waypoint": {"hostname": {"namespace": "shop", "hostname": "old"}},
            "weightedWaypoints": [
                {"weight": 95, "destination": {"hostname": {"namespace": "shop", "hostname": "wp"}}},
                {"weight": 5, "destination": {"address": {"network": "n", "address": V4}}},
                {"weight": 0, "destination": {"hostname": {"namespace": "shop", "hostname": "off"}}},
            ],
        },
        {"waypoints": (Waypoint(service="shop/wp", weight=95), Waypoint(network="n", ip=IP4, weight=5))},
    ),
    "weighted waypoints of which nothing is said": (
        {"weightedWaypoints": [{"weight": 2}]},
        {"waypoints": (Waypoint(weight=2),)},
    ),
    "weights that are all none": (
        {
            "waypoint": {"hostname": {"namespace": "shop", "hostname": "wp"}},
            "weightedWaypoints": [
                {"destination": {"hostname": {"namespace": "shop", "hostname": "off"}}},
            ],
        },
        {"waypoints": (Waypoint(service="shop/wp"),)},
    ),
    "weights that are all none, and no other": ({"weightedWaypoints": [{}]}, {"waypoints": (Waypoint(),)}),
    "unhealthy endpoints wanted": (
        {"loadBalancing": {"healthPolicy": "ALLOW_ALL"}},
        {"allows_unhealthy": True},
    ),
    "left alone": ({"loadBalancing": {"mode": "PASSTHROUGH"}}, {"mode": Mode.PASSTHROUGH}),
    "locality": (
        {"loadBalancing": {"mode": "FAILOVER", "routingPreference": ["NETWORK", "ZONE"]}},
        {"mode": Mode.FAILOVER, "scopes": (6, 2)},
    ),
    "canonical, with what decides nothing": (
        {"canonical": True, "name": "web", "subjectAltNames": ["x"], "ingressUseWaypoint": True},
        {"canonical": True},
    ),
    "seen in its namespace alone": ({"visibility": "NAMESPACE"}, {"hidden": True}),
    "extensions, one of which is ours": (
        {"extensions": [{"name": "x"}, extension(Selection(affinity_seconds=60, least_connections=True))]},
        {"selection": address.Selection(60, least_connections=True)},
    ),
}

WORKLOADS: dict[str, tuple[Fields, Fields]] = {
    "one of which nothing is said": ({}, {}),
    "addresses": ({"addresses": [V4, V6]}, {"addresses": (IP4, IP6)}),
    "no address, a name": ({"hostname": "example.com"}, {"hostname": "example.com"}),
    "an address, and a name that does not count": (
        {"hostname": "example.com", "addresses": [V4]},
        {"addresses": (IP4,)},
    ),
    "another network": ({"network": "east"}, {"network": "east"}),
    "not healthy": ({"status": "UNHEALTHY"}, {"healthy": False}),
    "on its host's network": ({"networkMode": "HOST_NETWORK"}, {"host_network": True}),
    "HBONE": ({"tunnelProtocol": "HBONE"}, {"prefers_hbone": True}),
    "a waypoint": ({"waypoint": {"address": {"address": V4}}}, {"waypoint": Waypoint(ip=IP4)}),
    "a capacity": ({"capacity": 5}, {"capacity": 5}),
    "a capacity of none": ({"capacity": 0}, {"capacity": 0}),
    "policies": ({"authorizationPolicies": ["shop/a", "shop/b"]}, {"policies": ("shop/a", "shop/b")}),
    "services with ports of its own": (
        {"services": {"shop/web.shop": {"ports": [{"servicePort": 80, "targetPort": 9090}]}, "shop/x": {}}},
        {"services": (("shop/web.shop", ((80, 9090),)), ("shop/x", ()))},
    ),
}
DEFAULT_WORKLOAD: Fields = {
    "uid": "C//Pod/shop/p",
    "network": "",
    "addresses": (),
    "services": (),
    "healthy": True,
    "host_network": False,
    "waypoint": None,
    "prefers_hbone": False,
    "capacity": 1,
    "policies": (),
    "namespace": "",
    "hostname": "",
}


@pytest.mark.parametrize("case", SERVICES)
def test_a_service_is_read(case: str) -> None:
    fields, differs = SERVICES[case]
    wanted = {field: getattr(DEFAULT_SERVICE, field) for field in Service.__struct_fields__} | differs
    assert decode_address(message("service", SERVICE | fields)) == Service(**wanted)


@pytest.mark.parametrize("case", WORKLOADS)
def test_a_workload_is_read(case: str) -> None:
    fields, differs = WORKLOADS[case]
    data = message("workload", WORKLOAD | fields)
    found = decode_address(data)
    assert isinstance(found, Workload)
    shown = {
        field: getattr(found, field)
        for field in Workload.__struct_fields__
        if field not in ("raw", "services")
    }
    assert shown | {"services": tuple(sorted(found.services))} == DEFAULT_WORKLOAD | differs
    assert found.raw == data


REFUSED: dict[str, tuple[str, Fields, str]] = {
    "no namespace": ("service", {"namespace": ""}, "service.namespace: empty"),
    "no hostname": ("service", {"hostname": ""}, "service.hostname: empty"),
    "an address without bytes": (
        "service",
        {"addresses": [{"network": "x"}]},
        "service.addresses: an address has 4 or 16 bytes, not 0",
    ),
    "an address of 5 bytes": (
        "service",
        {"addresses": [{"address": "AAAAAAA="}]},
        "service.addresses: an address has 4 or 16 bytes, not 5",
    ),
    "a length beyond IPv6": (
        "service",
        {"addresses": [{"address": V6, "length": 129}]},
        "service.addresses.length: 129 of 128 bits",
    ),
    "port 0": ("service", {"ports": [{"targetPort": 1}]}, "service.ports.service_port: 0 is no port"),
    "port 65536": (
        "service",
        {"ports": [{"servicePort": 65536}]},
        "service.ports.service_port: 65536 is no port",
    ),
    "target port 65536": (
        "service",
        {"ports": [{"servicePort": 1, "targetPort": 65536}]},
        "service.ports.target_port: 65536 is no port",
    ),
    "families": ("service", {"ipFamilies": 9}, "service.ip_families: 9 is not a valid Families"),
    "visibility": ("service", {"visibility": 2}, "service.visibility: 2 is unknown"),
    "mode": ("service", {"loadBalancing": {"mode": 4}}, "service.load_balancing.mode: 4 is not a valid Mode"),
    "health policy": (
        "service",
        {"loadBalancing": {"healthPolicy": 2}},
        "service.load_balancing.health_policy: 2 is unknown",
    ),
    "no uid": ("workload", {"uid": ""}, "workload.uid: empty"),
    "a workload's address": (
        "workload",
        {"addresses": ["AAAA"]},
        "workload.addresses: an address has 4 or 16 bytes, not 3",
    ),
    "status": ("workload", {"status": 2}, "workload.status: 2 is unknown"),
    "network mode": ("workload", {"networkMode": 2}, "workload.network_mode: 2 is unknown"),
    "tunnel": (
        "workload",
        {"tunnelProtocol": "LEGACY_ISTIO_MTLS"},
        "workload.tunnel_protocol: 2 is not supported",
    ),
    "a workload's port": (
        "workload",
        {"services": {"a/b": {"ports": [{"servicePort": 0}]}}},
        "workload.services.service_port: 0 is no port",
    ),
    "a workload's target port": (
        "workload",
        {"services": {"a/b": {"ports": [{"servicePort": 1, "targetPort": 70000}]}}},
        "workload.services.target_port: 70000 is no port",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_field(case: str) -> None:
    kind, fields, why = REFUSED[case]
    data = message(kind, (SERVICE if kind == "service" else WORKLOAD) | fields)
    for _ in range(2):  # what is remembered of entries must not let it pass the second time
        with pytest.raises(FieldError) as error:
            decode_address(data)
        assert str(error.value) == why


@pytest.mark.parametrize("data", [b"", b"\x1a\x00", b"\x08\x01"])
def test_neither_a_workload_nor_a_service_is_refused(data: bytes) -> None:
    with pytest.raises(FieldError, match="type: neither a workload nor a service"):
        decode_address(data)


_SOME = message(
    "workload", WORKLOAD | {"addresses": [V4], "services": {"a/b": {"ports": [{"servicePort": 1}]}}}
)


@settings(max_examples=500, database=None)
@given(
    st.one_of(
        st.binary(max_size=40),
        st.integers(0, 200).flatmap(lambda n: st.just(_SOME[:n])),
        st.binary(max_size=8).map(lambda b: _SOME[:30] + b + _SOME[30:]),
    )
)
def test_any_bytes_are_read_or_refused_and_nothing_else(data: bytes) -> None:
    for read in (lambda: decode_address(data), lambda: decode_policy("ns/name", data)):
        try:
            found: object = read()
        except FieldError:
            continue
        assert isinstance(found, Service | Workload | Policy)


POLICIES: dict[str, tuple[Fields, str | None]] = {
    "for everybody": ({"scope": "GLOBAL"}, ""),
    "for a namespace": ({"scope": "NAMESPACE"}, "shop"),
    "for who names it": ({"scope": "WORKLOAD_SELECTOR", "action": "DENY"}, None),
}


@pytest.mark.parametrize("case", POLICIES)
def test_a_policy_concerns(case: str) -> None:
    fields, namespace = POLICIES[case]
    data = json_format.ParseDict(
        {"name": "p", "namespace": "shop", **fields}, Authorization()
    ).SerializeToString()
    assert decode_policy("shop/p", data) == Policy("shop/p", namespace)


@pytest.mark.parametrize(
    ("fields", "why"), [({"action": 2}, "action: 2 is unknown"), ({"scope": 3}, "scope: 3 is unknown")]
)
def test_a_policy_with_an_unknown_word_is_refused(fields: Fields, why: str) -> None:
    data = json_format.ParseDict(fields, Authorization()).SerializeToString()
    with pytest.raises(FieldError) as error:
        decode_policy("shop/p", data)
    assert str(error.value) == why


def test_what_is_remembered_of_entries_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address.Remembered, "LIMIT", 10)
    remembered = address.Remembered(bytes.hex)
    for number in range(50):
        assert remembered[bytes([number])] == bytes([number]).hex()
        assert len(remembered) <= 10


def test_a_network_whose_id_collides_with_anothers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def collide(_: str) -> int:
        raise ValueError("the ids of networks 'a' and 'b' collide")

    monkeypatch.setattr(address, "network_id", collide)
    with pytest.raises(FieldError, match=r"workload\.network: the ids of networks 'a' and 'b' collide"):
        decode_address(message("workload", WORKLOAD | {"network": "b"}))


def test_an_address_of_either_family_has_sixteen_bytes() -> None:
    assert ip_from_text("10.0.0.1") == Ip(bytes(10) + b"\xff\xff\x0a\x00\x00\x01")
    assert len(ip_from_text("fd00::1")) == 16
