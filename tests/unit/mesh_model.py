"""Random meshes, the maps as the kernel would hold them, and what they should say by a slow plain rule."""

from __future__ import annotations

import ipaddress
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import msgspec
from hypothesis import strategies as st

from pykmesh.contracts.address import (
    Families,
    Mode,
    Policy,
    Range,
    Selection,
    Service,
    Waypoint,
    Workload,
    workload_message,
)
from pykmesh.contracts.bulk import Ordinary
from pykmesh.contracts.waypoints import HANDOFF_PORT
from pykmesh.kernel.explain import Chooser, Client
from pykmesh.kernel.layout import AddressKind, Reason, ServiceFlag
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ADDRESS_VALUE,
    ENDPOINT_KEY,
    ENDPOINT_SHARE,
    ENDPOINT_VALUE,
    RANGE_KEY,
    RANGE_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    SWITCH_KEY,
    SWITCH_VALUE,
    Destination,
    Ip,
    ip_from_text,
    ip_from_wire,
    ip_to_text,
    is_v4,
    network_id,
    port_number,
)
from pykmesh.proto.workload_pb2 import Address
from services.map_writer.desired import PortId
from services.map_writer.locality import Locality
from services.map_writer.mesh import Mesh, Touched
from services.map_writer.planner import Limits, Step

KEY_BYTES = {
    "services": SERVICE_KEY.size,
    "endpoints": ENDPOINT_KEY.size,
    "addresses": ADDRESS_KEY.size,
    "ranges": RANGE_KEY.size,
    "switches": SWITCH_KEY.size,
}
VALUE_BYTES = {
    "services": SERVICE_VALUE.size,
    "endpoints": ENDPOINT_VALUE.size,
    "addresses": ADDRESS_VALUE.size,
    "ranges": RANGE_VALUE.size,
    "switches": SWITCH_VALUE.size,
}
NAMES = ["shop/a.shop", "shop/b.shop", "bank/c.bank", "bank/d.bank"]
NAMESPACES = ("shop", "bank")
UIDS = [f"C//Pod/shop/p{number}" for number in range(6)]
VIPS = [ip_from_text(text) for text in ("10.96.0.1", "10.96.0.2", "fd96::1", "fd96::2")]
RANGES = [
    Range("", ip_from_text(text), bits)
    for text, bits in (("10.96.0.0", 120), ("10.96.0.0", 127), ("fd96::", 112), ("fd96::2", 127), ("::", 0))
]
ASKED = [*VIPS, *map(ip_from_text, ("10.96.0.0", "10.96.0.77", "fd96::3", "fd96::77"))]
"""Addresses and some that lie in ranges."""
POD_IPS = [ip_from_text(text) for text in ("10.1.0.1", "10.1.0.2", "10.1.0.3", "fd01::1", "fd01::2")]
PORTS = (80, HANDOFF_PORT)
HERE = Locality(node="here", cluster="Kubernetes")
"""Where that is, workloads on the node say."""


Plain = dict[str, dict[str, tuple[object, ...]]]


class Turned(NamedTuple):
    """What a workload becomes whose health alone is another; nothing, where there is no such workload."""


class Change(NamedTuple):
    """One resource: a name with what it becomes, None for its removal."""

    name: str
    resource: Service | Workload | Policy | Turned | None


def change(seed: int) -> Change:
    """Any change; one number, so that drawing a script of them is quick and shrinking drops some."""
    draw = random.Random(seed)
    kind = draw.choice("sswwwr")
    if kind == "r":
        return Change(draw.choice(NAMES + UIDS), None)
    resource = _service(draw) if kind == "s" else _workload(draw)
    return Change(resource.name if isinstance(resource, Service) else resource.uid, resource)


def _rangeless(seed: int) -> Change:
    name, found = change(seed)
    is_service = isinstance(found, Service)
    return Change(name, msgspec.structs.replace(found, ranges=()) if is_service else found)


def _service(draw: random.Random) -> Service:
    ports = {port: draw.choice([0, 8080, 8081]) for port in PORTS if draw.random() < 0.7}
    found = Service(
        name=draw.choice(NAMES),
        hostname="host",
        vips=tuple(("", ip) for ip in draw.sample(VIPS, draw.randrange(4))),
        ranges=tuple(draw.sample(RANGES[:-1], draw.choice([0, 0, 0, 1, 2]))),
        ports=tuple(ports.items()),
        families=draw.choice([Families.AUTOMATIC, *Families]),
        mode=draw.choice([Mode.UNSPECIFIED, Mode.UNSPECIFIED, Mode.FAILOVER, Mode.STRICT, Mode.PASSTHROUGH]),
        scopes=draw.choice([(), (), (1,), (1, 2)]),
        allows_unhealthy=draw.random() < 0.5,
        waypoints=_draw_waypoints(draw),
        canonical=draw.random() < 0.5,
        hidden=draw.random() < 0.3,
        selection=draw.choice([Selection(), Selection(60), Selection(least_connections=True)]),
    )
    return (
        msgspec.structs.replace(found, ranges=(*found.ranges, RANGES[-1])) if draw.random() < 0.1 else found
    )


def _draw_waypoints(draw: random.Random) -> tuple[Waypoint, ...]:
    """By name or by address; of services that may be there or not."""
    drawn = draw.random()
    if drawn < 0.1:
        return (Waypoint(service=draw.choice(NAMES)),)
    if drawn < 0.2:
        return (Waypoint(ip=draw.choice(VIPS)),)
    names = draw.sample(NAMES, 2) if drawn < 0.3 else ()
    return tuple([Waypoint(service=name, weight=draw.choice([1, 10, 30])) for name in names])


def _workload(draw: random.Random) -> Workload:
    memberships = {
        name: tuple((port, draw.choice([0, 9090])) for port in PORTS if draw.random() < 0.5)
        for name in draw.sample(NAMES, draw.randrange(4))
    }
    found = Workload(
        uid=draw.choice(UIDS),
        network=draw.choice(["", "", "", "other"]),
        addresses=tuple(draw.sample(POD_IPS, draw.randrange(3))),
        services=tuple(memberships.items()),
        healthy=draw.random() < 0.8,
        host_network=draw.random() < 0.3,
        waypoint=next(iter(_draw_waypoints(draw)), None),
        prefers_hbone=draw.random() < 0.5,
        capacity=draw.choice([0, 1, 1, 1, 2, 7]),
        policies=(),
        namespace=draw.choice(NAMESPACES),
        raw=b"",
    )
    # The mesh tells one message from another by its bytes, and reads where it runs from them.
    message = Address()
    message.workload.uid, message.workload.name = found.uid, _repr_but_health(found)
    message.workload.status = 0 if found.healthy else 1
    message.workload.locality.region, message.workload.locality.zone = (
        draw.choice(["r", "s"]),
        draw.choice("yz"),
    )
    message.workload.node = draw.choice(["here", "there"])
    if found.waypoint is None and draw.random() < 0.2:
        found = msgspec.structs.replace(found, addresses=(*found.addresses[:1], draw.choice(VIPS[1:3])))
        message.workload.name = _repr_but_health(found)
    return msgspec.structs.replace(found, raw=message.SerializeToString())


def _repr_but_health(found: Workload) -> str:
    return repr(msgspec.structs.replace(found, healthy=True))


_MEMBERSHIP = ((NAMES[0], ()),)


def plain_change(seed: int) -> Change:
    """Of pods like most: they come, go, move and fail. Seldom any change."""
    draw = random.Random(seed)
    if draw.random() < 0.03:
        return change(seed)
    if draw.random() < 0.3:
        return Change(draw.choice(UIDS), None)
    found = _workload(draw)
    own, own6 = (ip_from_text(f"{head}{UIDS.index(found.uid)}") for head in ("10.1.1.", "fd00:1::"))
    families = draw.choice([(own,), (own,), (own6,), (own, own6), (own6, own)])
    found = msgspec.structs.replace(
        found,
        network="",
        addresses=families if draw.random() < 0.9 else (draw.choice(POD_IPS),),
        host_network=False,
        waypoint=None,
        capacity=1,
    )
    if draw.random() < 0.7:
        found = msgspec.structs.replace(found, healthy=True, services=(found.services or _MEMBERSHIP)[:1])
    where = draw.choice("rs"), draw.choice("yz"), draw.choice(["here", "there"])
    return Change(found.uid, msgspec.structs.replace(found, raw=encoded(found, where)))


def encoded(found: Workload, where: tuple[str, str, str] = ("", "", "")) -> bytes:
    """What is decoded as this workload: one of those that `plain_change` makes. Region, zone, node."""
    message = Address()
    said = message.workload
    said.locality.region, said.locality.zone, said.node = where
    said.uid, said.namespace = found.uid, found.namespace
    said.addresses.extend(ip[-4:] if is_v4(ip) else ip for ip in found.addresses)
    said.status, said.tunnel_protocol = 0 if found.healthy else 1, int(found.prefers_hbone)
    for name, ports in found.services:
        entry = said.services[name]
        for port, target in ports:
            entry.ports.add(service_port=port, target_port=target)
    return message.SerializeToString(deterministic=True)


def plain_services(seed: int) -> list[Change]:
    """All services, like most: without anything that decides for each of their endpoints."""
    draw = random.Random(seed)
    drawn = (
        msgspec.structs.replace(
            _service(draw),
            name=name,
            vips=(("", vip),),
            ranges=(),
            mode=draw.choice([Mode.UNSPECIFIED, Mode.FAILOVER, Mode.STRICT]),
            scopes=draw.choice([(1,), (1, 2), (2, 1)]),
            waypoints=(),
            hidden=draw.random() < 0.1,
        )
        for name, vip in zip(NAMES, VIPS, strict=True)
    )
    return [Change(service.name, service) for service in drawn]


def responses(*, ranges: bool = True) -> st.SearchStrategy[list[list[Change]]]:
    """What comes in one response each; a response holds no name twice."""
    seeds = st.integers(0, 1 << 30)

    def several(one: Callable[[int], Change]) -> st.SearchStrategy[list[list[Change]]]:
        turns = st.sampled_from(UIDS).map(lambda uid: Change(uid, Turned()))
        changes = st.lists(seeds.map(one) | turns, min_size=1, max_size=8)
        return st.lists(changes.map(lambda found: list({c.name: c for c in found}.values())), max_size=8)

    plain = st.tuples(seeds.map(plain_services), several(plain_change)).map(lambda both: [both[0], *both[1]])
    return several(change if ranges else _rangeless) | (plain if ranges else st.nothing())


def turned(workload: Workload) -> Workload:
    message = Address.FromString(workload.raw)
    message.workload.status = 1 if workload.healthy else 0
    raw = message.SerializeToString(deterministic=True)
    return msgspec.structs.replace(workload, healthy=not workload.healthy, raw=raw)


def put(mesh: Mesh, response: Sequence[Change], touched: Touched) -> None:
    """As the follower does with a large response: removals first, ordinary workloads together at the end."""
    turn = [change.name for change in response if isinstance(change.resource, Turned)]
    workloads = [mesh.workload(name) for name in turn if name in mesh.workloads]
    response = [*response, *(Change(workload.uid, turned(workload)) for workload in workloads)]
    for name, resource in response:
        if resource is None:
            mesh.remove(name, touched)
    resources = [resource for _, resource in response if isinstance(resource, Service | Workload)]
    raws = [resource.raw if isinstance(resource, Workload) else b"" for resource in resources]
    ordinary = Ordinary()
    for resource, is_taken in zip(resources, ordinary.take(raws), strict=True):
        if not is_taken:
            name = resource.uid if isinstance(resource, Workload) else resource.name
            mesh.put(name, resource, touched)
    mesh.put_ordinary([*ordinary.groups()], touched)


_PORTS = {
    PortId(name, port, family, by_waypoint).id: f"{name} {port}"
    for name in NAMES
    for port in PORTS
    for family in (4, 6)
    for by_waypoint in (False, True)
}


class Tables(NamedTuple):
    """Maps as `pykmesh explain` reads them."""

    maps: dict[str, dict[bytes, bytes]]

    def get(self, name: str, key: bytes) -> bytes | None:
        if name != "ranges":
            return self.maps[name].get(key)
        _, network, ip = RANGE_KEY.unpack(key)
        found = [
            (bits, value)
            for (bits, own, first), value in (
                (RANGE_KEY.unpack(k), v) for k, v in self.maps["ranges"].items()
            )
            if own == network and _covers(first, bits - 32, ip)
        ]
        return max(found)[1] if found else None


def _covers(first: bytes, bits: int, ip: bytes) -> bool:
    """Whether it is in a range; IPv4 is in none of IPv6."""
    if is_v4(first) != is_v4(ip):
        return False
    return int.from_bytes(first, "big") >> 128 - bits == int.from_bytes(ip, "big") >> 128 - bits


def _permille(share: float) -> int:
    """Rounded where no share lies: programs' are off by parts of 2^32."""
    return int(share * 1000 + 0.37)


class Maps:
    """The kernel's maps; a write beyond a limit fails, and every single one must leave them safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.maps: dict[str, dict[bytes, bytes]] = {name: {} for name in KEY_BYTES}

    def apply(self, steps: Iterable[Step], *, checked: bool = True) -> None:
        for _ in self.writes(steps):
            if checked:
                self.assert_safe()

    def writes(self, steps: Iterable[Step]) -> Iterator[None]:
        """Applies one entry after another."""
        for step in steps:
            size, value_size = KEY_BYTES[step.map], VALUE_BYTES[step.map]
            for at in range(len(step.keys) // size):
                key = step.keys[at * size : (at + 1) * size]
                if step.values:
                    self.maps[step.map][key] = step.values[at * value_size : (at + 1) * value_size]
                    limit = getattr(self.limits, step.map, 1)
                    assert len(self.maps[step.map]) <= limit, f"{step.map} holds more than {limit}"
                else:
                    self.maps[step.map].pop(key, None)
                yield

    def assert_safe(self) -> None:
        for value in self.maps["ranges"].values():
            assert ADDRESS_KEY.pack(*RANGE_VALUE.unpack(value)) in self.maps["addresses"], (
                "a range of nothing"
            )
        for key, value in (*self.maps["services"].items(), *self.maps["addresses"].items()):
            assert value.startswith(key), "programs would take it for another's"
        for value in self.maps["services"].values():
            list_id, count, verdict, _, _ = SERVICE_VALUE.unpack(value)
            assert verdict == Reason.ROUTED or count == 0
            for slot in range(count):
                found = self.maps["endpoints"].get(ENDPOINT_KEY.pack(list_id, slot))
                assert found is not None, f"{list_id:x} counts slot {slot}, which is not there"
                assert ENDPOINT_VALUE.unpack(found)[0] == list_id
                other = self.maps["endpoints"].get(
                    ENDPOINT_KEY.pack(list_id, ENDPOINT_SHARE.unpack(found)[0])
                )
                assert other is not None, f"slot {slot} of {list_id:x} gives way to one that is not there"

    def reachable(self) -> dict[bytes, set[str]]:
        """The endpoints that a connection may get, and as what, by the entry of `services`."""
        found = {}
        for key, value in self.maps["services"].items():
            list_id, count, _, flags, _ = SERVICE_VALUE.unpack(value)
            slots = (self.maps["endpoints"][ENDPOINT_KEY.pack(list_id, slot)] for slot in range(count))
            found[key] = {_reached(slot, flags) for slot in slots}
        return found

    def decision(self, client: tuple[Ip, int], ip: Ip, port: int) -> tuple[Reason, str]:
        """What becomes of a connection of a client (its address and network), and whose port it gets."""
        here, network = client
        found = Chooser(Tables(self.maps)).choose(Destination(ip, port), Client(network, here))
        empty = found.reason in (Reason.NO_ENDPOINT, Reason.ENDPOINT_VANISHED)
        return Reason.ROUTED if empty else found.reason, _PORTS.get(found.service, "")

    def members(self) -> dict[int, set[str]]:
        """The endpoints of each list, as what those who name it take them."""
        found: dict[int, set[str]] = {}
        for value in self.maps["services"].values():
            list_id, _, _, flags, _ = SERVICE_VALUE.unpack(value)
            for key, endpoint in self.maps["endpoints"].items():
                if ENDPOINT_KEY.unpack(key)[0] == list_id:
                    found.setdefault(list_id, set()).add(_reached(endpoint, flags))
        return found

    def list_of(self, key: bytes) -> int:
        """The list that an entry of `services` names."""
        return int(SERVICE_VALUE.unpack(self.maps["services"][key])[0])

    def plain(self, *, full: bool = False) -> Plain:
        """Addresses and ports with verdict and endpoints; also that nothing is left over.

        When `services` is full, the endpoints of a port that found no room wait there for it.
        """
        counted: set[bytes] = set()
        services: dict[str, tuple[object, ...]] = {}
        for key, value in self.maps["services"].items():
            ip, network, port = SERVICE_KEY.unpack(key)
            list_id, count, verdict, flags, affinity_s = SERVICE_VALUE.unpack(value)
            keys = [ENDPOINT_KEY.pack(list_id, slot) for slot in range(count)]
            counted.update(keys)
            shown = _shares(keys, self.maps["endpoints"])
            name = f"{_network(network)} {ip_to_text(ip)} {port_number(port)}"
            services[name] = (Reason(verdict), ServiceFlag(flags), affinity_s, *shown)
        assert full or self.maps["endpoints"].keys() == counted, "endpoints that nothing counts"
        return {"services": services, "addresses": self.addresses(), "ranges": self.ranges()}

    def ranges(self) -> dict[str, tuple[object, ...]]:
        found: dict[str, tuple[object, ...]] = {}
        for key, value in self.maps["ranges"].items():
            bits, network, first = RANGE_KEY.unpack(key)
            ip, own = RANGE_VALUE.unpack(value)
            found[f"{_network(network)} {_text(first)}/{bits - 32}"] = (f"{_network(own)} {_text(ip)}",)
        return found

    def addresses(self) -> dict[str, tuple[object, ...]]:
        found: dict[str, tuple[object, ...]] = {}
        for key, value in self.maps["addresses"].items():
            ip, network = ADDRESS_KEY.unpack(key)
            kind, verdict, view = ADDRESS_VALUE.unpack(value)
            said = (AddressKind(kind), Reason(verdict), _network(view) if view else "")
            found[f"{_network(network)} {ip_to_text(ip)}"] = said
        return found


def _shares(keys: list[bytes], endpoints: dict[bytes, bytes]) -> list[str]:
    """Each endpoint of a list with how often of a thousand times the programs draw it."""
    found: Counter[str] = Counter()
    for key in keys:
        other, stays = ENDPOINT_SHARE.unpack(endpoints[key])
        own = stays / 2**32 if stays else 1.0
        found[_shown(endpoints[key])] += own / len(keys)
        if stays:
            found[_shown(endpoints[keys[other]])] += (1 - own) / len(keys)
    return sorted(f"{shown} {_permille(share)}" for shown, share in found.items())


def _reached(endpoint: bytes, flags: int) -> str:
    """An instance of a waypoint is told what for, an endpoint is not: one must not be taken for the other."""
    return _shown(endpoint) + " by waypoint" * bool(flags & ServiceFlag.WAYPOINT)


def _shown(value: bytes) -> str:
    _, ip, port = ENDPOINT_VALUE.unpack(value)
    return f"{ip_to_text(ip)} {port_number(port)}"


def expected(mesh: Mesh) -> Plain:
    """What the maps must say of a mesh, from its resources alone and by no index of it."""
    ranges = {
        f"{f'@{namespace}' if namespace else ''} {_text(place.ip)}/{place.bits}": (
            f"{_shown_network(place, namespace)} {_text(place.ip)}",
        )
        for place in RANGES
        for namespace in (None, *viewers(mesh, place))
        if owner(mesh, place, namespace)
    }
    return {
        "services": _expected_services(mesh),
        "addresses": _expected_addresses(mesh),
        "ranges": ranges,
    }


def _network(number: int) -> str:
    """The network of an id; "@shop" is that in which the namespace shop sees what others do not."""
    known = {"": "", "other": "other"}
    known |= {
        f"{network}\0ns/{namespace}": f"{network}@{namespace}"
        for network in ("", "other")
        for namespace in NAMESPACES
    }
    known |= {f"\0{bits}": f"/{bits}" for bits in range(129)}
    known |= {f"\0{bits}\0ns/{ns}": f"/{bits}@{ns}" for bits in range(129) for ns in NAMESPACES}
    return {network_id(name): shown for name, shown in known.items()}[number]


def owner(mesh: Mesh, place: Ip | Range, namespace: str | None = None) -> Service | None:
    """Whom clients of a namespace (None: of one that has no service) see at an address, or as a range's."""
    rivals = [
        service
        for service in mesh.services.values()
        if (place in service.ranges if isinstance(place, Range) else ("", place) in service.vips)
        and (not service.hidden or service.namespace == namespace)
    ]
    return min(rivals, key=lambda s: (s.namespace != namespace, not s.canonical, s.name), default=None)


def viewers(mesh: Mesh, place: Ip | Range) -> list[str]:
    """The namespaces that see another service at a place than the rest, or look there before others do."""
    return [
        ns
        for ns in NAMESPACES
        if owner(mesh, place, ns) != owner(mesh, place)
        or (
            isinstance(place, Range)
            and _is_own(mesh, place, ns)
            and (_others_are_longer(mesh, place, ns) or _lies_in_a_view(mesh, place, ns))
        )
    ]


def _is_own(mesh: Mesh, place: Range, namespace: str) -> bool:
    return any(place in s.ranges for s in mesh.services.values() if s.namespace == namespace)


def _others_are_longer(mesh: Mesh, place: Range, namespace: str) -> bool:
    others = {s.namespace for s in mesh.services.values() for r in s.ranges if _is_inside(r, place)}
    return bool(others - {namespace})


def _lies_in_a_view(mesh: Mesh, place: Range, namespace: str) -> bool:
    """Of a wider one, in which it would be looked for first."""
    wider = {r for s in mesh.services.values() for r in s.ranges if _is_inside(place, r)}
    return any(namespace in viewers(mesh, each) for each in wider)


def _is_inside(inner: Range, outer: Range) -> bool:
    return inner.bits > outer.bits and _covers(outer.ip, outer.bits, inner.ip)


def seen(mesh: Mesh, namespace: str | None, ip: Ip) -> Service | None:
    """Whose connection it is, by ztunnel's rule (xds.md 3.2) and none of the maps'."""
    exact = owner(mesh, ip, namespace)
    if exact is not None:
        return exact
    places = {r for s in mesh.services.values() for r in s.ranges if _covers(r.ip, r.bits, ip)}
    found = [(service, place) for place in places if (service := owner(mesh, place, namespace))]
    best = min(found, key=lambda f: (f[0].namespace != namespace, -f[1].bits), default=None)
    return None if best is None else best[0]


def _shown_network(place: Ip | Range, namespace: str | None) -> str:
    own = f"/{place.bits}" if isinstance(place, Range) else ""
    return f"{own}@{namespace}" if namespace else own


def _expected_services(mesh: Mesh) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for place, ip in _places():
        for namespace in (None, *viewers(mesh, place)):
            service = owner(mesh, place, namespace)
            for port, target in service.ports if service else ():
                assert service is not None
                name = f"{_shown_network(place, namespace)} {_text(ip)} {port}"
                flags = ServiceFlag(service.selection.least_connections * ServiceFlag.LEAST_CONNECTIONS)
                flags |= ServiceFlag(bool(service.waypoints) * ServiceFlag.WAYPOINT)
                said = _expected_port(mesh, service, ip, port, target)
                affinity_s = 0 if service.waypoints else service.selection.affinity_s
                found[name] = (said[0], flags, affinity_s, *said[1:])
    for name, workload, ip in _workloads_by_address(mesh):
        if workload.waypoint is not None:
            said = _expected_by_waypoint(mesh, (workload.waypoint,), ip)
            found[f"{name} 0"] = (said[0], ServiceFlag.WAYPOINT, 0, *said[1:])
    return found


def _workloads_by_address(mesh: Mesh) -> Iterator[tuple[str, Workload, Ip]]:
    """Who is meant by each address of workloads."""
    told = set()
    for workload in sorted(mesh.all_workloads(), key=lambda w: (not w.prefers_hbone, w.uid)):
        for ip in () if workload.host_network else workload.addresses:
            name = f"{workload.network} {_text(ip)}"
            if name not in told:
                told.add(name)
                yield name, workload, ip


def _places() -> list[tuple[Ip | Range, Ip]]:
    return [*((ip, ip) for ip in VIPS), *((found, found.ip) for found in RANGES)]


def _expected_port(mesh: Mesh, service: Service, ip: Ip, port: int, target: int) -> tuple[object, ...]:
    if service.waypoints:
        return _expected_by_waypoint(mesh, service.waypoints, ip)
    verdict = Reason.ROUTED
    if service.mode is Mode.PASSTHROUGH:
        verdict = Reason.PASSTHROUGH
    return _expected_list(verdict, _endpoints(mesh, service, port, target), ip)


def _expected_list(verdict: Reason, all_of_them: list[tuple[str, int]], ip: Ip) -> tuple[object, ...]:
    if verdict is not Reason.ROUTED:
        all_of_them = []
    wanted = [e for e in all_of_them if is_v6(e[0]) == is_v6(_text(ip))]
    if is_v6(_text(ip)) and not wanted:
        wanted = [e for e in all_of_them if not is_v6(e[0])]
    return (verdict, *_expected_shares(wanted))


def _expected_by_waypoint(mesh: Mesh, waypoints: Iterable[Waypoint], ip: Ip) -> tuple[object, ...]:
    """The endpoints of the waypoints' port, whatever the service's own are."""
    found: list[tuple[list[tuple[str, int]], int]] = []
    for said in waypoints:
        waypoint = owner(mesh, said.ip) if said.ip else mesh.services.get(said.service)
        if waypoint is None:
            continue
        target = dict(waypoint.ports).get(HANDOFF_PORT)
        if target is None:
            return (Reason.WAYPOINT_UNSUPPORTED,)
        found.append((_endpoints(mesh, waypoint, HANDOFF_PORT, target), said.weight))
    if not any(instances for instances, _ in found):
        return (Reason.WAYPOINT_UNAVAILABLE,)
    is_6 = is_v6(_text(ip)) and any(is_v6(e) for instances, _ in found for e, _ in instances)
    own = [(_weights([(e, w) for e, w in each if is_v6(e) == is_6]), weight) for each, weight in found]
    whole = math.prod(weights.total() for weights, _ in own if weights)
    wanted = [(e, weight * w * whole // each.total()) for each, weight in own for e, w in each.items()]
    return (Reason.ROUTED, *_expected_shares(wanted))


def _weights(wanted: list[tuple[str, int]]) -> Counter[str]:
    weights: Counter[str] = Counter()
    for endpoint, weight in wanted:
        weights[endpoint] += weight
    return weights


def _expected_shares(wanted: list[tuple[str, int]]) -> list[str]:
    weights = _weights(wanted)
    return sorted(f"{e} {_permille(weight / weights.total())}" for e, weight in weights.items())


def is_v6(text: str) -> bool:
    return ":" in text


def _text(ip: Ip) -> str:
    packed = ip[12:] if ip[:12] == ip_from_wire(bytes(4))[:12] else ip
    return str(ipaddress.ip_address(bytes(packed)))


def _endpoints(mesh: Mesh, service: Service, port: int, target: int) -> list[tuple[str, int]]:
    """Endpoints of those workloads that are near enough, and weights: a workload's is its addresses'."""
    found = []
    for family in (Families.V4, Families.V6):
        if service.families not in (Families.AUTOMATIC, Families.DUAL, family):
            continue
        # An IPv6 socket can be sent to IPv4, where the service has it, and not the other way round.
        only_6 = family is Families.V6 and service.families is family
        reachable = {Families.V4: {False}, Families.V6: {True} if only_6 else {True, False}}[family]
        for workload in _near(mesh, service, port, target, reachable):
            own = _own_port(workload, service, port, target)
            texts = [text for ip in workload.addresses if is_v6(text := _text(ip)) == (family is Families.V6)]
            if own and workload.capacity:
                found += [(f"{text} {own}", workload.capacity * 60 // len(texts)) for text in texts]
    return found


def _near(mesh: Mesh, service: Service, port: int, target: int, reachable: set[bool]) -> list[Workload]:
    """Of those that serve the port, at addresses that are (true) or are not of IPv6."""
    usable = [
        workload
        for workload in mesh.all_workloads()
        if service.name in dict(workload.services)
        and (workload.healthy or service.allows_unhealthy)
        and not workload.network
        and (
            not _is_ranked(service)
            or (
                reachable & {is_v6(_text(ip)) for ip in workload.addresses}
                and _own_port(workload, service, port, target)
            )
        )
    ]
    best = max((_matches(service, w, mesh.here) for w in usable), default=0)
    if service.mode is Mode.STRICT:
        best = len(service.scopes)
    return [w for w in usable if not _is_ranked(service) or _matches(service, w, mesh.here) == best]


def _is_ranked(service: Service) -> bool:
    return bool(service.scopes) and service.mode in (Mode.STRICT, Mode.FAILOVER)


def _own_port(workload: Workload, service: Service, port: int, target: int) -> int:
    return dict(dict(workload.services)[service.name]).get(port) or target


def _matches(service: Service, workload: Workload, here: Locality) -> int:
    where = workload_message(workload.raw).locality
    pairs = {1: (where.region, here.region), 2: (where.zone, here.zone)}
    return len(list(takewhile(lambda scope: pairs[scope][0] == pairs[scope][1], service.scopes)))


def _expected_addresses(mesh: Mesh) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    seeing = {ns for place, _ in _places() for ns in viewers(mesh, place)}
    for name, workload, _ in _workloads_by_address(mesh):
        verdict = Reason.WAYPOINT_UNAVAILABLE if workload.waypoint else Reason.ROUTED
        view = f"{workload.network}@{workload.namespace}" if workload.namespace in seeing else ""
        found[name] = (AddressKind.WORKLOAD, verdict, view)
    for place, ip in _places():
        for namespace in (None, *viewers(mesh, place)):
            service = owner(mesh, place, namespace)
            if service is not None:
                passes = service.mode is Mode.PASSTHROUGH and not service.waypoints
                verdict = Reason.PASSTHROUGH if passes else Reason.ROUTED
                name = f"{_shown_network(place, namespace)} {_text(ip)}"
                *_, view = found.get(name, ("",))  # of the pod that has the address
                found[name] = (AddressKind.SERVICE, verdict, view)
    return found
