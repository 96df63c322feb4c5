"""`pykmesh explain`: what the kernel's programs do with a connection, and by which entries.

The decision is read from the maps alone. map_writer, where it is there, knows the names.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

import click

from pykmesh.cli.output import escaped, table
from pykmesh.kernel import pins
from pykmesh.kernel.explain import NOTHING, Choice, Chooser, Client, Endpoint, Step
from pykmesh.kernel.hooks import HOOKS, count_pinned
from pykmesh.kernel.layout import Reason
from pykmesh.kernel.maps import PinError, PinnedMap
from pykmesh.kernel.records import (
    NO_IP,
    POD_KEY,
    POD_VALUE,
    Destination,
    Ip,
    ip_from_text,
    ip_to_text,
    network_id,
)
from pykmesh.node.ask import fetch, find
from pykmesh.node.instance import Instance

SHOWN: Final = 20
TIMEOUT_S: Final = 30.0
PORT_MAX: Final = 65535
MAPS: Final = (
    "services",
    "endpoints",
    "addresses",
    "ranges",
    "pods",
    "switches",
    "dns_listeners",
    "dns_servers",
)
REFUSED, CONNECTED, LEFT_ALONE, ANSWERED = "refused", "connected", "left alone", "answered"
DNS_PROXY: Final = "dns_proxy"
NOT_ENROLLED: Final = "not enrolled"
_OF_MEMBERS: Final = ("uid", "name", "healthy", "weight", "locality", "matches")
_PARTS: Final = ("region", "zone", "subzone", "node")
Entry = dict[str, Any]


class BadInputError(click.ClickException):
    """What was asked for cannot be explained; the text says why."""

    exit_code = 2


class Pinned:
    """The pinned maps, as `Tables`."""

    def __init__(self, instance: Instance) -> None:
        try:
            self._maps = {name: PinnedMap(pins.maps_dir(instance.pin_dir), name) for name in MAPS}
        except PinError as error:
            raise BadInputError(str(error)) from error

    def get(self, name: str, key: bytes) -> bytes | None:
        return self._maps[name].get(key)

    def pods(self) -> list[Pod]:
        found = []
        for key, value in self._maps["pods"].items():
            address4, address6, network, cgroup_id = POD_VALUE.unpack(value)
            addresses = [Ip(ip) for ip in (address4, address6) if ip != NO_IP]
            found.append(Pod(POD_KEY.unpack(key)[0], addresses, network, cgroup_id))
        return sorted(found)


class Pod(NamedTuple):
    """An entry of `pods`."""

    cookie: int
    addresses: list[Ip]
    network: int
    cgroup_id: int

    def __str__(self) -> str:
        return ", ".join(map(ip_to_text, self.addresses)) or f"namespace {self.cookie}"


class Names:
    """map_writer, asked for names. BadInputError where they are needed and it is away."""

    def __init__(self, instance: Instance) -> None:
        self._port = instance.ports.map_writer

    def ask(self, **query: str) -> Any:
        try:
            return fetch(self._port, f"/lookup?{urlencode(query)}", TIMEOUT_S)
        except OSError as error:
            (name,) = query.values()
            why = error.strerror or error
            raise BadInputError(f"{name!r} is a name, and map_writer does not answer: {why}") from error

    def members(self, list_id: int) -> Entry | None:
        """Who is behind a list of endpoints; None where that cannot be told."""
        try:
            found: Entry | None = self.ask(list=f"{list_id:016x}")
        except BadInputError:
            return None
        return found


def _address(text: str) -> Ip | None:
    try:
        return ip_from_text(str(ipaddress.ip_address(text)))
    except ValueError:
        return None


def source(text: str, tables: Pinned, names: Names) -> tuple[str, Pod | None]:
    """How it is called, and its entry; None for one that is not enrolled here."""
    pods = tables.pods()
    if text == "-":
        if not pods:
            raise BadInputError("no pod is enrolled: name a source")
        return "any enrolled pod", pods[0]
    if (ip := _address(text)) is not None:
        return text, next((pod for pod in pods if ip in pod.addresses), None)
    found = names.ask(workload=text)
    if len(found) != 1:
        what = "several workloads are" if found else "no workload is"
        raise BadInputError(f"{what} called {text!r} {[each['uid'] for each in found] or ''}".rstrip())
    ips = [ip_from_text(address) for address in found[0]["addresses"]]
    pod = next((pod for pod in pods if not set(ips).isdisjoint(pod.addresses)), None)
    return f"{found[0]['name']} ({', '.join(found[0]['addresses'])})", pod


def destination(text: str, network: int, names: Names) -> tuple[str, list[Destination]]:
    """How it is called, and its addresses: a service may have several."""
    host, _, digits = text.rpartition(":")
    if not host or not digits.isdecimal() or not 0 < int(digits) <= PORT_MAX:
        raise BadInputError(f"destination {text!r}: ADDRESS:PORT, [IPV6]:PORT or SERVICE:PORT")
    port = int(digits)
    if (ip := _address(host.removeprefix("[").removesuffix("]"))) is not None:
        if ":" in host and not host.startswith("["):
            raise BadInputError(f"destination {text!r}: write an IPv6 address as [{host}]:{port}")
        return "", [Destination(ip, port)]
    found = names.ask(service=host)
    if len(found) != 1:
        what = "several services are" if found else "no service is"
        raise BadInputError(f"{what} called {host!r} {[each['service'] for each in found] or ''}".rstrip())
    ips = [ip_from_text(ip) for name, ip in found[0]["addresses"] if network_id(name) == network]
    if not ips:
        raise BadInputError(f"service {found[0]['service']} has no address in the source's network")
    return found[0]["service"], [Destination(ip, port) for ip in ips]


def enrolment(instance: Instance, pod: Pod | None, asked: str) -> list[Step]:
    """Whether the programs see the connections of a pod."""
    if pod is None:
        return [Step("pods", asked, NOTHING, "not enrolled: its connections meet no program")]
    where = f"namespace {pod.cookie}, cgroup {pod.cgroup_id}"
    steps = [Step("pods", str(pod), where, "enrolled")]
    links = next(
        (
            links
            for links in pins.read_links(pins.links_dir(instance.pin_dir)).cgroups
            if links.cgroup_id == pod.cgroup_id
        ),
        None,
    )
    count = count_pinned(links.path) if links else 0
    means = "its connections are decided here" if count == len(HOOKS) else "NOT all hooks are there"
    return [*steps, Step("links", f"cgroup {pod.cgroup_id}", f"{count} of {len(HOOKS)} programs", means)]


def explain(instance: Instance, source_text: str, destination_text: str, protocol: str) -> Entry:
    """All that is known of it, as JSON has it. BadInputError."""
    instance = find(instance) or instance
    tables, names = Pinned(instance), Names(instance)
    src, pod = source(source_text, tables, names)
    dst, (to, *others) = destination(destination_text, pod.network if pod else 0, names)
    chooser = Chooser(tables)
    try:
        is_question = pod is not None and chooser.is_question(to, pod.cookie, time.monotonic_ns())
        choice = Choice(Reason.ROUTED) if is_question else _choose(chooser, pod, to, protocol)
    except ValueError as error:
        raise BadInputError(f"the maps hold what this version does not know: {error}") from error
    service = names.members(choice.service) if choice.service else None
    outcome = REFUSED if choice.is_refusal else CONNECTED if choice.rewrite else LEFT_ALONE
    return {
        "source": src,
        "destination": str(to),
        "service": dst,
        "other_addresses": list(map(str, others)),
        "protocol": protocol,
        "enrolled": pod is not None,
        "outcome": ANSWERED if is_question else outcome,
        "reason": NOT_ENROLLED if pod is None else DNS_PROXY if is_question else choice.reason.label,
        "steps": [step._asdict() for step in enrolment(instance, pod, src) + chooser.steps],
        "endpoints": _endpoints(choice.endpoints, service),
        "members": service,
    }


def _choose(chooser: Chooser, pod: Pod | None, to: Destination, protocol: str) -> Choice:
    if pod is None:
        return Choice(Reason.ROUTED)
    client = Client(pod.network, pod.addresses[0] if pod.addresses else None)
    if protocol == "udp":
        return chooser.choose_datagram(to, client)
    return chooser.choose(to, client)


def _endpoints(endpoints: Sequence[Endpoint], service: Entry | None) -> list[Entry]:
    members: Sequence[Entry] = service["members"] if service else ()
    last = sorted(members, key=lambda member: member["unused"] is None)  # of several at one place it counts
    by_endpoint = {(ip, member["port"]): member for member in last for ip in member["addresses"]}
    return [
        {
            "slot": slot,
            "endpoint": str(to),
            "percent": round(share * 100, 2),
            **{name: by_endpoint.get((ip_to_text(to.ip), to.port), {}).get(name) for name in _OF_MEMBERS},
        }
        for slot, to, share in endpoints
    ]


def tell(found: Entry) -> None:
    """For people."""
    to = " ".join(filter(None, (found["service"], found["destination"])))
    click.echo(escaped(f"{found['source']} -> {to} ({found['protocol']})") + "\n")
    steps = [list(step.values()) for step in found["steps"]]
    click.echo(table(("MAP", "ASKED FOR", "FOUND", "MEANS"), steps) + "\n")
    if found["endpoints"]:
        rows = [
            (e["endpoint"], f"{e['percent']} %", e["slot"], e["name"], e["healthy"], e["locality"])
            for e in found["endpoints"][:SHOWN]
        ]
        click.echo(table(("ENDPOINT", "SHARE", "SLOT", "WORKLOAD", "HEALTHY", "LOCALITY"), rows))
        _tell_more(len(found["endpoints"]))
        click.echo()
    if found["members"]:
        _tell_members(found["members"])
    if found["other_addresses"]:
        click.echo(f"also at {', '.join(found['other_addresses'])}")
    click.echo(f"{found['outcome']}: {found['reason']}")


def _tell_members(service: Entry) -> None:
    click.echo(escaped(f"{service['service']} port {service['port']} IPv{service['family']}"))
    if service["scopes"] and service["mode"] in ("STRICT", "FAILOVER"):
        here = "/".join(filter(None, (service["here"][part] for part in _PARTS)))
        click.echo(escaped(f"{service['mode']} by {', '.join(service['scopes'])}; this node: {here or '-'}"))
    left = [member for member in service["members"] if member["unused"] is not None]
    for member in left[:SHOWN]:
        click.echo(escaped(f"not used: {member['name']}: {member['unused']}"))
    _tell_more(len(left))
    click.echo()


def _tell_more(count: int) -> None:
    if count > SHOWN:
        click.echo(f"and {count - SHOWN} more (-o json has them)")
