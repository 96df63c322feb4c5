"""The decision of the programs, told step by step with the entries that decide: bpf/choose.h in Python.

Pure: it is given what the maps say. Each function here is the one of the same name there, so a change
there is one here; tests/mesh/test_explain.py holds both against each other.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final, NamedTuple, Protocol

from pykmesh.kernel.layout import AddressKind, Reason
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
    Ip,
    ip_to_text,
    is_v4,
    port_bytes,
    port_number,
)

SLOTS_MAX: Final = 1 << 20
"""More slots of a list are not looked at: no map has room for them."""
_WHOLE: Final = 1 << 32


class Tables(Protocol):
    """The maps by name. In `ranges` the longest prefix that a key has is found."""

    def get(self, name: str, key: bytes) -> bytes | None: ...


class Destination(NamedTuple):
    ip: Ip
    port: int

    def __str__(self) -> str:
        text = ip_to_text(self.ip)
        return f"[{text}]:{self.port}" if ":" in text else f"{text}:{self.port}"


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

    @property
    def is_refusal(self) -> bool:
        return self.reason not in (Reason.ROUTED, Reason.PASSTHROUGH)


class _Service(NamedTuple):
    id: int
    endpoints: int
    verdict: Reason


NOTHING: Final = "nothing"


class Chooser:
    """One decision; `steps` has those that were taken."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.steps: list[Step] = []

    def _tell(self, name: str, asked: str, found: str, means: str) -> None:
        self.steps.append(Step(name, asked, found, means))

    def choose(self, to: Destination, network: int) -> Choice:
        """For connect(), of a client whose network has this id."""
        key = SERVICE_KEY.pack(to.ip, network, port_bytes(to.port))
        service = self._read_service(key)
        if service is None and (widened := self._widen(key)) is not None:
            key = widened
            service = self._read_service(key)
        if service is None:
            return Choice(self._unserved_verdict(key))
        if service.verdict is not Reason.ROUTED:
            return Choice(service.verdict, service=service.id)
        if not service.endpoints:
            return Choice(Reason.NO_ENDPOINT, service=service.id)
        endpoints = self._endpoints(service.id, service.endpoints)
        if not endpoints:
            return Choice(Reason.ENDPOINT_VANISHED, service=service.id)
        return Choice(Reason.ROUTED, rewrite=True, service=service.id, endpoints=endpoints)

    def choose_datagram(self, to: Destination, network: int) -> Choice:
        """For sendto() of a socket that is not connected (bpf/datagram.h), and sends there first."""
        found = self.choose(to, network)
        if found.rewrite and any(is_v4(to.ip) != is_v4(each.to.ip) for each in found.endpoints):
            self._tell("endpoints", str(to), "addresses of the other family", "sendto() cannot go there")
            return found._replace(reason=Reason.FAMILY, rewrite=False)
        return found

    def _read_service(self, key: bytes) -> _Service | None:
        ip, network, port = SERVICE_KEY.unpack(key)
        asked = f"{Destination(ip, port_number(port))}{_in_network(network)}"
        value = self._tables.get("services", key)
        if value is None:
            self._tell("services", asked, NOTHING, "no port of a service")
            return None
        if not value.startswith(key):
            self._tell("services", asked, "an entry of another key", "as if there were none")
            return None
        number, endpoints, verdict = SERVICE_VALUE.unpack(value)
        found = _Service(number, endpoints, Reason(verdict))
        means = _means(found.verdict) if found.verdict is not Reason.ROUTED else "an endpoint is drawn"
        if found.verdict is Reason.ROUTED and not endpoints:
            means = _means(Reason.NO_ENDPOINT)
        self._tell(
            "services", asked, f"list {number:016x}, {endpoints} endpoints, {found.verdict.label}", means
        )
        return found

    def _read_address(self, key: bytes) -> tuple[int, Reason] | None:
        value = self._tables.get("addresses", key)
        if value is None:
            return None
        if not value.startswith(key):
            return AddressKind.SERVICE, Reason.ROUTED
        kind, verdict = ADDRESS_VALUE.unpack(value)
        return kind, Reason(verdict)

    def _widen(self, key: bytes) -> bytes | None:
        ip, network, port = SERVICE_KEY.unpack(key)
        asked = f"{ip_to_text(ip)}{_in_network(network)}"
        value = self._tables.get("ranges", RANGE_KEY.pack(160, network, ip))
        if value is None:
            self._tell("ranges", asked, NOTHING, "in no range of a service")
            return None
        first, own_network = RANGE_VALUE.unpack(value)
        found = f"the range that begins with {ip_to_text(first)}, as network {own_network:08x}"
        known = self._read_address(ADDRESS_KEY.pack(ip, network))
        if known is not None and known[0] == AddressKind.SERVICE:
            self._tell("ranges", asked, found, "not used: the address is a service's by itself")
            return None
        self._tell("ranges", asked, found, "the range's service is looked for")
        return SERVICE_KEY.pack(first, own_network, port)

    def _unserved_verdict(self, key: bytes) -> Reason:
        ip, network, _ = SERVICE_KEY.unpack(key)
        asked = f"{ip_to_text(ip)}{_in_network(network)}"
        known = self._read_address(ADDRESS_KEY.pack(ip, network))
        if known is None:
            self._tell("addresses", asked, NOTHING, "not of the mesh: left alone")
            return Reason.ROUTED
        kind, verdict = known
        of_service = kind == AddressKind.SERVICE
        found = f"a {'service' if of_service else 'workload'}'s, {verdict.label}"
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
        count = min(count, SLOTS_MAX)
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


def _in_network(network: int) -> str:
    return f" in network {network:08x}" if network else ""


def _means(verdict: Reason) -> str:
    return "left alone" if verdict is Reason.PASSTHROUGH else f"refused: {verdict.label}"
