"""What waypoint_mgr asks map_writer about the mesh: who goes by way of a waypoint, and where endpoints are.

A service is named `namespace/hostname`, as in the workload API.
"""

from __future__ import annotations

import msgspec

VERSION = 1


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """Where a connection may go. Of endpoints with weight 0 all weigh the same."""

    address: str
    port: int
    weight: int = 0


class ServicePort(msgspec.Struct, frozen=True):
    port: int
    endpoints: list[Endpoint] = []


class MeshService(msgspec.Struct, frozen=True):
    """`vips` are the addresses in the node's network at which clients ask for it."""

    name: str
    vips: list[str] = []
    ports: list[ServicePort] = []


class WaypointsRequest(msgspec.Struct, frozen=True):
    """`waypoints`: the waypoints' own services. `backends`: services whose endpoints are wanted too."""

    version: int
    waypoints: list[str]
    backends: list[str]


class WaypointsReply(msgspec.Struct, frozen=True):
    """`users`: of each waypoint, the services whose traffic goes by way of it. Services that are unknown miss.

    `seq` is the last batch of `epoch` that the answer knows of.
    """

    version: int
    epoch: str
    seq: int
    users: dict[str, list[str]] = {}
    services: list[MeshService] = []
