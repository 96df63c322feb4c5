"""The address that a waypoint is told of a connection: which service it is for, and who asks.

An IPv6 address, also for an IPv4 service, so that there is room for the client's identity and a stock Envoy
can tell by it (bpf/waypoint.h makes it): 16 bits of the family, 32 of the service's address, 40 of the
client's namespace, 40 of its account. An IPv6 service's address is hashed, with a secret: nobody can choose
one with the hash of another. Two that a waypoint cannot tell apart all the same are a conflict that its
status names.

And the mesh's key, of which all nodes make the same ids, and what is told between nodes is sealed with.
"""

from __future__ import annotations

import hashlib
import ipaddress
import struct
from pathlib import Path
from typing import Final, NamedTuple

from pykmesh.contracts.settings import SettingsError
from pykmesh.kernel.layout import HandoffPrefix
from pykmesh.kernel.records import HANDOFF_SECRET, IDENTITY_SECRET_BYTES, SERVICE_SECRET, Ip, is_v4

ID_BYTES: Final = 5
SERVICE_BITS: Final = 48
NAMESPACE_BITS: Final = SERVICE_BITS + 8 * ID_BYTES
ALL_BITS: Final = 128
MESH_KEY_MIN: Final = 32

NO_SERVICE_SECRET: Final = bytes(SERVICE_SECRET.size)
_WORDS: Final = struct.Struct("<5Q")
_ADDRESS_WORDS: Final = struct.Struct("<4I")
_NO_ID: Final = bytes(ID_BYTES)


class Identity(NamedTuple):
    """Ids of a namespace and of an account in it, as map_writer numbers them."""

    namespace: bytes = _NO_ID
    account: bytes = _NO_ID


NOBODY: Final = Identity()
"""A client that is not known."""


def told_address(vip: Ip, secret: bytes, client: Identity = NOBODY) -> str:
    """What a waypoint is told of a connection of `client` to a service at `vip`, by a `service_secret`."""
    prefix = HandoffPrefix.IPV4 if is_v4(vip) else HandoffPrefix.IPV6
    packed = prefix.to_bytes(2, "big") + _service(vip, secret) + client.namespace + client.account
    return str(ipaddress.IPv6Address(packed))


def _service(vip: Ip, secret: bytes) -> bytes:
    if is_v4(vip):
        return vip[12:]
    first, *multipliers = _WORDS.unpack(secret)
    hashed = int(first) + sum(
        by * word for by, word in zip(multipliers, _ADDRESS_WORDS.unpack(vip), strict=True)
    )
    return int(hashed % 2**64 >> 32).to_bytes(4, "little")


def service_secret(identity_secret: bytes) -> bytes:
    """What IPv6 services' addresses are hashed with: as lasting, and as known elsewhere, as the other."""
    hashed = hashlib.blake2b(key=identity_secret, digest_size=len(NO_SERVICE_SECRET), person=b"service")
    return hashed.digest()


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
