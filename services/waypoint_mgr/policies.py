"""AuthorizationPolicies as Envoy's RBAC filters, for one port of a service. Pure.

Istio's rules: what any DENY policy matches is refused; where there are ALLOW policies, what none of them
matches is refused, too. What cannot be honoured makes a policy stricter, never laxer: in an ALLOW policy it
matches nothing, in a DENY policy everything. So does a client whom nobody knows, where it is asked who he is.

Who a client is Envoy sees in the address that it is told of a connection (contracts.handoff).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

import msgspec

from pykmesh.contracts.address import PORT_MAX
from pykmesh.contracts.handoff import (
    ALL_BITS,
    NAMESPACE_BITS,
    NO_SERVICE_SECRET,
    NOBODY,
    SERVICE_BITS,
    Identity,
    told_address,
)
from pykmesh.contracts.waypoints import account_name
from pykmesh.kernel.records import Ip, ip_from_text, ip_to_text
from pykmesh.manifests.authorization_policy import Action, Operation, Rule, Source, When
from pykmesh.manifests.objects import Gateway, ObjectRef, ref_of
from services.waypoint_mgr.admission import turned_away
from services.waypoint_mgr.attachments import (
    ACCEPTED,
    PARTIALLY_INVALID,
    UNSUPPORTED_VALUE,
    Condition,
    Mesh,
    targeted,
)
from services.waypoint_mgr.envoy import (
    Json,
    Port,
    closing_chain,
    everybodys,
    http_chain,
    network_rbac,
    rbac,
    tcp_chain,
)
from services.waypoint_mgr.source import Authentication, Objects, Policy
from services.waypoint_mgr.tokens import claim, claim_of, principal, text_match

ENFORCED: Final = "Enforced"

_ANY: Final[Json] = {"any": True}
_MAPPED_BITS: Final = 96
_PRINCIPAL: Final = re.compile(r"(?P<domain>[^/*]+)/ns/(?P<namespace>[^/*]+)/(sa/(?P<account>[^/*]+|\*)|\*)")
_OWN_DOMAIN: Final = "cluster.local"
"""What policies call the mesh's own trust domain, whatever it is. Of others no client is known."""
_HEADER: Final = re.compile(r"request\.headers\[(.+)\]")


class Clients(msgspec.Struct, frozen=True):
    """What connections are told by: ids of the namespaces and service accounts that policies name.

    `family`: of the addresses that Envoy sees of clients, that at which it listens (4 or 6); 0: of both.
    `service_secret`: with which IPv6 services' addresses are hashed.
    """

    namespaces: Mapping[str, bytes] = {}
    accounts: Mapping[str, bytes] = {}
    family: int = 0
    service_secret: bytes = NO_SERVICE_SECRET


class Names(msgspec.Struct, frozen=True):
    """What policies name of clients."""

    namespaces: frozenset[str] = frozenset()
    accounts: frozenset[str] = frozenset()


def names_in(policies: Iterable[Policy]) -> Names:
    namespaces, accounts = set[str](), set[str]()
    for policy in policies:
        for namespace, account in _clients_of(policy):
            namespaces.add(namespace)
            if account:
                accounts.add(account)
    return Names(frozenset(namespaces), frozenset(accounts))


def _clients_of(policy: Policy) -> Iterator[_Client]:
    for rule in policy.spec.rules:
        for source in (one.source for one in rule.from_):
            for _, matched, unmatched, read in _identities_of(source):
                yield from filter(
                    None, (read(value, policy.ref.namespace) for value in (*matched, *unmatched))
                )
        for when in rule.when:
            if (by_key := _IDENTITIES.get(when.key)) is not None:
                values = (*when.values, *when.not_values)
                yield from filter(None, (by_key(value, policy.ref.namespace) for value in values))


_Client = tuple[str, str]
"""A namespace and a service account in it; "" for all of the namespace."""
_ReadClient = Callable[[str, str], _Client | None]
"""From a value and the policy's own namespace; None for a pattern that cannot be honoured."""


def _by_principal(value: str, _: str) -> _Client | None:
    found = _PRINCIPAL.fullmatch(value.removeprefix("spiffe://"))
    if found is None or found["domain"] != _OWN_DOMAIN:
        return None
    namespace, account = found["namespace"], found["account"] or "*"
    return namespace, "" if account == "*" else account_name(namespace, account)


def _by_namespace(value: str, _: str) -> _Client | None:
    return None if "*" in value else (value, "")


def _by_service_account(value: str, own: str) -> _Client | None:
    namespace, _, account = value.rpartition("/")
    return None if "*" in value else (namespace or own, account_name(namespace or own, account))


def _by_trust_domain(_: str, __: str) -> None:
    """Whoever is known is of the mesh's own."""


_IDENTITIES: Final[Mapping[str, _ReadClient]] = {
    "source.principal": _by_principal,
    "source.namespace": _by_namespace,
    "source.serviceAccount": _by_service_account,
}


def _identities_of(source: Source) -> tuple[tuple[str, Sequence[str], Sequence[str], _ReadClient], ...]:
    """The fields that ask who a client is: name, values, those that must not be, and how they are read."""
    return (
        ("principals", source.principals, source.not_principals, _by_principal),
        ("namespaces", source.namespaces, source.not_namespaces, _by_namespace),
        ("serviceAccounts", source.service_accounts, source.not_service_accounts, _by_service_account),
        ("trustDomains", source.trust_domains, source.not_trust_domains, _by_trust_domain),
    )


class _Words(NamedTuple):
    """Envoy has two languages for conditions: one for clients' addresses, one for the rest."""

    all: str
    any: str
    none: str
    parts: str

    def both(self, parts: Sequence[Json]) -> Json:
        """All of them; without one, everything."""
        if len(parts) < 2:
            return parts[0] if parts else _ANY
        return {self.all: {self.parts: list(parts)}}

    def one_of(self, parts: Iterable[Json]) -> Json:
        """Without one, nothing."""
        found = list(parts)
        if len(found) < 2:
            return found[0] if found else self.no(_ANY)
        return {self.any: {self.parts: found}}

    def no(self, part: Json) -> Json:
        return {self.none: part}


_PERMISSION: Final = _Words("andRules", "orRules", "notRule", "rules")
_ADDRESS: Final = _Words("andIds", "orIds", "notId", "ids")


class Guard:
    """The policies of a waypoint: of which it makes what, and what their authors are told."""

    def __init__(self, waypoint: Gateway, mesh: Mesh, policies: Sequence[Policy], clients: Clients) -> None:
        self._waypoint = waypoint
        self._clients = clients
        self._of_all, self._of_services = targeted(policies, waypoint, mesh)
        self._dropped: dict[ObjectRef, dict[str, None]] = {}

    def http_chain(
        self,
        at: Port,
        vips: Sequence[str],
        access_log: bool,
        tracing: Json | None,
        before: Iterable[Json] = (),
        after: Iterable[Json] = (),
    ) -> Json:
        """`before` and `after`: filters about those that let in or not."""
        own = [rbac(rules) for rules in self._rules(at, vips, is_http=True)]
        return http_chain(
            at, everybodys(vips, self._clients.service_secret), access_log, [*before, *own, *after], tracing
        )

    def tcp_chains(
        self,
        at: Port,
        vips: Sequence[str],
        access_log: bool,
        target: str | list[Json],
        before: Sequence[Json] = (),
        *,
        is_by_source: bool = False,
    ) -> Iterator[Json]:
        """One for those whose first byte is to be waited for, one that closes what others begin."""
        rules = self._rules(at, vips, is_http=False)
        let_in, others = turned_away(rules, vips, self._clients.service_secret)
        if let_in:
            filters = [*before, *(network_rbac(at, one) for one in rules)]
            yield tcp_chain(at, let_in, access_log, target, filters, is_by_source=is_by_source)
        if others:
            yield closing_chain(at, others)

    def _rules(self, at: Port, vips: Sequence[str], *, is_http: bool) -> list[Json]:
        """Of the RBAC filters of a port's chain: what is denied is asked first."""
        policies = [*self._of_all, *(p for p in self._of_services if at.service in p.services)]
        enforced = [policy for policy in policies if not policy.not_enforced]
        denied, allowed = dict[str, Json](), dict[str, Json]()
        for policy in enforced:
            writer = _Writer(policy, at, [ip_from_text(vip) for vip in vips], self._clients, is_http=is_http)
            (denied if policy.denies else allowed).update(writer.policies())
            self._dropped.setdefault(policy.ref, {}).update(dict.fromkeys(writer.dropped))
        found: list[Json] = []
        if denied:
            found.append({"action": "DENY", "policies": denied})
        if not all(policy.denies for policy in enforced):
            found.append({"action": "ALLOW", "policies": allowed})
        return found

    def conditions(self) -> Iterator[Condition]:
        """After the chains of all ports are made."""
        parent = ref_of(self._waypoint)
        for policy in (*self._of_all, *self._of_services):
            yield Condition(policy.ref, parent, ACCEPTED, True, ACCEPTED)
            if why := policy.not_enforced:
                yield Condition(policy.ref, parent, ENFORCED, False, UNSUPPORTED_VALUE, why)
            if dropped := self._dropped.get(policy.ref):
                effect = "denies more" if policy.denies else "allows less"
                message = f"not honoured, so it {effect}: {'; '.join(dropped)}"
                yield Condition(policy.ref, parent, PARTIALLY_INVALID, True, UNSUPPORTED_VALUE, message)


def unenforced(objects: Objects, users: Mapping[str, Collection[str]]) -> dict[ObjectRef, str]:
    """Policies of which something is enforced by nobody, and why. `users`: of each waypoint, its services."""
    reached = {service for services in users.values() for service in services}
    classes = {gateway.spec.gateway_class_name for gateway in objects.waypoints.values()}
    found = {}
    both: tuple[Policy | Authentication, ...] = (*objects.policies, *objects.authentications)
    for policy in both:
        lost = [
            *(f"service {name}" for name in sorted(policy.services - reached)),
            *(f"Gateway {name}" for name in sorted(policy.waypoints - objects.waypoints.keys())),
            *(f"GatewayClass {name}" for name in sorted(policy.classes - classes)),
            *policy.unknown,
        ]
        if not policy.spec.targets:
            found[policy.ref] = "it has no targetRefs, and only waypoints enforce policies"
        elif lost:
            found[policy.ref] = f"no waypoint, and no service that goes by way of one: {', '.join(lost)}"
    return found


class _Writer:
    """Puts one policy into Envoy's words, and collects what is not honoured of it."""

    def __init__(
        self, policy: Policy, at: Port, vips: Sequence[Ip], clients: Clients, *, is_http: bool
    ) -> None:
        self._policy = policy
        self._denies = policy.denies
        self._at = at
        self._vips = vips
        self._clients = clients
        self._is_http = is_http
        self.dropped: list[str] = []
        if policy.spec.action is Action.CUSTOM:
            self.dropped.append("action CUSTOM (what it matches is denied)")

    def policies(self) -> dict[str, Json]:
        """Envoy's, by name: one for each source of each rule."""
        found: dict[str, Json] = {}
        for index, rule in enumerate(self._policy.spec.rules):
            sources: list[Source | None] = [one.source for one in rule.from_]
            for number, source in enumerate(sources or [None]):
                name = f"{self._policy.ref.namespace}/{self._policy.ref.name}[{index}][{number}]"
                found[name] = self._policy_of(rule, source)
        return found

    def _policy_of(self, rule: Rule, source: Source | None) -> Json:
        who, addresses, rest = list[Json](), list[Json](), list[Json]()
        if source is not None:
            self._source(source, who, addresses, rest)
        if rule.to:
            operations = (list(self._operation(one.operation)) for one in rule.to)
            rest.append(_PERMISSION.one_of(map(_PERMISSION.both, operations)))
        for when in rule.when:
            self._when(when, who, addresses, rest)
        if who:
            rest.append(self._known(who))
        return {"permissions": [_PERMISSION.both(rest)], "principals": [_ADDRESS.both(addresses)]}

    def _known(self, who: list[Json]) -> Json:
        """A client that is not known is refused, whatever is said of those that are."""
        unknown = _PERMISSION.one_of(self._told(vip, NOBODY, ALL_BITS) for vip in self._vips)
        if self._denies:
            return _PERMISSION.one_of([unknown, _PERMISSION.both(who)])
        return _PERMISSION.both([_PERMISSION.no(unknown), *who])

    def _source(self, source: Source, who: list[Json], addresses: list[Json], rest: list[Json]) -> None:
        for name, matched, unmatched, read in _identities_of(source):
            who += self._pair(name, matched, unmatched, self._client(read))
        # "Remote" addresses are what a header says, which nobody vouches for.
        for name, ranges, others, read_range in (
            ("ipBlocks", source.ip_blocks, source.not_ip_blocks, self._peer),
            ("remoteIpBlocks", source.remote_ip_blocks, source.not_remote_ip_blocks, _nothing),
        ):
            addresses += self._pair(name, ranges, others, read_range, _ADDRESS)
        principals = source.request_principals, source.not_request_principals
        rest += self._pair("requestPrincipals", *principals, principal if self._is_http else _nothing)

    def _client(self, read: _ReadClient) -> _Read:
        """What matches a client of a principal, namespace or account; "*" is whoever is known."""

        def match(value: str) -> Json | None:
            if value == "*" or (read is _by_trust_domain and value == _OWN_DOMAIN):
                return _ANY
            found = read(value, self._policy.ref.namespace)
            if found is None:
                return None
            namespace, account = found
            namespace_id = self._clients.namespaces.get(namespace)
            account_id = self._clients.accounts.get(account) if account else NOBODY.account
            if namespace_id is None or account_id is None:
                return None  # not numbered yet
            client, bits = Identity(namespace_id, account_id), ALL_BITS if account else NAMESPACE_BITS
            return _PERMISSION.one_of(self._told(vip, client, bits) for vip in self._vips)

        return match

    def _told(self, vip: Ip, client: Identity, bits: int) -> Json:
        return {
            "destinationIp": {
                "addressPrefix": told_address(vip, self._clients.service_secret, client),
                "prefixLen": bits,
            }
        }

    def _operation(self, operation: Operation) -> Iterator[Json]:
        yield from self._pair("ports", operation.ports, operation.not_ports, self._port)
        for name, matched, unmatched, read in (
            ("hosts", operation.hosts, (), _host(self._denies, self._at.port)),
            ("hosts", (), operation.not_hosts, _host(not self._denies, self._at.port)),
            ("methods", operation.methods, operation.not_methods, _header(":method")),
            ("paths", operation.paths, operation.not_paths, _path),
        ):
            if self._is_http:
                yield from self._pair(name, matched, unmatched, read)
            else:
                of = f"port {self._at.port} is" if self._at.port else "ports of no service are"
                name += f" ({of} not HTTP)"  # noqa: PLW2901
                yield from self._pair(name, matched, unmatched, _nothing)

    def _when(self, when: When, who: list[Json], addresses: list[Json], rest: list[Json]) -> None:
        said = when.key, when.values, when.not_values
        if (identity := _IDENTITIES.get(when.key)) is not None:
            who += self._pair(*said, self._client(identity))
        elif when.key == "source.ip":
            addresses += self._pair(*said, self._peer, _ADDRESS)
        elif when.key == "destination.ip":
            rest += self._pair(*said, self._vip)
        elif when.key == "destination.port":
            rest += self._pair(*said, self._port)
        elif self._is_http and when.key == "request.auth.principal":
            rest += self._pair(*said, principal)
        elif self._is_http and (path := claim_of(when.key)):
            rest += self._pair(when.key, when.values, (), partial(claim, path, is_strict=self._denies))
            rest += self._pair(
                when.key, (), when.not_values, partial(claim, path, is_strict=not self._denies)
            )
        elif self._is_http and (header := _HEADER.fullmatch(when.key)):
            rest += self._pair(*said, _header(header[1].lower()))
        else:
            rest += self._pair(*said, _nothing)

    def _port(self, value: str) -> Json | None:
        if not value.isdecimal() or int(value) > PORT_MAX:
            return None
        if not self._at.port:
            return {"destinationPort": int(value)}
        return _ANY if int(value) == self._at.port else _PERMISSION.no(_ANY)

    def _peer(self, value: str) -> Json | None:
        """A client is seen with his address of one family: of one of the other nothing can be said."""
        try:
            network = ipaddress.ip_network(value, strict=False)
        except ValueError:
            return None
        first, bits = network.network_address, network.prefixlen
        if isinstance(first, ipaddress.IPv6Address) and bits >= _MAPPED_BITS and first.ipv4_mapped:
            first, bits = first.ipv4_mapped, bits - _MAPPED_BITS
        if self._clients.family not in (0, first.version):
            return None
        return {"directRemoteIp": {"addressPrefix": str(first), "prefixLen": bits}}

    def _vip(self, value: str) -> Json | None:
        try:
            wanted = ipaddress.ip_network(value, strict=False)
        except ValueError:
            return None
        found = [vip for vip in self._vips if ipaddress.ip_address(ip_to_text(vip)) in wanted]
        return _PERMISSION.one_of(self._told(vip, NOBODY, SERVICE_BITS) for vip in found)

    def _pair(
        self,
        what: str,
        matched: Sequence[str],
        unmatched: Sequence[str],
        read: _Read,
        words: _Words = _PERMISSION,
    ) -> Iterator[Json]:
        """A field and its negation."""
        if matched:
            yield words.one_of(self._value(what, value, read, words, self._denies) for value in matched)
        if unmatched:
            what = f"not {what}"
            found = (self._value(what, value, read, words, not self._denies) for value in unmatched)
            yield words.no(words.one_of(found))

    def _value(self, what: str, value: str, read: _Read, words: _Words, is_everything: bool) -> Json:
        """What cannot be read is everything or nothing: what makes the policy stricter."""
        found = read(value)
        if found is not None:
            return found
        self.dropped.append(f"{what} {value}")
        return _ANY if is_everything else words.no(_ANY)


_Read = Callable[[str], Json | None]
"""From a value to what it matches; None for one that cannot be honoured."""


def _nothing(_: str) -> None:
    """Of what is not honoured."""


def _header(name: str) -> _Read:
    def match(value: str) -> Json | None:
        if value == "*":
            return {"header": {"name": name, "presentMatch": True}}
        text = text_match(value)
        return text and {"header": {"name": name, "stringMatch": text}}

    return match


def _host(is_strict: bool, port: int) -> _Read:
    """In any case of letters, with this port or without; `is_strict`: whatever may stand behind or before."""

    def match(value: str) -> Json | None:
        if value == "*":
            return _header(":authority")(value)
        if (text := text_match(value)) is None:
            return None
        found = [text]
        if "prefix" not in text:
            ((how, name),) = text.items()
            found.append({how: f"{name}:{port}"})
            if is_strict:
                end = {"contains": f"{name}:"} if how == "suffix" else {"prefix": f"{name}:"}
                found += [end, {how: f"{name}."}, {"contains": f"{name}.:"}, {"suffix": f"@{name}"}]
        return _PERMISSION.one_of(map(_authority, found))

    return match


def _authority(match: Json) -> Json:
    return {"header": {"name": ":authority", "stringMatch": {**match, "ignoreCase": True}}}


def _path(value: str) -> Json | None:
    if "{" in value:
        return None
    path = {"safeRegex": {"regex": ".+"}} if value == "*" else text_match(value)
    return path and {"urlPath": {"path": path}}
