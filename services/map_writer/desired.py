"""What the maps should say of a service or an address. Pure: from the mesh to keys and values.

A service port has one list of endpoints for each address family (`PortId`); the entries of `services`
name the list and how long it is. An IPv6 address of a service whose endpoints have IPv4 only names
the IPv4 list: the connection then goes to a v4-mapped address.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from math import lcm
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace

from pykmesh.contracts.address import (
    Families,
    Mode,
    Selection,
    Service,
    ServicePorts,
    Waypoint,
    Workload,
    workload_message,
)
from pykmesh.contracts.bulk import Group
from pykmesh.contracts.waypoints import HANDOFF_PORT, Endpoint, node_of_front
from pykmesh.kernel.layout import AddressKind, Reason, ServiceFlag, offset
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ADDRESS_VALUE,
    ENDPOINT_ADDRESS,
    ENDPOINT_VALUE,
    IP_BYTES,
    NO_IP,
    SERVICE_KEY,
    Ip,
    ip_to_text,
    is_v4,
    network_id,
    port_bytes,
    port_number,
    stable_id,
    view_network,
)
from services.map_writer.locality import best_of, is_ranked, near, nearness
from services.map_writer.mesh import Mesh, Place, is_plain_member, place_of, places_of
from services.map_writer.slots import split

NO_FLAG: Final = ServiceFlag(0)
_BY_WAYPOINT: Final = 1


class PortId(msgspec.Struct, frozen=True, gc=False):
    """Names a list of endpoints; its id in the maps is a hash of this, whose lowest bit is `by_waypoint`.

    A list has instances of a waypoint or endpoints, never both in turn: programs take what is in it for
    what `services` says, and the two are not written at once.
    """

    service: str
    port: int
    family: int
    by_waypoint: bool = False

    @property
    def id(self) -> int:
        hashed = stable_id(f"{self.service}|{self.port}|{self.family}")
        return (hashed & ~_BY_WAYPOINT or 2) | self.by_waypoint


def other_way(list_id: int) -> int:
    """The id of the list of the same port by way of a waypoint, or of that without one."""
    return list_id ^ _BY_WAYPOINT


class Frontend(msgspec.Struct, frozen=True, gc=False):
    """An entry of `services`, but for the number of endpoints, which the list decides."""

    list_id: int
    verdict: Reason
    flags: ServiceFlag = NO_FLAG
    affinity_s: int = 0
    waits: bool = False
    """It changes when what some namespaces see there instead is written."""


class DesiredService(msgspec.Struct, frozen=True, gc=False):
    """`lists` maps list ids to endpoint values (each with the workload it comes from).

    `weights` has all values of the lists whose endpoints differ in weight, and none of others.
    """

    frontends: dict[bytes, Frontend]
    lists: dict[int, Mapping[bytes, str]]
    ports: dict[int, PortId]
    weights: dict[bytes, int]
    ranks: dict[int, int] = {}
    """Of a service that prefers near endpoints, by list: how near those are that were taken for it."""


NOTHING = DesiredService({}, {}, {}, {})


class Packed(Mapping[bytes, str]):
    """Endpoints and the workloads that they come from, which are looked at one by one when somebody does."""

    __slots__ = ("_each", "packed", "uids")

    def __init__(self, packed: bytes, uids: list[str]) -> None:
        """`packed`: the values back to back, each once."""
        self.packed = packed
        self.uids = uids
        self._each: dict[bytes, str] | None = None

    def __getitem__(self, value: bytes) -> str:
        if self._each is None:
            self._each = dict(zip(split(self.packed), self.uids, strict=True))
        return self._each[value]

    def __iter__(self) -> Iterator[bytes]:
        return iter(split(self.packed))

    def __len__(self) -> int:
        return len(self.uids)


Lists = tuple[Mapping[bytes, str], Mapping[bytes, str]]
"""Endpoint values of IPv4 and of IPv6, each with the workload that it comes from."""
EndpointsOf = Callable[[int, int, int, int], Lists]
"""From a port, its target port and the ids of its two lists."""


WEIGHTS_MAX: Final = 1 << 31
"""Of all endpoints of a port together: Envoy takes up to 2^32 - 1, and none is less than 1."""
ANY_PORT: Final = 0
"""Of a workload that goes by way of a waypoint: there is no such port."""
_NO_PORT = port_bytes(0)
_NOBODY: Final[Mapping[bytes, str]] = {}


class Rules(NamedTuple):
    """Settings that decide what is desired."""

    network: str = ""
    refuse_unenforced_policy: bool = False
    selections: Mapping[str, Selection] = {}
    """By service: before what the control plane says."""
    has_mesh_key: bool = False
    """Connections can be handed over to waypoints of other nodes."""


def desired_service(mesh: Mesh, name: str, rules: Rules) -> DesiredService:
    """The entries that belong to one service; none when it is gone, or has no address of its own.

    Or to a workload that goes by way of a waypoint: whatever port is asked for, they are those of port 0.
    """
    service = mesh.services.get(name)
    if service is None:
        return _desired_workload(mesh, name, rules)
    vips = list(_vips(mesh, service, rules))
    if not vips:
        return NOTHING
    found = DesiredService({}, {}, {}, {})
    if service.waypoints:
        _add_ports_by_waypoint(found, mesh, service, vips, rules)
        return found
    verdict = Reason.PASSTHROUGH if service.mode is Mode.PASSTHROUGH else Reason.ROUTED
    endpoints: EndpointsOf = _nothing
    if verdict is Reason.ROUTED:
        endpoints = _endpoints(mesh, service, rules, found.weights, found.ranks)
    if verdict is Reason.ROUTED and endpoints is _nothing:
        verdict = _verdict_without_endpoints(mesh, service, rules)
    for port, target in service.ports:
        _add_port(found, service.name, port, target, vips, verdict, endpoints, service.families)
    return found


def _desired_workload(mesh: Mesh, name: str, rules: Rules) -> DesiredService:
    if name not in mesh.by_waypoint:
        return NOTHING
    workload = mesh.workload(name)
    vips = [
        Vip(workload.network, ip, ServiceFlag.WAYPOINT, affinity_s=0, waits=False)
        for ip in (() if workload.host_network else workload.addresses)
        if mesh.pod_at(place_of(workload.network, ip)) is workload
    ]
    if not vips or workload.waypoint is None:
        return NOTHING
    found = DesiredService({}, {}, {}, {})
    verdict, endpoints = _by_waypoint(mesh, (workload.waypoint,), rules, found.weights)
    _add_port(found, name, ANY_PORT, 0, vips, verdict, endpoints, by_waypoint=True)
    return found


def member_changes(
    mesh: Mesh,
    service: Service,
    changed: Mapping[str, Workload | None],
    rules: Rules,
    ranks: Mapping[int, int],
) -> dict[int, tuple[set[bytes], list[bytes]]] | None:
    """Of a service of which only members have changed: by list the endpoint values that go, and that come.

    `changed`: by their names what they were. `ranks`: as `DesiredService` has them. None where that cannot be
    told without a look at all members: where some are not plain (`is_plain_member`), one is nearer than those
    that were taken until now, or what decides is more than which there are.
    """
    now = {uid: mesh.workload(uid) if uid in mesh.workloads else None for uid in changed}
    known = [each for each in (*changed.values(), *now.values()) if each is not None]
    if (
        not mesh.has_plain_members(service.name)
        or not all(map(is_plain_member, known))
        or not all(mesh.is_nobody_elses(place, changed) for each in known for place in places_of(each))
        or service.waypoints
        or service.mode is Mode.PASSTHROUGH
        or rules.refuse_unenforced_policy
    ):
        return None
    nearest = ranks if is_ranked(service) else None
    has_6 = not all(is_v4(ip) for _, ip in service.places)
    found: dict[int, tuple[set[bytes], list[bytes]]] = {}
    for port, target in service.ports:
        ids = PortId(service.name, port, 4).id, PortId(service.name, port, 6).id if has_6 else 0
        before = _values(mesh, service, changed.values(), rules, port, target, ids, nearest)
        after = _values(mesh, service, now.values(), rules, port, target, ids, nearest)
        if before is None or after is None:
            return None
        for list_id in before.keys() | after.keys():
            was, is_ = before.get(list_id, {}), after.get(list_id, {})
            gone, come = was.keys() - is_.keys(), [value for value in is_ if value not in was]
            if gone or come:
                found[list_id] = gone, come
    return found


def _values(
    mesh: Mesh,
    service: Service,
    workloads: Iterable[Workload | None],
    rules: Rules,
    port: int,
    target: int,
    ids: tuple[int, int],
    nearest: Mapping[int, int] | None,
) -> dict[int, dict[bytes, None]] | None:
    """The endpoint values of plain members, by list; None where one is nearer than is known of the list.

    `ids`: of the two families; 0: there is none of IPv6. `nearest` None: it does not matter where they are.
    """
    found: dict[int, dict[bytes, None]] = {}
    skipped = {Families.V4: 6, Families.V6: 4}.get(service.families)
    for workload in workloads:
        if workload is None or all(name != service.name for name, _ in workload.services):
            continue
        port_field = port_bytes(target_port(workload.services, service.name, port, target))
        if not _is_usable(workload, service, rules) or port_field == _NO_PORT:
            continue
        own = 0 if nearest is None else nearness(service, workload.raw, mesh.here)
        for ip in workload.addresses:
            family = 4 if is_v4(ip) else 6
            list_id = ids[family == 6]
            if not list_id or family == skipped:
                continue
            if nearest is not None:
                best = nearest.get(list_id)
                if best is None or own > best:
                    return None
                if own < best:
                    continue
            found.setdefault(list_id, {})[ENDPOINT_VALUE.pack(list_id, ip, port_field)] = None
    return found


def own_endpoints(
    mesh: Mesh, service: Service, rules: Rules, *, with_revisions: bool = False
) -> dict[int, list[Endpoint]]:
    """Of each port where the own endpoints of a service are, also of one with a waypoint.

    At the addresses of the family that the service has first: a workload's of the other one are beside them.
    """

    def revision(uid: str) -> str:
        found = mesh.workload(uid) if with_revisions else None
        return workload_message(found.raw).canonical_revision if found else ""

    weights: dict[bytes, int] = {}
    endpoints = _endpoints(mesh, service, rules, weights, {})
    is_6_first = next((not is_v4(ip) for network, ip in service.vips if network == rules.network), False)
    found: dict[int, list[Endpoint]] = {}
    for port, target in service.ports:
        weights.clear()
        lists = endpoints(port, target, 0, 0)
        first, second = reversed(lists) if is_6_first else lists
        beside: dict[str, list[bytes]] = {}
        for value, uid in second.items():
            beside.setdefault(uid, []).append(value)
        others = {value: beside.pop(uid, []) for value, uid in first.items()}
        at = {**first, **{value: uid for uid, values in beside.items() for value in values}}
        shares = _small({value: weights.get(value, 0) for value in at})
        found[port] = [
            Endpoint(
                ip_to_text(ip),
                port_number(own),
                shares[value],
                revision(uid),
                [ip_to_text(ENDPOINT_VALUE.unpack(other)[1]) for other in others.get(value, ())],
            )
            for value, uid in at.items()
            for _, ip, own in [ENDPOINT_VALUE.unpack(value)]
        ]
    return found


def _small(weights: dict[bytes, int]) -> dict[bytes, int]:
    """In proportion, such that their sum is what Envoy takes."""
    whole = sum(weights.values())
    if whole <= WEIGHTS_MAX:
        return weights
    return {value: max(1, weight * WEIGHTS_MAX // whole) for value, weight in weights.items()}


def _add_ports_by_waypoint(
    found: DesiredService, mesh: Mesh, service: Service, vips: list[Vip], rules: Rules
) -> None:
    """All ports lead to the instances of the waypoint, or of several by their weights."""
    verdict, endpoints = _by_waypoint(mesh, service.waypoints, rules, found.weights)
    seen = [replace(vip, flags=vip.flags | ServiceFlag.WAYPOINT, affinity_s=0) for vip in vips]
    for port, _ in service.ports:
        _add_port(found, service.name, port, 0, seen, verdict, endpoints, by_waypoint=True)


def _by_waypoint(
    mesh: Mesh, waypoints: Sequence[Waypoint], rules: Rules, weights: dict[bytes, int]
) -> tuple[Reason, EndpointsOf]:
    """Refused where one takes nothing but HBONE, or all are unknown or have none here: never past it.

    Of several those that have none leave their share to the others.
    """
    found: list[_Share] = []
    for said in waypoints:
        waypoint = mesh.service_of(said)
        target = dict(waypoint.ports).get(HANDOFF_PORT) if waypoint else 0
        if said == Waypoint(weight=said.weight) or target is None:
            return Reason.WAYPOINT_UNSUPPORTED, _nothing
        if waypoint is not None:
            own_weights: dict[bytes, int] = {}
            own = _endpoints(mesh, waypoint, rules, own_weights, {}, is_waypoint=True)
            if any(own(HANDOFF_PORT, target, 0, 0)):
                found.append(_Share(partial(_at_handoff, own, target), own_weights, said.weight))
    if not found:
        return Reason.WAYPOINT_UNAVAILABLE, _nothing
    return Reason.ROUTED, partial(_shared, found, weights)


class _Share(NamedTuple):
    """A waypoint's part of the connections, and the weights of its instances: one may be another's too."""

    instances: EndpointsOf
    own_weights: dict[bytes, int]
    weight: int


def _at_handoff(own: EndpointsOf, target: int, _port: int, _target: int, id4: int, id6: int) -> Lists:
    return own(HANDOFF_PORT, target, id4, id6)


def _shared(
    waypoints: list[_Share],
    weights: dict[bytes, int],
    port: int,
    target: int,
    id4: int,
    id6: int,
) -> Lists:
    """The instances of all, each as probable as its waypoint's weight makes it."""
    made = [(share.instances(port, target, id4, id6), share) for share in waypoints]
    lists: tuple[dict[bytes, str], dict[bytes, str]] = {}, {}
    for family, instances in enumerate(lists):
        parts = [
            ({value: share.own_weights.get(value, 1) for value in lists_of[family]}, share.weight)
            for lists_of, share in made
            if lists_of[family]
        ]
        whole = lcm(*(sum(part.values()) for part, _ in parts))
        shares: dict[bytes, int] = {}
        for part, weight in parts:
            factor = weight * whole // sum(part.values())
            for value, own in part.items():
                shares[value] = shares.get(value, 0) + own * factor
        for lists_of, _ in made:
            instances.update(lists_of[family])
        if len({*shares.values()}) > 1:
            weights |= shares
    return lists


def _add_port(
    found: DesiredService,
    name: str,
    port: int,
    target: int,
    vips: list[Vip],
    verdict: Reason,
    endpoints: EndpointsOf,
    families: Families = Families.DUAL,
    *,
    by_waypoint: bool = False,
) -> None:
    """`families`: what endpoints are of at the most. Where no list of IPv6 can be, none has an id (0)."""
    port4, port6, port_field = PortId(name, port, 4, by_waypoint), None, port_bytes(port)
    id4, id6 = port4.id, 0
    if families is not Families.V4 or not all(is_v4(vip.ip) for vip in vips):
        port6 = PortId(name, port, 6, by_waypoint)
        id6 = port6.id
    list4, list6 = endpoints(port, target, id4, id6)
    for vip in vips:
        if port6 is None or is_v4(vip.ip) or (list4 and not list6):
            list_id = id4
            found.ports[list_id], found.lists[list_id] = port4, list4
        else:
            list_id = id6
            found.ports[list_id], found.lists[list_id] = port6, list6
        key = SERVICE_KEY.pack(vip.ip, network_id(vip.network), port_field)
        found.frontends[key] = Frontend(list_id, verdict, vip.flags, vip.affinity_s, vip.waits)


class Vip(msgspec.Struct, frozen=True, gc=False):
    """An address at which a service is reached."""

    network: str
    ip: Ip
    flags: ServiceFlag
    affinity_s: int
    waits: bool


def _vips(mesh: Mesh, service: Service, rules: Rules) -> Iterator[Vip]:
    """Where a service is seen: by all, or by clients of its namespace."""
    selection = rules.selections.get(service.name, service.selection)
    least = ServiceFlag.LEAST_CONNECTIONS if selection.least_connections else NO_FLAG
    for network, ip in service.places:
        place = place_of(network, ip)
        views = mesh.scoped.get(place)
        if mesh.vip_owner(place) == service.name:
            yield Vip(network, ip, least, selection.affinity_s, waits=bool(views))
        if views and (view := views.get(service.namespace)) and mesh.vip_owner(view) == service.name:
            own = view_network(network, service.namespace)
            yield Vip(own, ip, least, selection.affinity_s, waits=False)


def _verdict_without_endpoints(mesh: Mesh, service: Service, rules: Rules) -> Reason:
    """Refused for having none (the programs see the empty list), or for what a setting refuses."""
    if not rules.refuse_unenforced_policy:
        return Reason.ROUTED
    if any(mesh.has_policy(workload) for workload in mesh.members_of(service.name)):
        return Reason.POLICY_UNSUPPORTED
    return Reason.ROUTED


def _endpoints(
    mesh: Mesh,
    service: Service,
    rules: Rules,
    weights: dict[bytes, int],
    ranks: dict[int, int],
    *,
    is_waypoint: bool = False,
) -> EndpointsOf:
    """What makes the lists of a port of this service, and fills in the weights where they differ, and ranks.

    Of a waypoint: where connections can be handed over from here, other nodes' where this one has none.
    """
    groups = mesh.ordinary_members.get(service.name)
    if groups is not None and not is_waypoint and not rules.refuse_unenforced_policy:
        own = [group for group in groups if group.network == rules.network]
        if own and is_ranked(service):
            ranked = [(group, [nearness(service, raw, mesh.here) for raw in group.raws]) for group in own]
            return partial(_lists_of_near_groups, service, ranked, ranks)
        return partial(_lists_of_groups, service, own) if own else _nothing
    usable = list(_usable(mesh, service, rules))
    if not is_ranked(service):
        usable = [workload for workload in usable if workload.capacity]
    if is_waypoint:
        here = [each for each in usable if node_of_front(each.uid) in ("", mesh.here.node)]
        usable = here if here or not rules.has_mesh_key else usable
    if not usable:
        return _nothing
    if is_ranked(service):
        return partial(_lists_of_near, mesh, service, usable, weights, ranks)
    return partial(_lists, mesh, service, usable, weights)


def _lists_of_near(
    mesh: Mesh,
    service: Service,
    usable: list[Workload],
    weights: dict[bytes, int],
    ranks: dict[int, int],
    port: int,
    target: int,
    id4: int,
    id6: int,
) -> Lists:
    """Of those that serve the port, the nearest (xds.md 3.3): where all of them weigh nothing, none.

    Who connects by IPv4 can be sent to IPv4 alone, so those are ranked by themselves too.
    """
    serving = [
        (workload, {is_v4(ip) for ip in ips})
        for workload in usable
        if (ips := mesh.addresses_of(workload)) and target_port(workload.services, service.name, port, target)
    ]

    def nearest(some: list[Workload], own: dict[bytes, int], *ids: int) -> Lists:
        found, best = near(service, some, mesh.here)
        ranks.update(dict.fromkeys(ids, best))
        found = [workload for workload in found if workload.capacity]
        return _lists(mesh, service, found, own, port, target, id4, id6)

    for_4 = [workload for workload, families in serving if True in families]
    is_only_6 = service.families is Families.V6
    for_6 = [workload for workload, families in serving if not is_only_6 or False in families]
    if for_4 == for_6:
        return nearest(for_4, weights, id4, id6)
    weights4, weights6 = dict[bytes, int](), dict[bytes, int]()
    list4, list6 = nearest(for_4, weights4, id4)[0], nearest(for_6, weights6, id6)[1]
    for found, own in ((list4, weights4), (list6, weights6)):
        weights.update((value, own[value]) for value in found if value in own)
    return list4, list6


def _nothing(_port: int, _target: int, _id4: int, _id6: int) -> Lists:
    return {}, {}


def _lists(
    mesh: Mesh,
    service: Service,
    usable: list[Workload],
    weights: dict[bytes, int],
    port: int,
    target: int,
    id4: int,
    id6: int,
) -> Lists:
    """Endpoints of both families; each value with the workload that it comes from."""
    list4: dict[bytes, str] = {}
    list6: dict[bytes, str] = {}
    shares4: list[tuple[int, list[bytes]]] = []
    shares6: list[tuple[int, list[bytes]]] = []
    skips4, skips6 = service.families is Families.V6, service.families is Families.V4
    pack, name = ENDPOINT_VALUE.pack, service.name
    last: tuple[ServicePorts, ...] = ()
    port_field = port_bytes(target)
    for workload in usable:
        if workload.services != last:
            last = workload.services
            port_field = port_bytes(target_port(last, name, port, target))
        if port_field == _NO_PORT:
            continue
        ips = mesh.addresses_of(workload)
        own4 = [] if skips4 else [pack(id4, ip, port_field) for ip in ips if is_v4(ip)]
        own6 = [] if skips6 else [pack(id6, ip, port_field) for ip in ips if not is_v4(ip)]
        for found, shares, own in ((list4, shares4, own4), (list6, shares6, own6)):
            if own:
                found.update(dict.fromkeys(own, workload.uid))
                shares.append((workload.capacity, own))
    weights |= _weights(shares4, shares6)
    return list4, list6


def _weights(*families: list[tuple[int, list[bytes]]]) -> dict[bytes, int]:
    """By the capacities of workloads and the addresses of each; nothing where in a family all weigh the same.

    A workload is drawn, then one of its addresses (xds.md 3.2, 3.3). Two that have the same one add up.
    """
    whole = lcm(*{len(own) for shares in families for _, own in shares})
    weights: list[dict[bytes, int]] = [{} for _ in families]
    for found, shares in zip(weights, families, strict=True):
        for capacity, own in shares:
            for value in own:
                found[value] = found.get(value, 0) + capacity * whole // len(own)
    differ = any(len({*found.values()}) > 1 for found in weights)
    return {value: weight for found in weights for value, weight in found.items()} if differ else {}


def _lists_of_groups(
    service: Service, groups: list[Group], port: int, target: int, id4: int, id6: int
) -> Lists:
    """The same of members that are in groups: of each the values differ in the address alone."""
    return (
        _list_of_groups(service, groups, port, target, id4, is_6=False),
        _list_of_groups(service, groups, port, target, id6, is_6=True),
    )


def _list_of_groups(
    service: Service, groups: Iterable[Group], port: int, target: int, list_id: int, *, is_6: bool
) -> Mapping[bytes, str]:
    """Of one family."""
    if service.families is (Families.V4 if is_6 else Families.V6):
        return _NOBODY
    values, uids = list[bytes](), list[str]()
    for group in groups:
        port_field, ips = port_bytes(own_port(group.ports, port) or target), group.of_family(is_6=is_6)
        if ips and port_field != _NO_PORT:
            value = ENDPOINT_VALUE.pack(list_id, NO_IP, port_field)
            head, tail = value[:ENDPOINT_ADDRESS], value[ENDPOINT_ADDRESS + IP_BYTES :]
            between = (tail + head).join([ips[at : at + IP_BYTES] for at in range(0, len(ips), IP_BYTES)])
            values += (head, between, tail)
            uids += group.uids
    return _packed(values, uids)


def _lists_of_near_groups(
    service: Service,
    groups: list[tuple[Group, list[int]]],
    ranks: dict[int, int],
    port: int,
    target: int,
    id4: int,
    id6: int,
) -> Lists:
    """As `_lists_of_near`, of members that are in groups, with how near each is."""
    serving = [(group, near) for group, near in groups if own_port(group.ports, port) or target]
    is_only_6 = service.families is Families.V6

    def nearest(list_id: int, *, is_6: bool) -> Mapping[bytes, str]:
        some = serving
        if is_only_6 or not is_6:
            some = [each for each in serving if each[0].of_family(is_6=is_6)]
        ranks[list_id] = best = best_of(service, (rank for _, near in some for rank in near))
        own = filter(None, (_of_rank(group, near, best) for group, near in some))
        return _list_of_groups(service, own, port, target, list_id, is_6=is_6)

    return nearest(id4, is_6=False), nearest(id6, is_6=True)


def _of_rank(group: Group, ranks: list[int], rank: int) -> Group | None:
    """Those of a group that are so near."""
    which = [index for index, found in enumerate(ranks) if found == rank]
    if len(which) == len(ranks):
        return group
    return group.only(which) if which else None


def _packed(values: list[bytes], uids: list[str]) -> Mapping[bytes, str]:
    return Packed(b"".join(values), uids) if uids else _NOBODY


def _usable(mesh: Mesh, service: Service, rules: Rules) -> Iterator[Workload]:
    for workload in mesh.members_of(service.name):
        if rules.refuse_unenforced_policy and mesh.has_policy(workload):
            continue
        if _is_usable(workload, service, rules):
            yield workload


def _is_usable(workload: Workload, service: Service, rules: Rules) -> bool:
    return (workload.healthy or service.allows_unhealthy) and workload.network == rules.network


def target_port(services: tuple[ServicePorts, ...], service: str, port: int, target: int) -> int:
    """A workload's own port for a service port, else the service's; 0: it has none (xds.md 3.2)."""
    for name, ports in services:
        if name == service:
            return own_port(ports, port) or target
    return target


def own_port(ports: tuple[tuple[int, int], ...], port: int) -> int:
    """A workload's own port for a service port; 0: it says none."""
    for service_port, own in ports:
        if service_port == port:
            return own
    return 0


def desired_address(mesh: Mesh, place: Place, rules: Rules, crowded: Container[str]) -> bytes | None:
    """What an address is, without the key that the entry begins with. None: nobody's.

    It is a service's before it is a workload's, whose view it says all the same: the workload connects from
    it. `crowded`: the services that miss a port in the maps for want of room.
    """
    owner, pod = mesh.vip_owner(place), mesh.pod_at(place)
    view = mesh.view_of(pod) if pod else 0
    if owner is not None:
        verdict = _address_verdict(mesh.services[owner])
        if verdict is Reason.ROUTED and owner in crowded:
            verdict = Reason.NO_ROOM
        return _address_value(AddressKind.SERVICE, verdict, view)
    if pod is None:
        return None
    verdict = Reason.ROUTED
    if rules.refuse_unenforced_policy and mesh.has_policy(pod):
        verdict = Reason.POLICY_UNSUPPORTED  # nobody enforces it, nor does its waypoint
    elif pod.waypoint is not None:
        verdict = Reason.WAYPOINT_UNAVAILABLE  # programs look at its port 0 for what becomes of it
    return _address_value(AddressKind.WORKLOAD, verdict, view)


@cache
def _address_value(kind: AddressKind, verdict: Reason, view: int) -> bytes:
    return ADDRESS_VALUE.pack(kind, verdict, view)[ADDRESS_KEY.size :]


@cache
def with_view_of(value: bytes, other: bytes) -> bytes:
    """A workload's value that says where to look for services of its namespace's own as another says it."""
    return value[:_VIEW] + other[_VIEW : _VIEW + 4] + value[_VIEW + 4 :]


@cache
def has_view(value: bytes) -> bool:
    return any(value[_VIEW : _VIEW + 4])


_VIEW: Final = offset("address_value", "view") - ADDRESS_KEY.size


PLAIN_WORKLOAD: Final = _address_value(AddressKind.WORKLOAD, Reason.ROUTED, 0)
"""What an ordinary pod's address is."""


def _address_verdict(service: Service) -> Reason:
    """For ports that the service does not have: refused, unless all its traffic is left alone."""
    passes = service.mode is Mode.PASSTHROUGH and not service.waypoints
    return Reason.PASSTHROUGH if passes else Reason.ROUTED
