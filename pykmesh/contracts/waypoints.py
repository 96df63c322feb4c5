"""What waypoint_mgr asks map_writer about the mesh: who goes by way of a waypoint, and where endpoints are.

A service is named `namespace/hostname`, as in the workload API. Messages of the bus as those in `messages`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

import msgspec

from pykmesh.contracts.handoff import ID_BYTES, NO_SERVICE_SECRET

HANDOFF_PORT: Final = 15019
"""The port of a waypoint's service at which its instances take connections that the kernel hands over.

Istio's own waypoints have none: they take HBONE at 15008. The port that a GatewayAddress says is always that.
"""


_SLICE: Final = "discovery.k8s.io/EndpointSlice"


def slice_name(front: str, node: str) -> str:
    """Of the EndpointSlice that says where a waypoint's connections come in on a node. `front` has no dot."""
    return f"{front}.{node}"


def node_of_front(uid: str) -> str:
    """Of the workload that control planes make of it; "" where that does not say.

    Without a mesh key connections are handed over within a node alone.
    """
    cluster_and_kind, _, rest = uid.partition(f"/{_SLICE}/")
    name = rest.split("/")[1] if cluster_and_kind and rest.count("/") == 2 else ""
    return name.partition(".")[2]


def is_workload(name: str) -> bool:
    """Whether it is a workload's uid; services are called `namespace/hostname`."""
    return name.count("/") > 1


def namespace_of(name: str) -> str:
    """Of a service, or of a workload: cluster/group/kind/namespace/name. "" of a uid that is none such."""
    parts = name.split("/")
    return (parts[3] if len(parts) > 3 else "") if is_workload(name) else parts[0]


def account_name(namespace: str, account: str) -> str:
    """A service account among all, in whatever trust domain."""
    return f"{namespace}/{account or 'default'}"


class _Part(msgspec.Struct, array_like=True, frozen=True):
    pass


class Endpoint(_Part, frozen=True):
    """Where a connection may go. Of endpoints with weight 0 all weigh the same.

    `revision`: the workload's canonical revision, where it was asked for. `others`: its addresses of the
    other family, for when it does not answer at this one.
    """

    address: str
    port: int
    weight: int = 0
    revision: str = ""
    others: list[str] = []


class ServicePort(_Part, frozen=True):
    """`serves`: of a workload's port, the service, and its port, that it is an endpoint of."""

    port: int
    endpoints: list[Endpoint] = []
    serves: tuple[str, int] | None = None


class MeshService(_Part, frozen=True):
    """A service, or a workload that goes by way of a waypoint: its own addresses, and ports of services.

    `vips` are the addresses in the node's network at which clients ask for it.

    `owned`: those of which it has them all to itself, or before the others that name them.
    """

    name: str
    vips: list[str] = []
    ports: list[ServicePort] = []
    owned: list[str] = []


_LISTED: Final = ("backends", "client_namespaces", "client_accounts")


class WaypointsRequest(_Part, frozen=True):
    """`waypoints`: the waypoints' own services.

    What is wanted besides those that go by way of them: services by name, all those of namespaces, and the
    ids of clients' namespaces and accounts.
    """

    version: int
    waypoints: list[str]
    backends: list[str]
    namespaces: list[str]
    client_namespaces: list[str] = []
    client_accounts: list[str] = []
    revisions: list[str] = []
    """Of the backends those of whose endpoints the revisions are wanted."""
    workload_namespaces: list[str] = []
    """Namespaces of which all workloads are wanted."""
    with_principals: bool = False

    def pages(self, size: int) -> Iterator[WaypointsRequest]:
        """Which together ask for the same, with about so many bytes of names each at the most.

        What namespaces and waypoints bring is in the answer of the first.
        """
        rest = self
        page: dict[str, list[str]] = {kind: [] for kind in _LISTED}
        left = size
        for kind, name in ((each, name) for each in _LISTED for name in getattr(self, each)):
            if left <= 0:
                yield self._page(rest, page)
                rest = WaypointsRequest(self.version, [], [], [])
                page, left = {kind: [] for kind in _LISTED}, size
            page[kind].append(name)
            left -= len(name.encode())
        yield self._page(rest, page)

    def _page(self, rest: WaypointsRequest, page: dict[str, list[str]]) -> WaypointsRequest:
        backends = {*page["backends"]}
        revisions = [name for name in self.revisions if name in backends]
        return msgspec.structs.replace(rest, **page, revisions=revisions)


ClientId = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]


PrincipalId = Annotated[bytes, msgspec.Meta(min_length=2 * ID_BYTES, max_length=2 * ID_BYTES)]
"""Ids of namespace and account, one after the other."""


ServiceSecret = Annotated[
    bytes, msgspec.Meta(min_length=len(NO_SERVICE_SECRET), max_length=len(NO_SERVICE_SECRET))
]


class WaypointsReply(_Part, frozen=True):
    """`users`: of each waypoint, the services and workloads that go by way of it. Unknown services miss.

    Ids are those of `contracts.handoff`, of each name that was asked for. Before the mesh is whole nothing is
    said: `is_synced` is false.
    """

    version: int
    is_synced: bool
    users: dict[str, list[str]] = {}
    services: list[MeshService] = []
    namespace_ids: dict[str, ClientId] = {}
    account_ids: dict[str, ClientId] = {}
    principals: dict[str, PrincipalId] = {}
    """By their SPIFFE names without the scheme. An account that is in several trust domains has none."""
    service_secret: ServiceSecret = NO_SERVICE_SECRET
    """What IPv6 services' addresses are hashed with (`contracts.handoff`)."""

    def with_page(self, other: WaypointsReply) -> WaypointsReply:
        """And what is in the answer to another page."""
        return msgspec.structs.replace(
            self,
            is_synced=self.is_synced and other.is_synced,
            services=[*{each.name: each for each in (*self.services, *other.services)}.values()],
            namespace_ids={**self.namespace_ids, **other.namespace_ids},
            account_ids={**self.account_ids, **other.account_ids},
        )
