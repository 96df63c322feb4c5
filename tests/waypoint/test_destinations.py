"""DestinationRules through a real Envoy: which is a service's, and what it changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest

from pykmesh.contracts.waypoints import Endpoint
from pykmesh.manifests.destination_rule import SimpleLB
from pykmesh.manifests.objects import DestinationRule, VirtualService, from_plain
from pykmesh.manifests.parse import parse
from services.waypoint_mgr.destinations import Destinations, Encryption, cluster_fields
from services.waypoint_mgr.envoy import Port
from services.waypoint_mgr.protocols import AppProtocol
from services.waypoint_mgr.routes import Wanted, translate
from services.waypoint_mgr.source import Destination, Objects, Virtual
from services.waypoint_mgr.tls import NO_ROOTS, SYSTEM_ROOTS, Roots

from .backends import Answer, Backend, ask
from .world import (
    DOMAIN,
    Waypoint,
    World,
    ads_server,
    at,
    gateway,
    http_route,
    kubernetes_service,
    mesh_service,
    named,
    waypoint,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

ADDRESS = "127.0.9.1"
WEB = f"web.shop.svc.{DOMAIN}"
EJECTS = {"consecutive5xxErrors": 2, "baseEjectionTime": "60s", "maxEjectionPercent": 100}
MUTUAL = "tls (there are no certificates of clients here: its endpoints get nothing)"
ONE_AT_A_TIME = {"connectionPool": {"tcp": {"maxConnections": 1}, "http": {"http1MaxPendingRequests": 1}}}


def destination(policy: dict[str, Any] | None = None, namespace: str = "shop", **spec: Any) -> Destination:
    name = spec.pop("name", "web")
    plain = {
        "metadata": {"name": name, "namespace": namespace, "creationTimestamp": spec.pop("created", "")},
        "spec": {"host": "web", **({"trafficPolicy": policy} if policy else {}), **spec},
    }
    made = from_plain(plain, DestinationRule)
    assert isinstance(made, DestinationRule)
    return Destination.of(made, DOMAIN)


class Served:
    """web's endpoints are v1 and v2, at a waypoint."""

    def __init__(self, envoy: Waypoint) -> None:
        self._envoy = envoy

    async def ask(self, path: str = "/", **headers: str) -> Answer:
        return await anyio.to_thread.run_sync(ask, at(ADDRESS), self._envoy.port, path, "GET", headers)

    async def who(self, count: int, **headers: str) -> Counter[str]:
        """Who answers; the status of what nobody does well."""
        found = [await self.ask(**headers) for _ in range(count)]
        return Counter(str(a.told["backend"]) if a.status == 200 else str(a.status) for a in found)


@asynccontextmanager
async def served(
    folder: Path,
    backends: dict[str, Backend],
    *destinations: Destination,
    by_route: bool = False,
    virtual: Virtual | None = None,
) -> AsyncIterator[Served]:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        world = World()
        endpoints = [msgspec.structs.replace(backends[name].endpoint, revision=name) for name in ("v1", "v2")]
        own = mesh_service("shop", "web", {envoy.port: endpoints}, [ADDRESS])
        world.add_user(own, kubernetes_service("shop", "web", {"port": envoy.port, "name": "http"}))
        world.destinations = list(destinations)
        world.virtuals = [virtual] if virtual else []
        if by_route:
            to = {"backendRefs": [{"name": "web", "port": envoy.port}]}
            world.routes = [http_route("shop", "r", {"rules": [to]})]
        assert not (await envoy.apply(world.configuration())).refusals
        await envoy.ready()
        yield Served(envoy)


@pytest.mark.parametrize("rules", [[destination({"outlierDetection": EJECTS})], []], ids=["rule", "none"])
async def test_an_endpoint_that_fails_again_and_again_is_left_out(
    folder: Path, backends: dict[str, Backend], monkeypatch: pytest.MonkeyPatch, rules: list[Destination]
) -> None:
    monkeypatch.setattr(backends["v2"], "is_broken", True)
    async with served(folder, backends, *rules) as found:
        await found.who(60)  # of which v2 has enough in all but one of a thousand million runs
        answers = await found.who(40)
        assert answers == {"v1": 40} if rules else answers["500"] > 5


async def test_what_is_more_than_the_pool_holds_is_refused(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with served(folder, backends, destination(ONE_AT_A_TIME)) as found:
        statuses = Counter[int]()

        async def one() -> None:
            statuses[(await found.ask("/?wait=1")).status] += 1

        async with anyio.create_task_group() as tasks:
            for _ in range(12):
                tasks.start_soon(one)
        assert statuses[503] > 2
        assert statuses[200] > 0
        assert statuses.total() == 12


@pytest.mark.parametrize("by_route", [False, True])
@pytest.mark.parametrize(
    "how", [{}, {"maglev": {}}, {"maglev": {"tableSize": 2}}, {"ringHash": {"minimumRingSize": 0}}]
)
async def test_requests_with_one_header_keep_their_endpoint(
    folder: Path, backends: dict[str, Backend], how: dict[str, Any], by_route: bool
) -> None:
    rule = destination(hashed(**how))
    async with served(folder, backends, rule, by_route=by_route) as found:
        each = [await found.who(5, **{"x-user": str(user)}) for user in range(20)]
        assert all(len(who) == 1 for who in each)
        assert Counter(who for found in each for who in found).keys() == {"v1", "v2"}


@pytest.mark.parametrize(
    ("how", "field", "most"),
    [
        ({"ringHash": {"minimumRingSize": 1_000_000}}, ("ringHashLbConfig", "minimumRingSize"), 65_536),
        ({"minimumRingSize": 65_536}, ("ringHashLbConfig", "minimumRingSize"), 65_536),
        ({"maglev": {"tableSize": 5_000_011}}, ("maglevLbConfig", "tableSize"), 65_537),
    ],
)
def test_a_table_is_no_larger_than_the_others_can_spare(
    how: dict[str, Any], field: tuple[str, str], most: int
) -> None:
    rules = Destinations(gateway(), [destination(hashed(**how))])
    fields = cluster_fields(rules.policy(Port(named("shop", "web"), 80)))
    assert fields[field[0]][field[1]] == most
    told = [one.message for one in rules.conditions() if one.message]
    assert bool(told) == (most != how.get("minimumRingSize")), told


async def test_a_cookie_is_made_for_who_has_none(folder: Path, backends: dict[str, Backend]) -> None:
    cookie = {"name": "stay", "ttl": "60s", "path": "/"}
    rule = destination({"loadBalancer": {"consistentHash": {"httpCookie": cookie}}})
    async with served(folder, backends, rule) as found:
        for _ in range(5):
            first = await found.ask()
            said = first.headers["set-cookie"].partition(";")[0]
            assert said.startswith("stay=")
            assert await found.who(5, cookie=said) == {first.told["backend"]: 5}


async def test_a_connection_carries_so_many_requests(folder: Path, backends: dict[str, Backend]) -> None:
    rule = destination({"connectionPool": {"http": {"maxRequestsPerConnection": 1}}})
    before = sum(backends[name].connections for name in ("v1", "v2"))
    async with served(folder, backends, rule) as found:
        await found.who(12)
    assert sum(backends[name].connections for name in ("v1", "v2")) == before + 12


@pytest.mark.parametrize("simple", ["ROUND_ROBIN", "RANDOM", "LEAST_REQUEST", "LEAST_CONN"])
async def test_envoy_takes_every_way_of_balancing(
    folder: Path, backends: dict[str, Backend], simple: str
) -> None:
    rule = destination(
        {"loadBalancer": {"simple": simple}, "connectionPool": {"tcp": {"connectTimeout": "1.5s"}}}
    )
    async with served(folder, backends, rule) as found:
        assert (await found.who(40)).keys() == {"v1", "v2"}


def hashed(**how: Any) -> dict[str, Any]:
    return {"loadBalancer": {"consistentHash": {"httpHeaderName": "x-user", **how}}}


def versions(by: str = "version", **policies: Any) -> list[dict[str, Any]]:
    found = []
    for name in ("v1", "v2"):
        policy = {"trafficPolicy": policies[name]} if name in policies else {}
        found.append({"name": name, "labels": {by: name}, **policy})
    return found


@pytest.mark.parametrize("label", ["version", "app.kubernetes.io/version"])
async def test_a_subset_is_the_workloads_of_a_version(
    folder: Path, backends: dict[str, Backend], label: str
) -> None:
    def to(subset: str) -> dict[str, Any]:
        return {"destination": {"host": "web", "subset": subset}}

    canary = {"match": [{"headers": {"x-canary": {}}}], "route": [to("v2")]}
    lost = {"match": [{"headers": {"x-lost": {}}}], "route": [to("v3")]}
    plain = {
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"hosts": ["web"], "http": [canary, lost, {"route": [to("v1")]}]},
    }
    made = from_plain(plain, VirtualService)
    assert isinstance(made, VirtualService)
    by_version = Virtual.of(made, DOMAIN)
    async with served(folder, backends, destination(subsets=versions(label)), virtual=by_version) as found:
        assert await found.who(10) == {"v1": 10}
        assert await found.who(10, **{"x-canary": "1"}) == {"v2": 10}
        assert await found.who(1, **{"x-lost": "1"}) == {"503": 1}


def test_a_subsets_policy_goes_before_that_of_all_field_by_field() -> None:
    all_of_them = {"connectionPool": {"tcp": {"maxConnections": 1}}, "loadBalancer": {"simple": "RANDOM"}}
    own = {"connectionPool": {"tcp": {"maxConnections": 2}}}
    rules = Destinations(gateway(), [destination(all_of_them, subsets=versions(v2=own))])

    def said(subset: str) -> tuple[int | None, str]:
        found = rules.policy(Port(named("shop", "web"), 80, subset))
        assert found.connection_pool
        assert found.load_balancer
        return found.connection_pool.tcp.max_connections, str(found.load_balancer.simple)

    assert said("") == said("v1") == (1, "SimpleLB.RANDOM")
    assert said("v2") == (2, "SimpleLB.RANDOM")


def name_of(*rules: Destination) -> str:
    """Of the rule that is web's, by its first limit."""
    found = Destinations(gateway(), rules).policy(Port(named("shop", "web"), 80))
    return str(found.connection_pool.tcp.max_connections if found.connection_pool else None)


def limited(connections: int, **spec: Any) -> Destination:
    return destination({"connectionPool": {"tcp": {"maxConnections": connections}}}, **spec)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([limited(1)], "1"),
        ([limited(1, host=WEB)], "1"),
        ([limited(1, host="*.shop.svc.cluster.local")], "1"),
        ([limited(1, host="*")], "1"),
        ([limited(1, host="other")], "None"),
        ([limited(1, host="shop/web")], "None"),
        ([limited(1, host="*.local"), limited(2, host="*.cluster.local", name="b")], "2"),
        ([limited(1, host="*"), limited(2, name="b")], "2"),
        (
            [
                limited(1, created="2026-01-02T00:00:00Z", name="a"),
                limited(2, created="2026-01-01T00:00:00Z"),
            ],
            "2",
        ),
        ([limited(1, namespace="istio-system", host=WEB)], "1"),
        ([limited(1, namespace="istio-system", host=WEB), limited(2, host="*")], "2"),
        ([limited(1, namespace="elsewhere", host=WEB)], "None"),
        ([limited(1, namespace="istio-system", host=WEB, exportTo=["."])], "None"),
        ([limited(1, namespace="istio-system", host=WEB, exportTo=["shop"])], "1"),
        ([limited(1, exportTo=["."])], "1"),
        ([limited(1, workloadSelector={"matchLabels": {"app": "x"}})], "None"),
        (
            [
                destination(
                    {
                        "connectionPool": {"tcp": {"maxConnections": 1}},
                        "portLevelSettings": [
                            {"port": {"number": 80}, "connectionPool": {"tcp": {"maxConnections": 2}}}
                        ],
                    }
                )
            ],
            "2",
        ),
    ],
)
def test_which_rule_is_a_services(rules: list[Destination], expected: str) -> None:
    assert name_of(*rules) == expected


@pytest.mark.parametrize("mode", ["SIMPLE", "MUTUAL", "DISABLE", "ISTIO_MUTUAL"])
async def test_what_is_to_be_encrypted_is_not_sent_as_it_is(
    folder: Path, backends: dict[str, Backend], mode: str
) -> None:
    async with served(folder, backends, destination({"tls": {"mode": mode}})) as found:
        answered = (await found.who(40)).keys()
        assert answered == ({"503"} if mode in ("SIMPLE", "MUTUAL") else {"v1", "v2"})


@pytest.mark.parametrize(
    ("all_ports", "own", "closed"),
    [
        ({}, {"tls": {"mode": "MUTUAL"}}, True),
        ({"portLevelSettings": [{"port": {"number": 80}}]}, {"tls": {"mode": "MUTUAL"}}, True),
        ({"tls": {"mode": "MUTUAL"}}, {"tls": {"mode": "DISABLE"}}, False),
        ({"tls": {"mode": "MUTUAL"}}, {"loadBalancer": {"simple": "RANDOM"}}, True),
        ({"tls": {"mode": "MUTUAL"}}, {"portLevelSettings": [{"port": {"number": 80}}]}, False),
        ({}, {"portLevelSettings": [{"port": {"number": 81}, "tls": {"mode": "MUTUAL"}}]}, False),
    ],
)
def test_a_subset_has_what_is_said_of_the_port_and_of_itself(
    all_ports: dict[str, Any], own: dict[str, Any], closed: bool
) -> None:
    subset = {"name": "v1", "labels": {"version": "v1"}, "trafficPolicy": own}
    rules = Destinations(gateway(), [destination(all_ports, subsets=[subset])])
    assert rules.encryption(Port(named("shop", "web"), 80, "v1"), AppProtocol.HTTP).is_closed is closed
    (*_, last) = rules.conditions()
    if "tls" in own and closed:
        assert f"subset v1 trafficPolicy.{MUTUAL}" in last.message


def test_rules_for_one_host_are_taken_together_and_what_is_left_of_them_is_told() -> None:
    """The subsets of all, the oldest of two with one name; the first traffic policy that says anything."""
    v1, v2 = versions(v1={"loadBalancer": {"simple": "RANDOM"}}, v2={})
    found = [
        destination(None, name="a", created="2026-01-01T00:00:00Z", subsets=[v1]),
        limited(1, name="b", created="2026-01-02T00:00:00Z"),
        limited(2, name="c", created="2026-01-03T00:00:00Z", subsets=[{**v1, "trafficPolicy": {}}, v2]),
        limited(3, name="d", host="*"),
    ]
    rules = Destinations(gateway(), [*reversed(found)])
    for subset, balancer in (("v1", SimpleLB.RANDOM), ("v2", None)):
        at_web = Port(named("shop", "web"), 80, subset)
        policy = rules.policy(at_web)
        assert policy.connection_pool
        assert policy.connection_pool.tcp.max_connections == 1
        assert (policy.load_balancer.simple if policy.load_balancer else None) is balancer
        assert rules.revision(at_web) == subset
    told = {(one.of.name, one.type): one.message for one in rules.conditions()}
    assert {name for name, _ in told} == {"a", "b", "c"}
    older = "(an older rule for this host goes before)"
    assert told["c", "PartiallyInvalid"] == f"not honoured: subset v1 {older}, trafficPolicy {older}"
    assert ("b", "PartiallyInvalid") not in told


def test_what_does_not_count_of_a_rule_closes_nothing_and_says_nothing_else() -> None:
    first = limited(1, name="a", created="2026-01-01T00:00:00Z")
    second = destination({"tls": {"mode": "MUTUAL"}}, name="b", created="2026-01-02T00:00:00Z")
    for only_tls in (False, True):
        rules = Destinations(gateway(), [second, first], only_tls=only_tls)
        assert not rules.encryption(Port(named("shop", "web"), 80), AppProtocol.HTTP).is_closed
        (told,) = (one.message for one in rules.conditions() if one.type == "PartiallyInvalid")
        assert told == "not honoured: trafficPolicy (an older rule for this host goes before)"


@pytest.mark.parametrize("mode", ["simple", "SIMPEL", 1])
def test_a_mode_that_is_none_is_refused(mode: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match="mode"):
        destination({"tls": {"mode": mode}})


@pytest.mark.parametrize(
    ("targets", "closed"),
    [
        ('targetRefs: [{group: "", kind: Service, name: web}]', {80, 81}),
        ('targetRef: {group: "", kind: Service, name: web}', {80, 81}),
        ('targetRefs: [{group: "", kind: Service, name: web, sectionName: http-2}]', {81}),
        ('targetRefs: [{group: "", kind: Service, name: other}]', set()),
    ],
)
@pytest.mark.parametrize(
    ("validation", "roots", "why"),
    [
        ("{hostname: web.example, wellKnownCACertificates: System}", Roots({SYSTEM_ROOTS: "roots"}), ""),
        (
            "{hostname: web.example, wellKnownCACertificates: System}", NO_ROOTS,
            f"{SYSTEM_ROOTS} is not read yet",
        ),
        (
            '{hostname: web.example, caCertificateRefs: [{group: "", kind: ConfigMap, name: r}]}', NO_ROOTS,
            "its roots, or those of others for this port, are not read",
        ),
    ],
)  # fmt: skip
def test_nor_where_a_policy_for_backends_says_so(
    targets: str, closed: set[int], validation: str, roots: Roots, why: str
) -> None:
    manifest = """
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {name: tls, namespace: shop}
spec:
  TARGETS
  validation: VALIDATION
"""
    manifest = manifest.replace("TARGETS", targets).replace("VALIDATION", validation)
    parsed = parse(manifest.encode(), "tls.yaml")
    assert not parsed.errors
    found = Objects.of((each.object for each in parsed.objects), DOMAIN)
    world = World()
    world.add_user(
        mesh_service("shop", "web", {n: [Endpoint("10.0.0.1", 8080)] for n in (80, 81)}, [ADDRESS]),
        kubernetes_service("shop", "web", {"port": 80, "name": "http"}, {"port": 81, "name": "http-2"}),
    )
    wanted = Wanted(backend_tls=found.backend_tls, roots=roots)
    for each in (wanted, wanted.reduced):
        made = translate(world.gateway, world.users, {}, world.services, each, DOMAIN)
        for number in (80, 81):
            endpoints = made.assignments[Port(named("shop", "web"), number).cluster]["endpoints"]
            is_encrypted = "transportSocket" in made.clusters[Port(named("shop", "web"), number).cluster]
            assert is_encrypted is (number in closed and not why and each is wanted)
            assert bool(endpoints) is (number not in closed or is_encrypted)
        told = [(str(one.of), one.message) for one in made.destinations if one.message]
        message = f"not honoured: {why}: endpoints get nothing"
        assert told == ([("BackendTLSPolicy shop/tls", message)] if closed and why else [])


def test_nor_where_an_envoy_refused_something_else() -> None:
    wanted = Wanted(destinations=[destination({"tls": {"mode": "SIMPLE"}, **ONE_AT_A_TIME})])
    at_web = Port(named("shop", "web"), 80)
    rules = Destinations(gateway(), wanted.reduced.destinations, only_tls=wanted.reduced.only_tls)
    assert rules.encryption(at_web, AppProtocol.HTTP) == Encryption(is_closed=True)
    assert rules.policy(at_web).connection_pool is None


def test_what_is_not_honoured_is_told() -> None:
    policy = {
        "tls": {"mode": "MUTUAL"},
        "tunnel": {"targetHost": "x"},
        "loadBalancer": {"simple": "PASSTHROUGH", "warmup": {"duration": "10s"}},
        "connectionPool": {"tcp": {"tcpKeepalive": {"time": "10s"}}, "http": {"useClientProtocol": True}},
        "portLevelSettings": [{"port": {"number": 80}, "tls": {"mode": "ISTIO_MUTUAL"}}],
    }
    rules = Destinations(gateway(), [destination(policy, subsets=[{"name": "v1", "labels": {"tier": "1"}}])])
    rules.policy(Port(named("shop", "web"), 80))
    accepted, partly = rules.conditions()
    assert (accepted.type, accepted.status) == ("Accepted", True)
    told = partly.message.removeprefix("not honoured: ").split(", ")
    assert told == [
        "subset v1 (by other labels than one of a version)",
        f"trafficPolicy.{MUTUAL}",
        "trafficPolicy.loadBalancer.warmup",
        "trafficPolicy.loadBalancer.simple PASSTHROUGH",
        "trafficPolicy.connectionPool.tcp.tcpKeepalive",
        "trafficPolicy.connectionPool.http.useClientProtocol",
        "trafficPolicy.tunnel",
        "portLevelSettings[80].tls",
    ]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"host": ""}, "host"),
        ({"trafficPolicy": {"loadBalancer": {"simple": "BEST"}}}, "simple"),
        ({"trafficPolicy": {"loadBalancer": {"consistentHash": {}}}}, "one of httpHeaderName"),
        (
            {
                "trafficPolicy": {
                    "loadBalancer": {"simple": "RANDOM", "consistentHash": {"useSourceIp": True}}
                }
            },
            "only one of simple",
        ),
        ({"trafficPolicy": {"connectionPool": {"tcp": {"connectTimeout": "soon"}}}}, "connectTimeout"),
        ({"trafficPolicy": {"outlierDetection": {"maxEjectionPercent": 101}}}, "maxEjectionPercent"),
        ({"trafficPolicy": {"portLevelSettings": [{}]}}, "port"),
        ({"trafficPolicy": {"connectionPool": {"tcp": {"connectTimeout": "0s"}}}}, "connectTimeout"),
        ({"trafficPolicy": {"connectionPool": {"tcp": {"connectTimeout": "0.1ns"}}}}, "connectTimeout"),
        ({"trafficPolicy": {"connectionPool": {"http": {"idleTimeout": "87000000h"}}}}, "idleTimeout"),
        ({"trafficPolicy": {"connectionPool": {"http": {"idleTimeout": f"{'9' * 60}s"}}}}, "idleTimeout"),
        ({"trafficPolicy": {"outlierDetection": {"interval": "0s"}}}, "interval"),
        ({"trafficPolicy": hashed(maglev={"tableSize": 1})}, "prime"),
        ({"trafficPolicy": hashed(maglev={"tableSize": 1000})}, "prime"),
        ({"trafficPolicy": hashed(maglev={"tableSize": 5000077})}, "prime"),
        ({"trafficPolicy": hashed(ringHash={"minimumRingSize": 8388609})}, "minimumRingSize"),
        ({"trafficPolicy": hashed(minimumRingSize=8388609)}, "minimumRingSize"),
        ({"trafficPolicy": hashed(httpHeaderName="a\nb")}, "httpHeaderName"),
    ],
)
def test_a_spec_that_is_wrong_is_refused(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        destination(None, **spec) if "host" in spec else destination(spec.get("trafficPolicy"))
