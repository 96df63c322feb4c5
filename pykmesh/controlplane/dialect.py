"""What differs between the releases of istiod that the translation can speak like.

The translation asks a field here instead of comparing versions. A mistake that a release made and a later
one mended (a load-balancing preset that leaks from one service to another, a network that leaks from one
endpoint to the next) is not imitated.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from pykmesh.proto.workload_pb2 import LoadBalancing

_REGIONAL = (LoadBalancing.NETWORK, LoadBalancing.REGION, LoadBalancing.ZONE)
_ZONAL = (*_REGIONAL, LoadBalancing.SUBZONE)

Scopes = tuple[LoadBalancing.Scope.ValueType, ...]


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """One release; `Dialect.V1_25` and `Dialect.V1_31` are held against recordings of that release."""

    release: str
    says_versions: bool
    """Resources carry a version, so that a client that comes back gets only what has changed."""
    says_app_protocol: bool
    says_canonical: bool
    says_capacity: bool
    says_ranges: bool
    """A range of addresses is sent with its length; else its service is left out as a whole."""
    passes_unresolved_through: bool
    """Resolution NONE is said to be load balancing by passing through; else nothing is said."""
    prefers_close: Scopes
    """The order of preference for `trafficDistribution: PreferClose`."""
    prefers_same_node: Scopes
    """The same for PreferSameNode; empty if the release does not know it."""
    inherits_traffic_distribution: bool
    """Services take the annotation of their namespace."""
    types_by_owner: bool
    """A workload's type is that of its owner; else each is a pod, and every owner gives its name."""
    entry_ports_serve_services: bool
    """The ports of a WorkloadEntry hold for the Services that select it too, not only for ServiceEntries."""

    V1_25: ClassVar[Dialect]
    V1_31: ClassVar[Dialect]

    @classmethod
    def named(cls, release: str) -> Dialect:
        """The dialect of a release given as "1.25" or "1.31". Raises `ValueError`."""
        known = {dialect.release: dialect for dialect in (cls.V1_25, cls.V1_31)}
        if release not in known:
            raise ValueError(f"unknown release {release!r}: known are {', '.join(known)}")
        return known[release]


Dialect.V1_25 = Dialect(
    release="1.25",
    says_versions=False,
    says_app_protocol=False,
    says_canonical=False,
    says_capacity=False,
    says_ranges=False,
    passes_unresolved_through=False,
    prefers_close=_ZONAL,
    prefers_same_node=(),
    inherits_traffic_distribution=False,
    types_by_owner=True,
    entry_ports_serve_services=False,
)
Dialect.V1_31 = Dialect(
    release="1.31",
    says_versions=True,
    says_app_protocol=True,
    says_canonical=True,
    says_capacity=True,
    says_ranges=True,
    passes_unresolved_through=True,
    prefers_close=_REGIONAL,
    prefers_same_node=(*_ZONAL, LoadBalancing.NODE),
    inherits_traffic_distribution=True,
    types_by_owner=False,
    entry_ports_serve_services=True,
)
