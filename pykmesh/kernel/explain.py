"""The decision of the programs, told step by step with the entries that decide: bpf/choose.h in Python.

Pure: it is given what the maps say. Each function here is the one of the same name there, so a change
there is one here; tests/mesh/test_explain.py holds both against each other.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final, NamedTuple, Protocol

from pykmesh.kernel.layout import AddressKind, Reason, ServiceFlag, Switch, flag_text
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ADDRESS_VALUE,
    DNS_KEY,
    DNS_LISTENER,
    DNS_SERVER,
    DNS_SILENCE_MS,
    DNS_SLOTS,
    ENDPOINT_KEY,
    ENDPOINT_SHARE,
    ENDPOINT_VALUE,
    RANGE_KEY,
    RANGE_VALUE,
    SERVICE_KEY,
    SERVICE_VALUE,
    SWITCH_KEY,
    Destination,
    Ip,
    in_network,
    ip_to_text,
    is_v4,
    port_bytes,
    port_number,
)

SLOTS_MAX: Final = 1 << 20
"""No map has room for more slots of a list."""
_WHOLE: Final = 1 << 32
_DNS_PORT: Final = 53


class Tables(Protocol):
    """The maps by name. In `ranges` the longest prefix that a key has is found."""

    def get(self, name: str, key: bytes) -> bytes | None: ...


class Step(NamedTuple):
    """A map that was asked, for what, the entry that was there, and what follows from it."""

    map: str
    asked: str
    found: str
    means: str


class Endpoint(NamedTuple):
    """A slot of a list: of all draws, `share` end in it (0 to 1)."""

    slot: int
    to: Destination
    share: float


class Choice(NamedTuple):
    """What becomes of a connection. `rewrite`: it goes to one of the endpoints; `service`: their list."""

    reason: Reason
    rewrite: bool = False
    service: int = 0
    endpoints: tuple[Endpoint, ...] = ()
    by_waypoint: bool = False

    @property
    def is_refusal(self) -> bool:
        return self.reason not in (Reason.ROUTED, Reason.PASSTHROUGH)


class Client(NamedTuple):
    """Who connects: the id of its network, and the pod's address; None when it is no enrolled pod."""

    network: int = 0
    ip: Ip | None = None


class _Service(NamedTuple):
    id: int
    endpoints: int
    verdict: Reason
    flags: ServiceFlag


class _Address(NamedTuple):
    kind: int = 0
    verdict: Reason = Reason.ROUTED
    view: int = 0


NOTHING: Final = "nothing"


class Chooser:
    """One decision; `steps` has those that were taken. Of a list `slots_max` slots are looked at."""

    def __init__(self, tables: Tables, slots_max: int = SLOTS_MAX) -> None:
        self._tables = tables
        self._slots_max = slots_max
        self.steps: list[Step] = []

    def _tell(self, name: str, asked: str, found: str, means: str) -> None:
        self.steps.append(Step(name, asked, found, means))

    def is_question(self, to: Destination, netns_cookie: int, now_ns: int) -> bool:
        """Whether the DNS proxy takes it, before all else (bpf/dns.h, `dns_redirect`); `now_ns`: monotonic.

        That its socket is there, which the program looks for too, cannot be told from here.
        """
        if to.port != _DNS_PORT or _is_link_local(to.ip):
            return False
        silent = False
        for slot in range(DNS_SLOTS):
            key = DNS_KEY.pack(netns_cookie, slot)
            listener = self._tables.get("dns_listeners", key)
            beat_ns, port, is_6 = DNS_LISTENER.unpack(listener) if listener else (0, b"", False)
            if listener is None or bool(is_6) == is_v4(to.ip):
                continue
            asked, found = f"namespace {netns_cookie} slot {slot}", f"port {port_number(port)}"
            if now_ns - beat_ns > DNS_SILENCE_MS * 10**6:
                silent = True
                continue
            server = self._tables.get("dns_servers", key)
            if server is None or DNS_SERVER.unpack(server)[0] == to.ip:
                means = "dns_proxy answers names of services; for others it asks the server"
                self._tell("dns_listeners", asked, found, means)
                return True
        if silent:
            self._tell("dns_listeners", f"namespace {netns_cookie}", "a proxy that is silent", "not asked")
        return False

    def choose(self, to: Destination, client: Client, *, is_datagram: bool = False) -> Choice:
        """For connect()."""
        if _is_loopback(to.ip):
            self._tell("addresses", str(to), "not asked", "a loopback address: left alone")
            return Choice(Reason.ROUTED)
        found = self._find_service(to, client, is_datagram=is_datagram)
        if isinstance(found, Reason):
            return Choice(found)
        if found.verdict is not Reason.ROUTED:
            return Choice(found.verdict, service=found.id)
        if not found.endpoints:
            return Choice(Reason.NO_ENDPOINT, service=found.id)
        endpoints = self._endpoints(found.id, found.endpoints)
        if not endpoints:
            return Choice(Reason.ENDPOINT_VANISHED, service=found.id)
        by_waypoint = ServiceFlag.WAYPOINT in found.flags
        return Choice(
            Reason.ROUTED, rewrite=True, service=found.id, endpoints=endpoints, by_waypoint=by_waypoint
        )

    def choose_connected_datagram(self, to: Destination, client: Client) -> Choice:
        """For connect() of a datagram socket."""
        found = self.choose(to, client, is_datagram=True)
        if found.by_waypoint:
            self._tell("services", str(to), "a waypoint's instances", "no waypoint takes datagrams")
            return found._replace(reason=Reason.WAYPOINT_UNSUPPORTED, rewrite=False)
        return found

    def choose_datagram(self, to: Destination, client: Client) -> Choice:
        """For sendto() of a socket that is not connected (bpf/datagram.h), and sends there first."""
        found = self.choose_connected_datagram(to, client)
        if found.rewrite and any(is_v4(to.ip) != is_v4(each.to.ip) for each in found.endpoints):
            self._tell("endpoints", str(to), "addresses of the other family", "sendto() cannot go there")
            return found._replace(reason=Reason.FAMILY, rewrite=False)
        return found

    def _find_service(self, to: Destination, client: Client, *, is_datagram: bool) -> _Service | Reason:
        """The service's port, or what becomes of a connection to what is none."""
        view, asked = self._view_of(client), SERVICE_KEY.pack(to.ip, client.network, port_bytes(to.port))
        exact = [SERVICE_KEY.pack(to.ip, view, port_bytes(to.port))] if view else []
        exact.append(asked)
        for key in exact:
            found = self._find_at(key)
            if found is not None:
                return found
        for key in exact:
            widened = self._widen(key)
            found = None if widened is None else self._find_at(widened)
            if found is not None:
                return found
        verdict, by_waypoint = self._unserved_verdict(asked), None
        if verdict is Reason.WAYPOINT_UNAVAILABLE:  # a workload's
            if is_datagram:
                self._tell("addresses", str(to), "a workload's with a waypoint", "datagrams go past it")
                return Reason.ROUTED
            by_waypoint = self._read_service(SERVICE_KEY.pack(to.ip, client.network, port_bytes(0)))
        return by_waypoint or verdict

    def _find_at(self, key: bytes) -> _Service | Reason | None:
        """None where no service is."""
        service = self._read_service(key)
        if service is not None:
            return service
        is_service = self._read_address(key).kind == AddressKind.SERVICE
        return self._unserved_verdict(key) if is_service else None

    def _view_of(self, client: Client) -> int:
        """The network in which the client's namespace sees services that others do not; 0: none."""
        switch = self._tables.get("switches", SWITCH_KEY.pack(Switch.VIEWS))
        if client.ip is None or switch is None or not any(switch):
            return 0
        own = self._read_address(SERVICE_KEY.pack(client.ip, client.network, port_bytes(0)))
        if not own.view:
            return 0
        self._tell(
            "addresses",
            f"{ip_to_text(client.ip)}{in_network(client.network)}",
            f"{_WHOSE.get(own.kind, f'kind {own.kind}')}, who has it looks in network {own.view:08x} first",
            "its namespace sees services that others do not",
        )
        return own.view

    def _read_service(self, key: bytes) -> _Service | None:
        ip, network, port = SERVICE_KEY.unpack(key)
        asked = f"{Destination(ip, port_number(port))}{in_network(network)}"
        value = self._tables.get("services", key)
        if value is None:
            self._tell("services", asked, NOTHING, "no port of a service")
            return None
        if not value.startswith(key):
            self._tell("services", asked, "an entry of another key", "as if there were none")
            return None
        number, endpoints, verdict, flags, affinity_s = SERVICE_VALUE.unpack(value)
        found = _Service(number, endpoints, Reason(verdict), ServiceFlag(flags))
        means = _means(found.verdict) if found.verdict is not Reason.ROUTED else _drawn(found, affinity_s)
        if found.verdict is Reason.ROUTED and not endpoints:
            means = _means(Reason.NO_ENDPOINT)
        self._tell(
            "services",
            asked,
            f"list {number:016x}, {endpoints} endpoints, {found.verdict.label}"
            + (f", {flag_text(flags)}" if flags else ""),
            means,
        )
        return found

    def _read_address(self, key: bytes) -> _Address:
        """Of the address and the network in a key of `services`; kind 0 when it is unknown."""
        ip, network, _ = SERVICE_KEY.unpack(key)
        key = ADDRESS_KEY.pack(ip, network)
        value = self._tables.get("addresses", key)
        if value is None:
            return _Address()
        if not value.startswith(key):
            return _Address(AddressKind.SERVICE)
        kind, verdict, view = ADDRESS_VALUE.unpack(value)
        return _Address(kind, Reason(verdict), view)

    def _widen(self, key: bytes) -> bytes | None:
        ip, network, port = SERVICE_KEY.unpack(key)
        asked = f"{ip_to_text(ip)}{in_network(network)}"
        value = self._tables.get("ranges", RANGE_KEY.pack(160, network, ip))
        if value is None:
            self._tell("ranges", asked, NOTHING, "in no range of a service")
            return None
        first, own_network = RANGE_VALUE.unpack(value)
        if is_v4(first) != is_v4(ip):
            self._tell("ranges", asked, "a range of the other family", "in no range of a service")
            return None
        found = f"the range that begins with {ip_to_text(first)}, as network {own_network:08x}"
        self._tell("ranges", asked, found, "the range's service is looked for")
        return SERVICE_KEY.pack(first, own_network, port)

    def _unserved_verdict(self, key: bytes) -> Reason:
        ip, network, _ = SERVICE_KEY.unpack(key)
        asked = f"{ip_to_text(ip)}{in_network(network)}"
        kind, verdict, _ = self._read_address(key)
        if not kind:
            self._tell("addresses", asked, NOTHING, "not of the mesh: left alone")
            return Reason.ROUTED
        of_service = kind == AddressKind.SERVICE
        found = f"{_WHOSE.get(kind, f'kind {kind}')}, {verdict.label}"
        if of_service and verdict is Reason.ROUTED:
            verdict = Reason.NO_PORT
        means = "left alone" if verdict is Reason.ROUTED else _means(verdict)
        self._tell("addresses", asked, found, means)
        return verdict

    def _read_endpoint(self, service: int, slot: int) -> tuple[Destination, int, int] | None:
        """Where it is, and of 2^32 draws the slot that others go to, and how many stay (0: all)."""
        value = self._tables.get("endpoints", ENDPOINT_KEY.pack(service, slot))
        if value is None:
            return None
        owner, ip, port = ENDPOINT_VALUE.unpack(value)
        other, share = ENDPOINT_SHARE.unpack(value)
        return (Destination(ip, port_number(port)), other, share) if owner == service else None

    def _endpoints(self, service: int, count: int) -> tuple[Endpoint, ...]:
        """Every slot that may be drawn (`draw_endpoint`), with its share of the draws that succeed."""
        count = min(count, self._slots_max)
        slots = {slot: self._read_endpoint(service, slot) for slot in range(count)}
        shares: defaultdict[int, float] = defaultdict(float)
        for slot, drawn in list(slots.items()):
            if drawn is None:
                continue
            _, other, share = drawn
            stays = share / _WHOLE if share else 1.0
            shares[slot] += stays / count
            if stays < 1:
                shares[other] += (1 - stays) / count
                slots.setdefault(other, self._read_endpoint(service, other))
        held = {slot: drawn[0] for slot, drawn in slots.items() if drawn is not None and shares[slot]}
        whole = sum(shares[slot] for slot in held)
        lost = sum(drawn is None for drawn in slots.values())
        what = f"{len(held)} endpoints" + (f", {lost} slots that are not the list's" if lost else "")
        means = "one is drawn" if held else _means(Reason.ENDPOINT_VANISHED)
        self._tell("endpoints", f"list {service:016x}", what, means)
        return tuple(Endpoint(slot, to, shares[slot] / whole) for slot, to in held.items())


_WHOSE: Final = {
    int(AddressKind.SERVICE): "a service's",
    int(AddressKind.WORKLOAD): "a workload's",
}


def _drawn(service: _Service, affinity_s: int) -> str:
    how = "an endpoint is drawn"
    if service.flags & ServiceFlag.LEAST_CONNECTIONS:
        how = "of two endpoints drawn the one with fewer open connections is taken"
    return f"{how}; a client keeps its own for {affinity_s} s" if affinity_s else how


def _means(verdict: Reason) -> str:
    return "left alone" if verdict is Reason.PASSTHROUGH else f"refused: {verdict.label}"


def _is_loopback(ip: Ip) -> bool:
    """Also no address at all, which means the same."""
    if is_v4(ip):
        return ip[12] == 127 or ip[12:] == bytes(4)
    return ip[:15] == bytes(15) and ip[15] <= 1


def _is_link_local(ip: Ip) -> bool:
    return ip[0] == 0xFE and ip[1] & 0xC0 == 0x80
