"""Every subject of the bus, its owner and its messages.

Encoding: MessagePack arrays in field order, so a field may be added at the end and never moved. A
message opens with the version of its contract; a reader refuses one that it does not know.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Final, TypeVar

import msgspec

from pykmesh.contracts.requests import RequestSums
from pykmesh.contracts.waypoints import WaypointsReply, WaypointsRequest

VERSION: Final = 1
REFUSED_NAMED: Final = 20_000
"""Names in a report, a request or a reply: about 3 MB at most."""
BATCH_BYTES: Final = 256 * 1024
"""About how much a batch or a snapshot page carries: large ones move ten times the bytes a second."""


class Subject(StrEnum):
    """Owner (the only publisher, or the one that answers) in the comment."""

    CONFIG_LOG = "pykmesh.v1.config.log"  # xds_client publishes ConfigBatch
    CONFIG_SNAPSHOT = "pykmesh.v1.config.snapshot"  # xds_client answers SnapshotRequest with SnapshotPage
    MAP_REPORT = "pykmesh.v1.map.report"  # map_writer publishes MapReport
    MAP_REFUSED = "pykmesh.v1.map.refused"  # map_writer answers RefusedRequest with RefusedReply
    MAP_RESOLVE = "pykmesh.v1.map.resolve"  # map_writer answers ResolveRequest with ResolveReply
    MAP_NAMES = "pykmesh.v1.map.names"  # map_writer publishes NamesChanged
    DNS_RESOLVE = "pykmesh.v1.dns.resolve"  # map_writer answers DnsRequest with DnsReply
    WAYPOINTS = "pykmesh.v1.map.waypoints"  # map_writer answers WaypointsRequest with WaypointsReply
    REQUESTS = "pykmesh.v1.waypoint.requests"  # waypoint_mgr publishes RequestSums


class ResourceType(IntEnum):
    ADDRESS = 0
    AUTHORIZATION = 1


TYPE_URLS: Final = {
    ResourceType.ADDRESS: "type.googleapis.com/istio.workload.Address",
    ResourceType.AUTHORIZATION: "type.googleapis.com/istio.security.Authorization",
}


class _Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    pass


class Resource(_Message, frozen=True):
    """`value` is the serialized message as the control plane sent it."""

    name: str
    value: bytes


NO_NAME: Final = "(no name)"
"""Among the names of what was rejected: something without one."""


class ConfigBatch(_Message, frozen=True):
    """Changes in order: removals first, then upserts. `seq` counts up by one within an `epoch`.

    Each second the last `seq` is repeated without changes, so that a reader notices the loss of the
    last batch.
    """

    version: int
    epoch: str
    seq: int
    type: ResourceType
    removed: list[str]
    upserts: list[Resource]
    complete: bool
    """The last batch of what the control plane sent in one response: a reader acts now, not before."""
    synced: bool
    """With this batch the control plane's first full state since the epoch began is complete."""
    rejected: list[str] = []
    """Names of the response that were not accepted: who has older copies of them keeps these."""

    @property
    def is_heartbeat(self) -> bool:
        return not (self.removed or self.upserts or self.rejected or self.complete)


class SnapshotRequest(_Message, frozen=True):
    """`cursor` is empty for the first page, then what the last page named."""

    version: int
    cursor: str


class SnapshotPage(_Message, frozen=True):
    """The state at `seq`: batches after it are applied on top, in order.

    One that is not `synced` is not whole: the first complete batch that is makes it so.
    """

    version: int
    epoch: str
    seq: int
    synced: bool
    type: ResourceType
    resources: list[Resource]
    next_cursor: str
    """Empty on the last page."""
    rejected: list[str] = []
    """Names of the type that were not accepted when the control plane said them last."""


class MapReport(_Message, frozen=True):
    """How far map_writer follows; sent at each step and each second.

    `refused` names the resources that do not fit, with the limit that was met: the first `REFUSED_NAMED` of
    `refused_count`. Of others RefusedRequest tells.
    """

    version: int
    epoch: str
    received_seq: int
    applied_seq: int
    refused: dict[str, str]
    refused_count: int = 0


class RefusedRequest(_Message, frozen=True):
    """Names of resources, `REFUSED_NAMED` at most."""

    version: int
    names: list[str]


class RefusedReply(_Message, frozen=True):
    """Those of them that do not fit, with the limit that was met."""

    version: int
    refused: dict[str, str]


class ResolveRequest(_Message, frozen=True):
    """Ids of service ports, and (network, sixteen address bytes) of workloads and services."""

    version: int
    services: list[int]
    addresses: list[tuple[str, bytes]]


class ServiceName(_Message, frozen=True):
    """`port` is the service's own."""

    name: str
    namespace: str
    hostname: str
    port: int


def service_name(service: str, port: int) -> ServiceName:
    """Of a service that the control plane calls `namespace/hostname`."""
    namespace, _, hostname = service.partition("/")
    return ServiceName(hostname.split(".", 1)[0], namespace, hostname, port)


class WorkloadName(_Message, frozen=True):
    """What Istio's metrics say of a workload; "" where the control plane says nothing.

    `service` (`namespace/hostname`) is the first by name of those that it belongs to. A service's own
    address has a `service` alone: all else is "".
    """

    uid: str
    name: str
    namespace: str
    workload: str
    service_account: str
    trust_domain: str
    canonical_name: str
    canonical_revision: str
    cluster: str
    region: str
    zone: str
    service: str = ""

    @property
    def is_service(self) -> bool:
        """Not a workload's address but a service's own."""
        return not self.uid


class ResolveReply(_Message, frozen=True):
    """In the order of the request; None for what is not known."""

    version: int
    services: list[ServiceName | None]
    addresses: list[WorkloadName | None]


class DnsRequest(_Message, frozen=True):
    """Who asks which server what. `client`: the pod's addresses, sixteen bytes each, as is `server`.

    `name` is in lower case and without its last dot; "" asks for nothing but the way to the server.
    """

    version: int
    network: str
    client: list[bytes]
    server: bytes
    name: str
    is_6: bool
    """For IPv6 addresses (AAAA), not IPv4 (A)."""


class NamesChanged(_Message, frozen=True):
    """Addresses that were asked for (`ResolveRequest`) and are somebody else's now; None: nobody's."""

    version: int
    addresses: list[tuple[str, bytes]]
    names: list[WorkloadName | None]


class DnsOutcome(IntEnum):
    NOT_READY = 0  # the mesh is not whole yet
    FORWARD = 1  # the server that was asked knows
    ANSWER = 2  # the name is the mesh's, also where it has no address
    UNKNOWN_CLIENT = 3  # no workload has the client's addresses


class DnsReply(_Message, frozen=True):
    """`alias`: the name at which the addresses stand, where it is not the one that was asked."""

    version: int
    outcome: DnsOutcome
    alias: str = ""
    addresses: list[bytes] = []
    upstreams: list[tuple[bytes, int]] | None = None
    """Where (address, port) the server is asked, none where it is refused; None: at its own address."""


Message = (
    ConfigBatch
    | SnapshotRequest
    | SnapshotPage
    | MapReport
    | RefusedRequest
    | RefusedReply
    | ResolveRequest
    | ResolveReply
    | NamesChanged
    | DnsRequest
    | DnsReply
    | WaypointsRequest
    | WaypointsReply
    | RequestSums
)
_M = TypeVar("_M", bound=Message)


class ContractError(Exception):
    """Bytes on the bus that are no message of this contract; the text says which subject and why."""


_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(kind: type[_M], data: bytes) -> _M:
    """Raises ContractError for anything but a message of this kind and version."""
    if len(data) < 2 or data[1] != VERSION:
        raise ContractError(f"{kind.__name__}: not version {VERSION} of the contract: {data[:16]!r}")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ContractError(f"{kind.__name__}: {error}") from error
