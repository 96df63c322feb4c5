"""Short names of what resources say, for comparing what two processes hold of them."""

from __future__ import annotations

import hashlib

import msgspec

from pykmesh.contracts.address import Policy, Service, Workload

BYTES = 8


def digest(resource: Service | Workload | Policy | bytes) -> str:
    """Sixteen hex digits: of a workload's whole message, of what is understood of everything else."""
    if isinstance(resource, Workload):
        resource = resource.raw
    data = resource if isinstance(resource, bytes) else msgspec.msgpack.encode(resource)
    return hashlib.blake2b(data, digest_size=BYTES).hexdigest()
