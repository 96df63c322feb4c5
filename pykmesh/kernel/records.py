"""Keys and values of the maps, packed and unpacked by the layout of the headers."""

from __future__ import annotations

import hashlib
import ipaddress
import struct
from functools import lru_cache
from typing import Final, NamedTuple, NewType

from pykmesh.kernel.layout import codec, dns_limits, offset

Ip = NewType("Ip", bytes)
"""Sixteen bytes, IPv4 as ::ffff:a.b.c.d."""

V4_PREFIX: Final = bytes(10) + b"\xff\xff"
IP_BYTES: Final = 16
NO_IP: Final = Ip(bytes(IP_BYTES))

SERVICE_KEY: Final = codec("service_key", "address", "network", "port")
SERVICE_VALUE: Final = codec("service_value", "id", "endpoints", "verdict", "flags", "affinity_s")
ENDPOINT_KEY: Final = codec("endpoint_key", "service", "slot")
ENDPOINT_SLOT: Final = offset("endpoint_key", "slot")
ENDPOINT_VALUE: Final = codec("endpoint_value", "service", "address", "port")
ENDPOINT_SHARE: Final = codec("endpoint_value", "other", "share")
ENDPOINT_OTHER: Final = offset("endpoint_value", "other")
"""Where that what says who it is ends, and how it is weighed begins."""
ENDPOINT_ADDRESS: Final = offset("endpoint_value", "address")
ADDRESS_KEY: Final = codec("address_key", "address", "network")
ADDRESS_VALUE: Final = codec("address_value", "kind", "verdict", "view")
RANGE_NETWORK_BITS: Final = 32
"""Of a range's prefix, those of the network."""
RANGE_KEY: Final = codec("range_key", "prefix_bits", "network", "address")
RANGE_VALUE: Final = codec("range_value", "address", "network")
FRONT_KEY: Final = codec("front_key", "address", "port")
FRONT_VALUE: Final = codec("front_value", "count", "ports")
POD_KEY: Final = codec("pod_key", "netns_cookie")
POD_VALUE: Final = codec("pod_value", "address4", "address6", "network", "cgroup_id")
HANDOFF_KEY: Final = codec("handoff_key", "client", "waypoint", "client_port", "waypoint_port")
HANDOFF_VALUE: Final = codec(
    "handoff_value", "service", "sequence", "prefix", "port", "client_namespace", "client_account"
)
IDENTITY_VALUE: Final = codec("identity_value", "netns_cookie", "namespace_id", "account_id")
IDENTITY_SECRET_KEY: Final = bytes(4)
IDENTITY_SECRET_BYTES: Final = 32
SERVICE_SECRET: Final = codec("service_secret", "word")
"""Five numbers of 64 bits."""
HANDOFF_SECRET: Final = codec("handoff_secret", "key", "is_set")
DNS_KEY: Final = codec("dns_key", "netns_cookie", "slot")
DNS_LISTENER: Final = codec("dns_listener", "beat_ns", "port", "is_6")
DNS_SERVER: Final = codec("dns_server", "address")
DNS_SLOTS, DNS_SILENCE_MS = dns_limits()
SWITCH_KEY: Final = struct.Struct("<I")
SWITCH_VALUE: Final = struct.Struct("<I")
OPEN_KEY: Final = codec("open_key", "local", "remote", "service", "direction", "protocol")


def ip_from_wire(address: bytes) -> Ip:
    """From the 4 or 16 bytes of the control plane. Other lengths: ValueError."""
    if len(address) == 4:
        return Ip(V4_PREFIX + address)
    if len(address) == 16:
        return Ip(address)
    raise ValueError(f"an address has 4 or 16 bytes, not {len(address)}")


def ip_from_text(text: str) -> Ip:
    return ip_from_wire(ipaddress.ip_address(text).packed)


def ip_to_text(ip: bytes) -> str:
    if ip[:12] == V4_PREFIX:
        return ".".join(map(str, ip[12:]))
    return str(ipaddress.IPv6Address(ip))


def is_v4(ip: bytes) -> bool:
    return ip[:12] == V4_PREFIX


def range_to_text(ip: bytes, bits: int) -> str:
    """`bits` of the sixteen bytes, as people count them: of an IPv4 range those of four."""
    return f"{ip_to_text(ip)}/{bits - 96 if is_v4(ip) and bits >= 96 else bits}"


def port_bytes(port: int) -> bytes:
    return port.to_bytes(2, "big")


def port_number(port: bytes) -> int:
    return int.from_bytes(port, "big")


_networks: dict[int, str] = {}


def network_id(name: str) -> int:
    """The 32-bit id of a network's name, the same after any restart; 0 for the empty one.

    ValueError when another name seen before has the same id (a hash).
    """
    return _network_id(name) if name else 0


def view_network(network: str, namespace: str) -> str:
    """The network in which the maps hold what one namespace's clients see of another one."""
    return f"{network}{_VIEW}{namespace}"


def is_view(key: bytes) -> bool:
    """Whether a key of `services` or `addresses` is in such a network."""
    return key[_NETWORK_END - 1] >= _VIEW_BIT >> 24


_VIEW: Final = "\0ns/"
_VIEW_BIT: Final = 1 << 31
"""Set in the ids of views alone."""
_NETWORK_END: Final = offset("address_key", "network") + 4


@lru_cache(maxsize=4096)
def _network_id(name: str) -> int:
    found = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % _VIEW_BIT or 1
    if _VIEW in name:
        found |= _VIEW_BIT
    if _networks.setdefault(found, name) != name:
        raise ValueError(f"the ids of networks {name!r} and {_networks[found]!r} collide")
    return found


class Destination(NamedTuple):
    """An address and port, and as people write them."""

    ip: Ip
    port: int

    def __str__(self) -> str:
        text = ip_to_text(self.ip)
        return f"[{text}]:{self.port}" if ":" in text else f"{text}:{self.port}"


def in_network(network: int) -> str:
    """What is said after an address of a network that has a name."""
    return f" in network {network:08x}" if network else ""


def stable_id(name: str) -> int:
    """A 64-bit id of a name, the same after any restart; never 0."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1
