"""The address that a waypoint is told of a connection: which service it is for, and who asks.

An IPv6 address, also for an IPv4 service, so that there is room for the client's identity and a stock Envoy
can tell by it (bpf/waypoint.h makes it): 16 bits of the family, 32 of the service's address, 40 of the
client's namespace, 40 of its account. An IPv6 service's address is hashed: two that a waypoint cannot tell
apart are a conflict that its status names.

And the mesh's key, of which all nodes make the same ids, and what is told between nodes is sealed with.
"""

from __future__ import annotations

import hashlib
import ipaddress
from pathlib import Path
from typing import Final, NamedTuple

from pykmesh.contracts.settings import SettingsError
from pykmesh.kernel.layout import HandoffPrefix
from pykmesh.kernel.records import HANDOFF_SECRET, IDENTITY_SECRET_BYTES, Ip, is_v4

ID_BYTES: Final = 5
SERVICE_BITS: Final = 48
NAMESPACE_BITS: Final = SERVICE_BITS + 8 * ID_BYTES
ALL_BITS: Final = 128
MESH_KEY_MIN: Final = 32

_MULTIPLIERS: Final = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)
_NO_ID: Final = bytes(ID_BYTES)


class Identity(NamedTuple):
    """Ids of a namespace and of an account in it, as map_writer numbers them."""

    namespace: bytes = _NO_ID
    account: bytes = _NO_ID


NOBODY: Final = Identity()
"""A client that is not known."""


def told_address(vip: Ip, client: Identity = NOBODY) -> str:
    """What a waypoint is told of a connection of `client` to a service at `vip`."""
    prefix = HandoffPrefix.IPV4 if is_v4(vip) else HandoffPrefix.IPV6
    packed = prefix.to_bytes(2, "big") + _service(vip) + client.namespace + client.account
    return str(ipaddress.IPv6Address(packed))


def _service(vip: Ip) -> bytes:
    if is_v4(vip):
        return vip[12:]
    words = (int.from_bytes(vip[at : at + 4], "little") for at in range(0, 16, 4))
    hashed = sum(word * by for word, by in zip(words, _MULTIPLIERS, strict=True))
    return (hashed % 2**32).to_bytes(4, "little")


class MeshKey(NamedTuple):
    """What is made of the mesh's key: with what identities are hashed, and a value of `handoff_secrets`."""

    identity: bytes
    handoff: bytes


def read_mesh_key(path: Path) -> MeshKey:
    """From a file of at least 32 bytes; white space around a text does not count. SettingsError."""
    try:
        key = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"mesh_key_file {path}: {error.strerror}") from error
    if key.isascii():
        key = key.strip()
    if len(key) < MESH_KEY_MIN:
        raise SettingsError(f"mesh_key_file {path} has {len(key)} bytes, not the {MESH_KEY_MIN} of a key")
    identity = hashlib.blake2b(key, digest_size=IDENTITY_SECRET_BYTES, person=b"identity").digest()
    handoff = hashlib.blake2b(key, digest_size=16, person=b"handoff").digest()
    return MeshKey(identity, HANDOFF_SECRET.pack(handoff, 1))
