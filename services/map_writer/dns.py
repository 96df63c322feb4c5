"""What a name stands for, in the eyes of a client: ztunnel's rules (xDS of the workload API, ambient DNS).

From the mesh to addresses. What is no service's name here is for the server that was asked, which is reached
as the maps say: the programs do not see how dns_proxy asks it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final, NamedTuple

from pykmesh.contracts import messages
from pykmesh.contracts.address import Families, Service, Workload
from pykmesh.contracts.messages import DnsOutcome, DnsReply, DnsRequest
from pykmesh.kernel.explain import Chooser, Client, Tables
from pykmesh.kernel.records import IP_BYTES, Destination, Ip, is_v4, network_id
from services.map_writer.directory import Directory
from services.map_writer.follower import Follower
from services.map_writer.mesh import Mesh, place_of

DNS_PORT: Final = 53
ADDRESSES_MAX: Final = 1024
"""Addresses of one answer: of IPv6 about 29 KiB. Of a headless service with more a part is drawn."""
UPSTREAMS_MAX: Final = 16
SLOTS_MAX: Final = 256
"""Of more endpoints of a server the first ones are drawn from."""


class Candidate(NamedTuple):
    """A name that may be meant. `stripped` is what is left of the asked one without a search domain."""

    name: str
    stripped: str = ""


class Meaning(NamedTuple):
    """Addresses, perhaps none: the name is known all the same. `alias` is the name that they stand at."""

    addresses: list[Ip]
    alias: str = ""


def candidates(name: str, namespace: str, domain: str) -> Iterator[Candidate]:
    """In the order in which they count; a name may come twice."""
    yield Candidate(name)
    for expanded in _expanded(name, namespace, domain):
        yield Candidate(expanded)
    for search in (f"{namespace}.svc.{domain}", f"svc.{domain}", domain):
        if name.endswith(f".{search}"):
            stripped = name.removesuffix(f".{search}")
            for found in (stripped, *_expanded(stripped, namespace, domain)):
                yield Candidate(found, stripped)


def _expanded(name: str, namespace: str, domain: str) -> Iterator[str]:
    """The names of Kubernetes services that a short one may mean."""
    labels = name.split(".")
    if name.endswith(f".svc.{domain}"):
        return
    if len(labels) == 1:
        yield f"{name}.{namespace}.svc.{domain}"
    elif len(labels) == 2:
        yield f"{name}.svc.{domain}"
        yield f"{name}.{namespace}.svc.{domain}"
    elif labels[-1] == "svc":
        yield f"{name}.{domain}"
        if len(labels) == 3:
            yield f"{name}.svc.{domain}"
    elif len(labels) == 3:
        yield f"{name}.svc.{domain}"


def _with_wildcards(name: str) -> Iterator[str]:
    """The name, then the wildcards that it falls under, the longest first."""
    yield name
    _, _, parent = name.partition(".")
    while parent:
        yield f"*.{parent}"
        _, _, parent = parent.partition(".")


def look_up(
    mesh: Mesh, directory: Directory, client: Workload, name: str, domain: str, *, is_6: bool
) -> Meaning | None:
    """What a client means by a name in lower case, without the last dot; None: nothing of the mesh.

    What has no address means nothing, unless it is a headless Kubernetes Service.
    """
    for candidate in candidates(name, client.namespace, domain):
        for hostname in _with_wildcards(candidate.name):
            is_kubernetes = hostname.endswith(f".svc.{domain}")
            found = (s for s in directory.services(mesh, hostname) if s.vips or is_kubernetes)
            service = _preferred(found, client.namespace)
            if service is None:
                continue
            alias = "" if hostname.startswith("*.") else candidate.stripped
            return Meaning(_addresses(mesh, service, client, is_6=is_6), alias)
    return None


def _preferred(services: Iterator[Service], namespace: str) -> Service | None:
    """Of the services of one hostname that a namespace sees: its own, a canonical one, the first."""
    seen = (service for service in services if not service.hidden or service.namespace == namespace)
    return min(seen, key=lambda s: (s.namespace != namespace, not s.canonical, s.name), default=None)


def _addresses(mesh: Mesh, service: Service, client: Workload, *, is_6: bool) -> list[Ip]:
    if service.families is (Families.V4 if is_6 else Families.V6):
        return []
    found: Iterator[Ip]
    if service.vips:
        found = (ip for network, ip in service.vips if network == client.network)
    else:
        found = _endpoints(mesh, service, client.network)
    unique = list(dict.fromkeys(ip for ip in found if is_v4(ip) != is_6))
    return unique if len(unique) <= ADDRESSES_MAX else random.sample(unique, ADDRESSES_MAX)


def _endpoints(mesh: Mesh, service: Service, network: str) -> Iterator[Ip]:
    """Addresses of a headless service's workloads. What is in groups is healthy, and stays undecoded."""
    groups = mesh.ordinary_members.get(service.name)
    if groups is not None:
        own = (group.addresses for group in groups if group.network == network)
        yield from (Ip(ips[at : at + IP_BYTES]) for ips in own for at in range(0, len(ips), IP_BYTES))
        return
    for member in mesh.members_of(service.name):
        if (member.healthy or service.allows_unhealthy) and member.network == network:
            yield from mesh.addresses_of(member)


class Dns:
    """Answers dns_proxy. Reads the state that the loop owns, and the maps; never changes them."""

    def __init__(self, follower: Follower, maps: Tables, directory: Directory, domain: str) -> None:
        self._follower = follower
        self._maps = maps
        self._directory = directory
        self._domain = domain

    async def answer(self, data: bytes) -> bytes:
        """What comes too early is for the server that was asked. Raises ContractError."""
        return messages.encode(self._answer(messages.decode(DnsRequest, data)))

    def _answer(self, request: DnsRequest) -> DnsReply:
        mesh = self._follower.mesh
        if not self._follower.synced:
            return DnsReply(messages.VERSION, DnsOutcome.NOT_READY)
        places = (place_of(request.network, Ip(ip)) for ip in request.client)
        client = next(filter(None, map(mesh.pod_at, places)), None)
        upstreams = self._upstreams(request)
        if not request.name:
            return DnsReply(messages.VERSION, DnsOutcome.FORWARD, "", [], upstreams)
        if client is None:
            return DnsReply(messages.VERSION, DnsOutcome.UNKNOWN_CLIENT, "", [], upstreams)
        found = look_up(mesh, self._directory, client, request.name, self._domain, is_6=request.is_6)
        if found is None:
            return DnsReply(messages.VERSION, DnsOutcome.FORWARD, "", [], upstreams)
        addresses: list[bytes] = [*found.addresses]
        return DnsReply(messages.VERSION, DnsOutcome.ANSWER, found.alias, addresses, upstreams)

    def _upstreams(self, request: DnsRequest) -> list[tuple[bytes, int]] | None:
        """Where the server is asked; None: at its own address. Nowhere where it is refused to this client.

        It is what becomes of a datagram socket of the client's that connects there.
        """
        address = Ip(request.client[0]) if request.client else None
        client, server = (
            Client(network_id(request.network), address),
            Destination(Ip(request.server), DNS_PORT),
        )
        choice = Chooser(self._maps, SLOTS_MAX).choose_connected_datagram(server, client)
        if not choice.rewrite:
            return [] if choice.is_refusal else None
        chosen = random.sample(choice.endpoints, min(len(choice.endpoints), UPSTREAMS_MAX))
        return [(endpoint.to.ip, endpoint.to.port) for endpoint in chosen]
