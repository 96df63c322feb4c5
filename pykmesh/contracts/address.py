"""What the data plane reads of an `istio.workload.Address` and of a policy, decoded and checked once.

Only what decides traffic becomes Python objects; everything else (names for telemetry, locality) is
read from the serialized message when somebody asks. A message that cannot be used raises FieldError
with the field's path: the client answers the control plane with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from sys import intern
from typing import Final, NamedTuple, TypeVar, cast

import msgspec
from google.protobuf.message import DecodeError, Message

from pykmesh.kernel.records import Ip, ip_from_wire, network_id
from pykmesh.proto import authorization_pb2, workload_pb2

PORT_MAX: Final = 65535
SELECTION_EXTENSION: Final = "pykmesh.io/selection"
ROOT_NAMESPACE: Final = "istio-system"
"""Policies that are there concern everybody."""
TRUST_DOMAIN: Final = "cluster.local"
"""Of workloads of which it is not said (the workload API's rule)."""
_V6_BITS, _V4_BITS = 128, 32
_T = TypeVar("_T")
_M = TypeVar("_M", bound=Message)
ServicePorts = tuple[str, tuple[tuple[int, int], ...]]


class FieldError(Exception):
    """A resource that cannot be accepted: the field's path, and why."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}" if field else why)


class Remembered(dict[bytes, _T]):
    """What bytes mean that come again and again, decoded once. Forgets everything when it is full."""

    LIMIT: Final = 262_144

    def __init__(self, decode: Callable[[bytes], _T]) -> None:
        super().__init__()
        self._decode = decode

    def __missing__(self, data: bytes) -> _T:
        if len(self) >= self.LIMIT:
            self.clear()
        found = self[data] = self._decode(data)
        return found


class Mode(IntEnum):
    """istio.workload.LoadBalancing.Mode"""

    UNSPECIFIED = 0
    STRICT = 1
    FAILOVER = 2
    PASSTHROUGH = 3


class Families(IntEnum):
    """istio.workload.IPFamilies"""

    AUTOMATIC = 0
    V4 = 1
    V6 = 2
    DUAL = 3


class Range(NamedTuple):
    """Addresses that are a service's together: the first one, and how many of its 128 bits count."""

    network: str
    ip: Ip
    bits: int

    @property
    def own_network(self) -> str:
        """The network in which the maps hold it: no name of a real one has such a character."""
        return f"{self.network}\0{self.bits}"


class Selection(NamedTuple):
    """How endpoints are chosen, beyond what the API says. `affinity_s` 0: each connection anew."""

    affinity_s: int = 0
    least_connections: bool = False


class Waypoint(NamedTuple):
    """What traffic goes by way of: a service, by name or by address. Neither: it is not told."""

    service: str = ""
    network: str = ""
    ip: Ip | None = None
    weight: int = 1
    """Among those of a service: so large a share of its connections."""


class Service(msgspec.Struct, frozen=True, gc=False):
    """A service, as far as it decides traffic. `ports` maps service port to target port, 0 by name.

    One that is hidden is seen by clients of its own namespace alone.
    """

    name: str
    hostname: str
    vips: tuple[tuple[str, Ip], ...]
    ranges: tuple[Range, ...]
    ports: tuple[tuple[int, int], ...]
    families: Families
    mode: Mode
    scopes: tuple[int, ...]
    allows_unhealthy: bool
    waypoints: tuple[Waypoint, ...]
    canonical: bool
    hidden: bool = False
    selection: Selection = Selection()

    @property
    def namespace(self) -> str:
        return self.name.partition("/")[0]

    @property
    def networks(self) -> set[str]:
        """Those in which it has an address."""
        return {network for network, _ in self.vips} | {found.network for found in self.ranges}

    @property
    def places(self) -> tuple[tuple[str, Ip], ...]:
        """Where the maps hold it: its addresses, and its ranges as one address each."""
        if not self.ranges:
            return self.vips
        return self.vips + tuple([(found.own_network, found.ip) for found in self.ranges])


class Workload(msgspec.Struct, frozen=True, gc=False):
    """A workload, as far as it decides traffic. `services` maps service names to port overrides."""

    uid: str
    network: str
    addresses: tuple[Ip, ...]
    services: tuple[ServicePorts, ...]
    healthy: bool
    host_network: bool
    waypoint: Waypoint | None
    """What goes by way of it is what is meant for the workload's own address."""
    prefers_hbone: bool
    capacity: int
    policies: tuple[str, ...]
    namespace: str
    raw: bytes
    hostname: str = ""
    """Whose addresses count, where it has none of its own."""


class Policy(msgspec.Struct, frozen=True, gc=False):
    """Whom an authorization policy concerns: "" everybody, a namespace, or (None) who names it.

    One that is tried (`dry_run`) is only ever logged.
    """

    name: str
    namespace: str | None
    dry_run: bool = False
    is_read: bool = True
    """False: nobody could read it (`unread_policy`)."""


def decode_address(value: bytes) -> Service | Workload:
    """Raises FieldError."""
    try:
        message = workload_pb2.AddressOutline.FromString(value)
    except DecodeError as error:
        raise FieldError("", f"not an Address message: {error}") from error
    kind = message.WhichOneof("type")
    if kind == "workload":
        return _workload(message.workload, value)
    if kind == "service":
        return _service(message.service)
    raise FieldError("type", "neither a workload nor a service")


def differ_in_health_alone(one: bytes, other: bytes) -> bool:
    """Whether two workloads, as messages that were read before, say the same but for their health."""
    first, second = (workload_pb2.AddressOutline.FromString(each) for each in (one, other))
    first.workload.status = second.workload.status
    return first == second


def _workload(message: workload_pb2.WorkloadOutline, raw: bytes) -> Workload:
    """The hot path of a full sync: straight-line on purpose."""
    uid, network = message.uid, message.network
    if not uid:
        raise FieldError("workload.uid", "empty")
    tunnel, status, network_mode = message.tunnel_protocol, message.status, message.network_mode
    if tunnel > 1:
        raise FieldError("workload.tunnel_protocol", f"{tunnel} is not supported")
    if status > 1:
        raise FieldError("workload.status", f"{status} is unknown")
    if network_mode > 1:
        raise FieldError("workload.network_mode", f"{network_mode} is unknown")
    policies = message.authorization_policies
    return Workload(
        uid,
        network_name("workload.network", network) if network else "",
        tuple([_ip("workload.addresses", address) for address in message.addresses]),
        tuple([service_ports[entry] for entry in message.services]),
        status == 0,
        network_mode == 1,
        workload_waypoint(message.waypoint) if message.HasField("waypoint") else None,
        tunnel == 1,
        message.capacity.value if message.HasField("capacity") else 1,
        tuple(policies) if policies else (),
        intern(message.namespace),
        raw,
        message.hostname if not message.addresses else "",
    )


def _service_ports(data: bytes) -> ServicePorts:
    try:
        message = workload_pb2.ServicePorts.FromString(data)
    except DecodeError as error:
        raise FieldError("workload.services", f"not an entry: {error}") from error
    return intern(message.service), _ports("workload.services", message.ports.ports)


service_ports: Final = Remembered(_service_ports)
"""What a workload says of a service: all pods of a service say the same. Raises FieldError."""


def _service(message: workload_pb2.ServiceOutline) -> Service:
    namespace, hostname, families = message.namespace, message.hostname, message.ip_families
    if not namespace or not hostname:
        raise FieldError("service.namespace" if not namespace else "service.hostname", "empty")
    if families > Families.DUAL:
        raise FieldError("service.ip_families", f"{families} is not a valid Families")
    mode, scopes, allows_unhealthy = load_balancing[message.load_balancing]
    vips = tuple(map(_vip, message.addresses))
    ranges: tuple[Range, ...] = ()
    if Range in map(type, vips):
        ranges = tuple([vip for vip in vips if isinstance(vip, Range)])
        vips = tuple([vip for vip in vips if not isinstance(vip, Range)])
    return Service(
        f"{namespace}/{hostname}",
        hostname,
        cast("tuple[tuple[str, Ip], ...]", vips),
        ranges,
        tuple(dict(map(service_port.__getitem__, message.ports)).items()),
        FAMILIES[families],
        mode,
        scopes,
        allows_unhealthy,
        _waypoints(message) if message.HasField("waypoint") or message.weighted_waypoints else (),
        message.canonical,
        _is_hidden(message.visibility),
        _selection(message.extensions) if message.extensions else _ANY,
    )


def _waypoints(message: workload_pb2.ServiceOutline) -> tuple[Waypoint, ...]:
    """Those with a weight, by it; else the one that is said besides (xds.md 1.2)."""
    where = "service.weighted_waypoints"
    parsed = (_parsed(where, workload_pb2.WeightedWaypoint, data) for data in message.weighted_waypoints)
    weighted = [each for each in parsed if each.weight]
    found = [_waypoint(f"{where}.destination", each.destination, each.weight) for each in weighted]
    if found or not message.HasField("waypoint"):
        return tuple(found) or (Waypoint(),)
    return (_waypoint_of("service.waypoint", message.waypoint),)


def workload_waypoint(data: bytes) -> Waypoint:
    """What a workload says of it. Raises FieldError."""
    return _waypoint_of("workload.waypoint", data)


def _waypoint_of(where: str, data: bytes) -> Waypoint:
    return _waypoint(where, _parsed(where, workload_pb2.GatewayAddress, data))


def _parsed(where: str, kind: type[_M], data: bytes) -> _M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise FieldError(where, f"not a {kind.DESCRIPTOR.name} message: {error}") from error


def _waypoint(where: str, found: workload_pb2.GatewayAddress, weight: int = 1) -> Waypoint:
    if found.HasField("hostname"):
        return Waypoint(service=f"{found.hostname.namespace}/{found.hostname.hostname}", weight=weight)
    if found.HasField("address"):
        network = network_name(f"{where}.address.network", found.address.network)
        return Waypoint(network=network, ip=_ip(f"{where}.address", found.address.address), weight=weight)
    return Waypoint(weight=weight)


def _is_hidden(visibility: int) -> bool:
    if visibility > 1:
        raise FieldError("service.visibility", f"{visibility} is unknown")
    return bool(visibility)


def _selection(extensions: Iterable[bytes]) -> Selection:
    """Of the extensions one is ours; the others are not for us to judge."""
    for data in extensions:
        try:
            found = workload_pb2.Extension.FromString(data)
            if found.name == SELECTION_EXTENSION:
                said = workload_pb2.Selection.FromString(found.config.value)
                return Selection(said.affinity_seconds, said.least_connections)
        except DecodeError as error:
            raise FieldError("service.extensions", f"not an Extension message: {error}") from error
    return _ANY


def _decode_load_balancing(data: bytes) -> tuple[Mode, tuple[int, ...], bool]:
    try:
        message = workload_pb2.LoadBalancing.FromString(data)
    except DecodeError as error:
        raise FieldError("service.load_balancing", f"not a LoadBalancing message: {error}") from error
    try:
        mode = Mode(message.mode)
    except ValueError as error:
        raise FieldError("service.load_balancing.mode", str(error)) from error
    if message.health_policy not in (0, 1):
        raise FieldError("service.load_balancing.health_policy", f"{message.health_policy} is unknown")
    for scope in message.routing_preference:
        if scope not in _SCOPES:
            raise FieldError("service.load_balancing.routing_preference", f"scope {scope} is unknown")
    return mode, tuple(message.routing_preference), message.health_policy == 1


def _decode_port(data: bytes) -> tuple[int, int]:
    try:
        message = workload_pb2.Port.FromString(data)
    except DecodeError as error:
        raise FieldError("service.ports", f"not a Port message: {error}") from error
    return _pair("service.ports", message)


_ANY: Final = Selection()
FAMILIES: Final = tuple(Families)
_SCOPES: Final = range(1, 7)
"""istio.workload.LoadBalancing.Scope, without the unspecified one: it cannot be compared."""
load_balancing: Final = Remembered(_decode_load_balancing)
service_port: Final = Remembered(_decode_port)


def _vip(message: workload_pb2.NetworkAddress) -> tuple[str, Ip] | Range:
    ip = _ip("service.addresses", message.address)
    network = network_name("service.addresses.network", message.network)
    if not message.HasField("length"):
        return network, ip
    bits = _V4_BITS if len(message.address) == _V4_BITS // 8 else _V6_BITS
    if message.length > bits:
        raise FieldError("service.addresses.length", f"{message.length} of {bits} bits")
    if message.length == bits:
        return network, ip
    counted = _V6_BITS - bits + message.length
    first = int.from_bytes(ip, "big") >> (_V6_BITS - counted) << (_V6_BITS - counted)
    found = Range(network, Ip(first.to_bytes(_V6_BITS // 8, "big")), counted)
    _known("service.addresses", found.own_network)
    return found


def network_name(field: str, name: str) -> str:
    """Of a name that the control plane says. Raises FieldError when it cannot be one, or its id is taken."""
    if "\0" in name:  # the maps' own networks have it in theirs
        raise FieldError(field, f"{name!r} is no network's name")
    return _known(field, name)


def _known(field: str, name: str) -> str:
    try:
        network_id(name)
    except ValueError as error:
        raise FieldError(field, str(error)) from error
    return intern(name)


def _ip(field: str, address: bytes) -> Ip:
    try:
        return ip_from_wire(address)
    except ValueError as error:
        raise FieldError(field, str(error)) from error


def _ports(field: str, ports: Iterable[workload_pb2.Port]) -> tuple[tuple[int, int], ...]:
    """Pairs of service and target port; of a service port that comes twice (TCP and UDP) the last."""
    return tuple(dict(_pair(field, port) for port in ports).items())


def _pair(field: str, port: workload_pb2.Port) -> tuple[int, int]:
    if not 0 < port.service_port <= PORT_MAX:
        raise FieldError(f"{field}.service_port", f"{port.service_port} is no port")
    if port.target_port > PORT_MAX:
        raise FieldError(f"{field}.target_port", f"{port.target_port} is no port")
    return port.service_port, port.target_port


def workload_message(raw: bytes) -> workload_pb2.Workload:
    """All that the control plane said of a workload; nothing where that cannot be read.

    What decides traffic was checked when it came; the rest is only read here.
    """
    try:
        return workload_pb2.Address.FromString(raw).workload
    except DecodeError:
        return workload_pb2.Workload()


def unread_policy(name: str) -> Policy:
    """For what is said wrongly and never was otherwise: it may concern all of its namespace, or everybody."""
    namespace = name.partition("/")[0]
    return Policy(name, "" if namespace == ROOT_NAMESPACE else namespace, is_read=False)


def decode_policy(name: str, value: bytes) -> Policy:
    """Raises FieldError; an action or scope that is not known is refused, never guessed."""
    try:
        message = authorization_pb2.Authorization.FromString(value)
    except DecodeError as error:
        raise FieldError("", f"not an Authorization message: {error}") from error
    if message.action not in (0, 1):
        raise FieldError("action", f"{message.action} is unknown")
    if message.scope == authorization_pb2.GLOBAL:
        return Policy(name, "", message.dry_run)
    if message.scope == authorization_pb2.NAMESPACE:
        return Policy(name, message.namespace, message.dry_run)
    if message.scope == authorization_pb2.WORKLOAD_SELECTOR:
        return Policy(name, None, message.dry_run)
    raise FieldError("scope", f"{message.scope} is unknown")
