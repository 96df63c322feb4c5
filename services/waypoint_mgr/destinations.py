"""DestinationRules: how a waypoint goes to the endpoints of a service. Pure.

Which rule is a service's: one of the waypoint's namespace, else of the service's, else of the root namespace;
of several the one whose host says the most; of several for one host all, the oldest first.

What a rule wants encrypted is not sent as it is: where a waypoint cannot do it (`tls.py`), such a port has no
endpoints. A BackendTLSPolicy goes before what a rule says of it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from pykmesh.contracts.address import ROOT_NAMESPACE
from pykmesh.manifests.destination_rule import (
    ConnectionPool,
    ConsistentHash,
    DestinationRuleSpec,
    LoadBalancer,
    OutlierDetection,
    PortPolicy,
    SimpleLB,
    Subset,
    TLSMode,
    TrafficPolicy,
)
from pykmesh.manifests.objects import Gateway, ObjectRef, ref_of
from services.waypoint_mgr import tls
from services.waypoint_mgr.attachments import ACCEPTED, PARTIALLY_INVALID, UNSUPPORTED_VALUE, Condition
from services.waypoint_mgr.envoy import UNLIMITED, Json, Port
from services.waypoint_mgr.protocols import AppProtocol
from services.waypoint_mgr.source import BackendTLS, Destination

_BALANCERS: Final = {
    SimpleLB.ROUND_ROBIN: "ROUND_ROBIN",
    SimpleLB.RANDOM: "RANDOM",
    SimpleLB.LEAST_CONN: "LEAST_REQUEST",
    SimpleLB.LEAST_REQUEST: "LEAST_REQUEST",
}
_RING_SIZE: Final = 1024
_RING_MAX: Final = 65_536
_TABLE_MAX: Final = 65_537
"""Envoy's own of Maglev. Each subset has one, and who shares the waypoint shares its memory."""
_PARTS: Final = ("load_balancer", "connection_pool", "outlier_detection", "tls")
"""Of what is said of all ports, or of one."""
VERSION_LABELS: Final = (
    "service.istio.io/canonical-revision",
    "app.kubernetes.io/version",
    "version",
)
"""Of which a workload's canonical revision is made: all that the workload API says of labels."""


class Encryption(NamedTuple):
    """Of a port's endpoints: what TLS adds to its cluster, and to the options of that's HTTP; or no way."""

    socket: Json = {}  # noqa: RUF012  (never changed)
    options: Json = {}  # noqa: RUF012
    is_closed: bool = False


_BY_CLIENT: Final = LoadBalancer(consistent_hash=ConsistentHash(use_source_ip=True))


class Destinations:
    """The rules for what a waypoint reaches, and what is told of them."""

    def __init__(
        self,
        waypoint: Gateway,
        destinations: Sequence[Destination],
        backend_tls: Sequence[BackendTLS] = (),
        *,
        roots: tls.Roots = tls.NO_ROOTS,
        only_tls: bool = False,
        blamed: Container[ObjectRef] = (),
        affine: Container[str] = (),
    ) -> None:
        """`only_tls`: nothing of rules counts but what they close, and all that is to be encrypted is.

        `blamed`: the same, of these rules. `affine`: services whose clients keep to an endpoint, where no
        rule says how they are balanced.
        """
        self._waypoint = waypoint
        self._affine = affine
        self._only_tls = only_tls
        self._blamed = blamed
        self._closing: set[ObjectRef] = set()
        """Of rules that were merged those of which only what they close counts."""
        self._roots = roots
        self._unhashed: dict[ObjectRef, set[int]] = {}
        """Ports of connections, of which nothing but their source can be hashed."""
        self._nameless: dict[ObjectRef, dict[int, str]] = {}
        """Ports that a rule closes for want of a name, and why."""
        self._backend_tls: dict[str, list[BackendTLS]] = {}
        for each in backend_tls:
            self._backend_tls.setdefault(each.service, []).append(each)
        self._by_policy: dict[ObjectRef, str] = {}
        """Why a BackendTLSPolicy closes what it is for; "" where it does not."""
        self._destinations = [each for each in destinations if each.spec.workload_selector is None]
        self._rules: dict[str, Destination | None] = {}
        """Of services that were asked for."""
        self._used: dict[ObjectRef, tuple[DestinationRuleSpec, list[str]]] = {}
        """What counts of a rule, and what does not because an older one says it."""

    def policy(self, at: Port) -> PortPolicy | TrafficPolicy:
        """Of a service's port, of a subset's with what that says itself; else Istio's default."""
        found = self._said(at)
        if found.load_balancer is None and at.service in self._affine:
            return msgspec.structs.replace(found, load_balancer=_BY_CLIENT)
        return found

    def is_by_source(self, backends: Iterable[Port]) -> bool:
        """Whether connections keep to an endpoint by who makes them. Told are other ways, of connections."""
        found = False
        for at in backends:
            balancer = self.policy(at).load_balancer
            hashes = balancer.consistent_hash if balancer else None
            if hashes and not hashes.use_source_ip and (best := self._best(at)) is not None:
                self._unhashed.setdefault(best.ref, set()).add(at.port)
            found |= bool(hashes and hashes.use_source_ip)
        return found

    def _said(self, at: Port) -> PortPolicy | TrafficPolicy:
        best = self._best(at)
        if best is None:
            return TrafficPolicy()
        found, subset = best.spec.traffic_policy.at(at.port), _subset(best, at.subset)
        if subset is None or subset.traffic_policy is None:
            return found
        own = subset.traffic_policy.at(at.port)
        if isinstance(own, PortPolicy):
            return own
        changed = {name: said for name in _PARTS if (said := getattr(own, name))}
        return msgspec.structs.replace(found, **changed)

    def encryption(self, at: Port, protocol: AppProtocol, port_name: str = "") -> Encryption:
        """How its endpoints are spoken to. Of a port whose name is not known any BackendTLSPolicy counts."""
        best, wanted, why = self._best(at), tls.wanted(self.policy(at)), ""
        if policies := self._policies_of(at, port_name):
            said = {each.tls for each in policies}
            wanted = said.pop() if len(said) == 1 else None
            why = "" if wanted else "its roots, or those of others for this port, are not read"
        if wanted is not None:
            why = tls.obstacle(wanted, self._roots)
        if (
            wanted is not None
            and not why
            and (why := tls.obstacle_for(wanted, protocol))
            and best is not None
        ):
            self._nameless.setdefault(best.ref, {})[at.port] = why  # a policy says a name
        for each in policies:
            self._by_policy[each.by] = self._by_policy.get(each.by) or why
        if wanted is None or why or (best.ref in self._closing if best else self._only_tls):
            return Encryption(is_closed=bool(wanted or why))
        options = {} if protocol is AppProtocol.TCP else tls.http_options(wanted)
        return Encryption({"transportSocket": tls.socket(wanted, protocol, self._roots)}, options)

    def _policies_of(self, at: Port, port_name: str) -> list[BackendTLS]:
        """Those for the port alone go before those for all."""
        found = self._backend_tls.get(at.service, [])
        own = [each for each in found if each.port == port_name]
        return found if not port_name else own or [each for each in found if not each.port]

    def revision(self, at: Port) -> str | None:
        """By which its endpoints are chosen; None: all."""
        best = self._best(at)
        subset = _subset(best, at.subset) if best else None
        return _revision(subset) if subset else None

    def has_subset(self, at: Port) -> bool:
        """One that can be told by the revision of workloads."""
        best = self._best(at)
        subset = _subset(best, at.subset) if best else None
        return subset is not None and _revision(subset) is not None

    def _best(self, at: Port) -> Destination | None:
        if at.service not in self._rules:
            self._rules[at.service] = self._rule(at.service)
        return self._rules[at.service]

    def _rule(self, service: str) -> Destination | None:
        namespace, _, hostname = service.partition("/")
        for of in dict.fromkeys((self._waypoint.namespace, namespace, ROOT_NAMESPACE)):
            found = [
                each
                for each in self._destinations
                if each.ref.namespace == of
                and each.says_of(hostname)
                and each.is_seen_in(self._waypoint.namespace)
            ]
            if found:
                most = max(each.says_of(hostname) for each in found)
                same = [each for each in found if each.says_of(hostname) == most]
                return self._merged(sorted(same, key=lambda each: (each.created, each.ref.name)))
        return None

    def _merged(self, same: Sequence[Destination]) -> Destination:
        """All of one host: the subsets of all, the first traffic policy that says anything.

        As Istio, but for `exportTo`, which may differ here, and for a traffic policy that is there and empty.
        """
        subsets, policy = dict[str, Subset](), TrafficPolicy()
        for each in same:
            own = {subset.name: subset for subset in each.spec.subsets if subset.name not in subsets}
            lost = [f"subset {subset.name}" for subset in each.spec.subsets if subset.name in subsets]
            counts = TrafficPolicy()
            if policy == TrafficPolicy():
                policy = counts = each.spec.traffic_policy
            elif each.spec.traffic_policy != TrafficPolicy():
                lost.append("trafficPolicy")
            subsets |= own
            spec = msgspec.structs.replace(each.spec, traffic_policy=counts, subsets=tuple(own.values()))
            self._used[each.ref] = spec, lost
        spec = msgspec.structs.replace(same[0].spec, traffic_policy=policy, subsets=tuple(subsets.values()))
        found = msgspec.structs.replace(same[0], spec=spec)
        if not (self._only_tls or any(each.ref in self._blamed for each in same)):
            return found
        self._closing.add(found.ref)
        return _tls_alone(found)

    def conditions(self) -> Iterator[Condition]:
        """Of those that were used."""
        parent = ref_of(self._waypoint)
        for ref, why in sorted(self._by_policy.items()):
            yield Condition(ref, parent, ACCEPTED, True, ACCEPTED)
            if why:
                message = f"not honoured: {why}: endpoints get nothing"
                yield Condition(ref, parent, PARTIALLY_INVALID, True, UNSUPPORTED_VALUE, message)
        for ref in sorted(self._used):
            yield Condition(ref, parent, ACCEPTED, True, ACCEPTED)
            spec, lost = self._used[ref]
            left_out = [f"{what} (an older rule for this host goes before)" for what in lost]
            left_out += _not_honoured(spec, self._roots)
            left_out += [
                f"tls of TCP port {port} ({why}: its endpoints get nothing)"
                for port, why in sorted(self._nameless.get(ref, {}).items())
            ]
            left_out += [
                f"loadBalancer.consistentHash of TCP port {port} (but useSourceIp)"
                for port in sorted(self._unhashed.get(ref, ()))
            ]
            if left_out:
                message = f"not honoured: {', '.join(left_out)}"
                yield Condition(ref, parent, PARTIALLY_INVALID, True, UNSUPPORTED_VALUE, message)


def _subset(found: Destination, name: str) -> Subset | None:
    return next((subset for subset in found.spec.subsets if subset.name == name), None) if name else None


def _revision(subset: Subset) -> str | None:
    """None where its labels are others than one of a version."""
    if len(subset.labels) != 1:
        return None
    ((label, value),) = subset.labels.items()
    return value if label in VERSION_LABELS else None


def _not_honoured(spec: DestinationRuleSpec, roots: tls.Roots) -> Iterator[str]:
    """Fields that change nothing here."""
    for subset in spec.subsets:
        if _revision(subset) is None:
            yield f"subset {subset.name} (by other labels than one of a version)"
    yield from _left_out_of_all(spec.traffic_policy, roots)
    for subset in spec.subsets:
        if subset.traffic_policy is not None:
            left_out = _left_out_of_all(subset.traffic_policy, roots)
            yield from (f"subset {subset.name} {text}" for text in left_out)


def _left_out_of_all(policy: TrafficPolicy, roots: tls.Roots) -> Iterator[str]:
    yield from (f"trafficPolicy.{name}" for name in _left_out(policy, roots))
    for name, found in (
        ("tunnel", policy.tunnel),
        ("proxyProtocol", policy.proxy_protocol),
        ("retryBudget", policy.retry_budget),
    ):
        if found:
            yield f"trafficPolicy.{name}"
    for own in policy.port_level_settings:
        yield from (f"portLevelSettings[{own.port.number}].{name}" for name in _left_out(own, roots))


def _left_out(policy: PortPolicy | TrafficPolicy, roots: tls.Roots) -> Iterator[str]:
    if (wanted := tls.wanted(policy)) is not None:
        if why := tls.obstacle(wanted, roots):
            yield f"tls ({why}: its endpoints get nothing)"
    elif policy.tls and policy.tls.mode is not TLSMode.DISABLE:
        yield "tls"
    balancer = policy.load_balancer or LoadBalancer()
    if balancer.locality_lb_setting:
        yield "loadBalancer.localityLbSetting"
    if balancer.zone_aware_lb_setting:
        yield "loadBalancer.zoneAwareLbSetting"
    if balancer.warmup or balancer.warmup_duration_secs:
        yield "loadBalancer.warmup"
    if balancer.simple is SimpleLB.PASSTHROUGH:
        yield "loadBalancer.simple PASSTHROUGH"
    if (hashes := balancer.consistent_hash) is not None:
        if _ring_size(hashes) > _RING_MAX:
            yield f"loadBalancer.consistentHash minimumRingSize of more than {_RING_MAX}"
        if hashes.maglev and hashes.maglev.table_size > _TABLE_MAX:
            yield f"loadBalancer.consistentHash.maglev tableSize of more than {_TABLE_MAX}"
    cookie = balancer.consistent_hash.http_cookie if balancer.consistent_hash else None
    if cookie and cookie.attributes:
        yield "loadBalancer.consistentHash.httpCookie.attributes"
    if policy.outlier_detection and policy.outlier_detection.consecutive_errors is not None:
        yield "outlierDetection.consecutiveErrors"
    if policy.outlier_detection and policy.outlier_detection.outlier_detection_http_error_codes:
        yield "outlierDetection.outlierDetectionHttpErrorCodes"
    pool = policy.connection_pool or ConnectionPool()
    if pool.tcp.tcp_keepalive:
        yield "connectionPool.tcp.tcpKeepalive"
    if pool.tcp.max_connection_duration:
        yield "connectionPool.tcp.maxConnectionDuration"
    if pool.tcp.idle_timeout:
        yield "connectionPool.tcp.idleTimeout"
    if pool.http.h2_upgrade_policy not in (None, "DEFAULT", "DO_NOT_UPGRADE"):
        yield "connectionPool.http.h2UpgradePolicy"
    if pool.http.use_client_protocol:
        yield "connectionPool.http.useClientProtocol"
    if pool.http.max_concurrent_streams:
        yield "connectionPool.http.maxConcurrentStreams"
    if pool.http.http2_keep_alive:
        yield "connectionPool.http.http2KeepAlive"


def _tls_alone(found: Destination) -> Destination:
    """What a rule closes, and nothing else of it."""
    policy = found.spec.traffic_policy
    ports = tuple(PortPolicy(port=own.port, tls=own.tls) for own in policy.port_level_settings)
    policy = TrafficPolicy(tls=policy.tls, port_level_settings=ports)
    return msgspec.structs.replace(
        found, spec=msgspec.structs.replace(found.spec, traffic_policy=policy, subsets=())
    )


def cluster_fields(policy: PortPolicy | TrafficPolicy) -> Json:
    """What a policy changes of a cluster."""
    pool = policy.connection_pool or ConnectionPool()
    fields: Json = {"circuitBreakers": {"thresholds": [_limits(pool)]}}
    if pool.tcp.connect_timeout:
        fields["connectTimeout"] = pool.tcp.connect_timeout.as_proto
    fields |= _balancer(policy.load_balancer or LoadBalancer())
    if policy.outlier_detection is not None:
        fields["outlierDetection"] = _outlier_detection(policy.outlier_detection)
        if policy.outlier_detection.min_health_percent:
            threshold = {"value": policy.outlier_detection.min_health_percent}
            fields["commonLbConfig"] = {"healthyPanicThreshold": threshold}
    return fields


def connection_fields(policy: PortPolicy | TrafficPolicy) -> Json:
    """What a policy changes of a cluster's HTTP connections."""
    http = (policy.connection_pool or ConnectionPool()).http
    fields: Json = {}
    if http.max_requests_per_connection:
        fields["maxRequestsPerConnection"] = http.max_requests_per_connection
    if http.idle_timeout:
        fields["idleTimeout"] = http.idle_timeout.as_proto
    return fields


def hash_policies(policies: Iterable[PortPolicy | TrafficPolicy]) -> list[Json]:
    """By what requests keep their endpoint, of all clusters that a route leads to."""
    found = [
        _hash_policy(policy.load_balancer.consistent_hash)
        for policy in policies
        if policy.load_balancer and policy.load_balancer.consistent_hash
    ]
    return [each for number, each in enumerate(found) if each not in found[:number]]


def _limits(pool: ConnectionPool) -> Json:
    return {
        "maxConnections": _or_unlimited(pool.tcp.max_connections),
        "maxPendingRequests": _or_unlimited(pool.http.http1_max_pending_requests),
        "maxRequests": _or_unlimited(pool.http.http2_max_requests),
        "maxRetries": _or_unlimited(pool.http.max_retries),
    }


def _or_unlimited(count: int | None) -> int:
    return count or UNLIMITED


def _balancer(balancer: LoadBalancer) -> Json:
    hashes = balancer.consistent_hash
    if hashes is None:
        return {"lbPolicy": _BALANCERS[balancer.simple]} if balancer.simple in _BALANCERS else {}
    if hashes.maglev:
        size = min(hashes.maglev.table_size, _TABLE_MAX)
        table = {"tableSize": size} if size else {}
        return {"lbPolicy": "MAGLEV", "maglevLbConfig": table}
    own = min(_ring_size(hashes), _RING_MAX)
    return {"lbPolicy": "RING_HASH", "ringHashLbConfig": {"minimumRingSize": own or _RING_SIZE}}


def _ring_size(hashes: ConsistentHash) -> int:
    return hashes.ring_hash.minimum_ring_size if hashes.ring_hash else hashes.minimum_ring_size


def _hash_policy(hashes: ConsistentHash) -> Json:
    if hashes.http_header_name:
        return {"header": {"headerName": hashes.http_header_name}}
    if hashes.http_query_parameter_name:
        return {"queryParameter": {"name": hashes.http_query_parameter_name}}
    if hashes.http_cookie:
        cookie: Json = {"name": hashes.http_cookie.name}
        if hashes.http_cookie.ttl is not None:
            cookie["ttl"] = hashes.http_cookie.ttl.as_proto
        if hashes.http_cookie.path:
            cookie["path"] = hashes.http_cookie.path
        return {"cookie": cookie}
    return {"connectionProperties": {"sourceIp": True}}


def _outlier_detection(found: OutlierDetection) -> Json:
    """As Istio: never by a success rate; what is not said is Envoy's default."""
    fields: Json = {"enforcingSuccessRate": 0}
    errors, gateway = found.consecutive_5xx_errors, found.consecutive_gateway_errors
    if errors is not None:
        fields |= {"consecutive5xx": errors, "enforcingConsecutive5xx": 100 if errors else 0}
    if gateway is not None:
        fields["consecutiveGatewayFailure"] = gateway
        fields["enforcingConsecutiveGatewayFailure"] = 100 if gateway else 0
    if found.split_external_local_origin_errors:
        fields["splitExternalLocalOriginErrors"] = True
        if found.consecutive_local_origin_failures is not None:
            fields["consecutiveLocalOriginFailure"] = found.consecutive_local_origin_failures
            own = found.consecutive_local_origin_failures
            fields["enforcingConsecutiveLocalOriginFailure"] = 100 if own else 0
        fields["enforcingLocalOriginSuccessRate"] = 0
    if found.interval:
        fields["interval"] = found.interval.as_proto
    if found.base_ejection_time:
        fields["baseEjectionTime"] = found.base_ejection_time.as_proto
    if found.max_ejection_percent:
        fields["maxEjectionPercent"] = found.max_ejection_percent
    return fields
