"""Whatever happens to a mesh, the planned steps make the maps say it, and are safe one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pykmesh.contracts.address import Families, Mode, Range, Service, Waypoint, Workload
from pykmesh.contracts.waypoints import HANDOFF_PORT, slice_name
from pykmesh.kernel.layout import AddressKind, Reason
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    ENDPOINT_KEY,
    ENDPOINT_VALUE,
    RANGE_KEY,
    RANGE_VALUE,
    Ip,
    ip_from_text,
    ip_to_text,
    network_id,
    range_to_text,
)
from pykmesh.proto.workload_pb2 import Address
from services.map_writer import planner
from services.map_writer.desired import Rules, desired_service, own_endpoints
from services.map_writer.mesh import Mesh, Touched, place_of
from services.map_writer.planner import Held, Limits, Planner
from services.map_writer.slots import split
from tests.unit import mesh_model as model
from tests.unit.mesh_model import Change, Maps, Plain, change, responses

NO_ROOM = (AddressKind.SERVICE, Reason.NO_ROOM)
ROOMY = Limits(1000, 1000, 1000)
EXAMPLES = settings(
    max_examples=150, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(scope="module", autouse=True)
def _in_small_steps() -> Iterator[None]:
    """What goes on only in large plans does in these too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STEP_ENTRIES", "MANY_PLACES", "PAUSE_SERVICES"):
            patch.setattr(planner, name, 2)
        yield


class World:
    """A mesh, the planner that follows it, and the maps that it writes."""

    def __init__(self, limits: Limits = ROOMY, maps: Maps | None = None) -> None:
        self.mesh = Mesh(model.HERE)
        self.maps = maps or Maps(limits)
        self.planner = Planner(held(self.maps), limits, Rules())

    def take(self, response: list[Change]) -> None:
        touched = Touched()
        model.put(self.mesh, response, touched)
        self.maps.apply(self.planner.plan(self.mesh, touched))


def held(maps: Maps) -> Held:
    """What map_writer reads from the maps at its start."""
    found = Held()
    found.services.update(maps.maps["services"])
    for key, value in maps.maps["addresses"].items():
        found.add_address(key, value)
    for key, value in maps.maps["ranges"].items():
        found.ranges[ADDRESS_KEY.pack(*RANGE_VALUE.unpack(value))] = key
    for key, value in maps.maps["endpoints"].items():
        list_id, slot = ENDPOINT_KEY.unpack(key)
        found.add_endpoint(list_id, slot, value)
    found.has_views = any(map(any, maps.maps["switches"].values()))
    return found


@EXAMPLES
@given(responses())
def test_after_any_changes_the_maps_say_the_mesh_and_every_step_is_safe(script: list[list[Change]]) -> None:
    world = World()
    for response in script:
        world.take(response)
        assert world.maps.plain() == model.expected(world.mesh)
    assert world.planner.refused == {}


@EXAMPLES
@given(responses(), st.lists(st.integers(1, 3), min_size=8, max_size=8))
def test_responses_that_are_written_together_come_to_the_same(
    script: list[list[Change]], sizes: list[int]
) -> None:
    world = World()
    for size in sizes:
        together, script = script[:size], script[size:]
        touched = Touched()
        for response in together:
            later = Touched()
            model.put(world.mesh, response, later)
            touched.extend(later)
        world.maps.apply(world.planner.plan(world.mesh, touched))
        assert world.maps.plain() == model.expected(world.mesh)
    assert world.planner.refused == {}


def test_where_near_endpoints_are_preferred_a_change_that_takes_none_nearer_looks_at_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, looked = World(), list[str]()
    service = made("shop/a.shop", vips=(("", ip_from_text("10.96.0.1")),))
    shop = msgspec.structs.replace(service, mode=Mode.FAILOVER, scopes=(1,))
    world.mesh.here = model.HERE._replace(region="r")

    def pod(number: int, region: str, *, healthy: bool = True) -> Change:
        uid = model.UIDS[number]
        found = msgspec.structs.replace(
            member(uid, shop), healthy=healthy, waypoint=None, host_network=False, prefers_hbone=True
        )
        return Change(uid, msgspec.structs.replace(found, raw=model.encoded(found, (region, "y", "there"))))

    def count() -> int:
        assert world.maps.plain() == model.expected(world.mesh)
        return len(world.maps.maps["endpoints"])

    world.take([Change(shop.name, shop), *(pod(n, "r") for n in (0, 1)), *(pod(n, "s") for n in (2, 3))])
    assert count() == 2
    whole = world.planner._plan_service

    def plan(mesh: Mesh, name: str, *others: Any) -> None:
        looked.append(name)
        whole(mesh, name, *others)

    monkeypatch.setattr(world.planner, "_plan_service", plan)
    ways = [
        ([pod(1, "r", healthy=False)], 1),
        ([pod(2, "s", healthy=False)], 1),
        ([pod(2, "s")], 1),
        ([pod(1, "r")], 2),
        ([pod(4, "r")], 3),
        ([Change(model.UIDS[4], None)], 2),
    ]
    ways += [([pod(0, "s"), pod(1, "s")], 4), ([pod(3, "r")], 1)]
    for number, (changes, left) in enumerate(ways):
        touched = Touched()
        for name, resource in changes:  # as what comes with few others is taken in
            if isinstance(resource, Workload):
                world.mesh.put(name, resource, touched)
            else:
                world.mesh.remove(name, touched)
        world.maps.apply(world.planner.plan(world.mesh, touched))
        assert (count(), looked) == (left, [shop.name] * max(0, number - 5))


@EXAMPLES
@given(responses())
def test_what_stays_is_reachable_at_every_step_and_nobody_else_ever_is(script: list[list[Change]]) -> None:
    """Nothing is deleted before its replacement is there.

    An entry that goes, or changes hands, may lend its service's new endpoints until then, and nobody
    else's.
    """
    world = World()
    for response in script:
        take_write_by_write(world, response)


def take_write_by_write(world: World, response: list[Change]) -> None:
    touched = Touched()
    model.put(world.mesh, response, touched)
    steps = list(world.planner.plan(world.mesh, touched))
    before, done = world.maps.reachable(), copy.deepcopy(world.maps)
    done.apply(steps)
    after, members = done.reachable(), done.members()
    stays = [k for k in before.keys() & after.keys() if world.maps.list_of(k) == done.list_of(k)]
    for _ in world.maps.writes(steps):
        now = world.maps.reachable()
        assert before.keys() & after.keys() <= now.keys() <= before.keys() | after.keys()
        for key, endpoints in now.items():
            own = before.get(key, set()) | after.get(key, set())
            assert endpoints <= own | members.get(world.maps.list_of(key), set())
        for key in stays:
            assert before[key] & after[key] <= now[key]


@pytest.mark.parametrize("pods", [1, 2, 3])
def test_no_endpoint_is_taken_for_an_instance_when_a_waypoint_comes_or_goes(pods: int) -> None:
    """Nor an instance for an endpoint: it would not be told what a connection is for, and close it."""
    world, (instance, *others) = World(), model.UIDS
    shop = made("shop/a.shop", vips=(("", ip_from_text("10.96.0.1")),))
    waypoint = msgspec.structs.replace(made("shop/b.shop"), ports=((HANDOFF_PORT, 15008),))
    by_waypoint = msgspec.structs.replace(shop, waypoints=(Waypoint(service=waypoint.name),))
    members = [member(instance, waypoint), *(member(uid, shop) for uid in others[:pods])]
    world.take([Change(resource.name, resource) for resource in (shop, waypoint)])
    world.take([Change(pod.uid, pod) for pod in members])
    for resource in (by_waypoint, shop, by_waypoint):
        take_write_by_write(world, [Change(shop.name, resource)])
        assert world.maps.plain() == model.expected(world.mesh)


def test_several_waypoints_share_connections_by_their_weights() -> None:
    """And by those of their instances; one that has none leaves its share to the others."""
    world, uids = World(), model.UIDS
    shop = made("shop/a.shop", vips=(("", ip_from_text("10.96.0.1")),))
    old, new = (
        msgspec.structs.replace(made(name), ports=((HANDOFF_PORT, 15008),))
        for name in ("shop/b.shop", "shop/c.shop")
    )
    weighted = (Waypoint(service=old.name, weight=90), Waypoint(service=new.name, weight=10))
    by_waypoint = msgspec.structs.replace(shop, waypoints=weighted)
    world.take([Change(resource.name, resource) for resource in (by_waypoint, old, new)])

    def said() -> object:
        assert world.maps.plain() == model.expected(world.mesh)
        (found,) = world.maps.plain()["services"].values()
        return [found[0], *(text.split()[-1] for text in found[3:])]

    assert said() == [Reason.WAYPOINT_UNAVAILABLE]
    world.take([Change(uid, member(uid, new)) for uid in uids[1:3]])
    assert said() == [Reason.ROUTED, "500", "500"]
    heavy = msgspec.structs.replace(member(uids[2], new), capacity=4)
    heavy = msgspec.structs.replace(heavy, raw=Address(workload={"uid": uids[2]}).SerializeToString())
    world.take([Change(uids[0], member(uids[0], old)), Change(uids[2], heavy)])
    assert said() == [Reason.ROUTED, "900", "20", "80"]
    world.take([Change(uid, None) for uid in uids[1:3]])
    assert said() == [Reason.ROUTED, "1000"]
    world.take([Change(new.name, made(new.name))])
    assert said() == [Reason.WAYPOINT_UNSUPPORTED]


def test_waypoints_that_go_by_way_of_each_other_or_of_themselves_lead_to_instances_all_the_same() -> None:
    """Whatever a control plane says: a connection goes by way of one, and no further in the kernel."""
    world, uids = World(), model.UIDS
    one, other = (
        msgspec.structs.replace(
            made(name), ports=((HANDOFF_PORT, 15008),), vips=(("", ip_from_text(vip)),),
            waypoints=(Waypoint(service=by),),
        )
        for name, vip, by in (
            ("shop/b.shop", "10.96.0.1", "shop/c.shop"), ("shop/c.shop", "10.96.0.2", "shop/b.shop"),
        )
    )  # fmt: skip
    itself = msgspec.structs.replace(one, waypoints=(Waypoint(service=one.name),))
    world.take([Change(each.name, each) for each in (one, other)])
    world.take([Change(uids[0], member(uids[0], one)), Change(uids[1], member(uids[1], other))])
    assert world.maps.plain() == model.expected(world.mesh)
    assert {found[0] for found in world.maps.plain()["services"].values()} == {Reason.ROUTED}
    world.take([Change(one.name, itself)])
    assert world.maps.plain() == model.expected(world.mesh)
    assert {found[0] for found in world.maps.plain()["services"].values()} == {Reason.ROUTED}


def test_a_waypoint_of_another_node_serves_where_this_one_has_none_and_the_mesh_has_a_key() -> None:
    shop = msgspec.structs.replace(
        made("shop/a.shop", vips=(("", ip_from_text("10.96.0.1")),)), waypoints=(Waypoint("shop/b.shop"),)
    )
    waypoint = msgspec.structs.replace(made("shop/b.shop"), ports=((HANDOFF_PORT, 15008),))
    of_here, elsewhere = (
        f"Kubernetes/discovery.k8s.io/EndpointSlice/shop/{slice_name('b', node)}/10.0.0.1"
        for node in (model.HERE.node, "elsewhere")
    )

    def instances(rules: Rules, *fronts: str) -> set[str]:
        mesh = Mesh(model.HERE)
        for resource in (shop, waypoint):
            mesh.put(resource.name, resource, Touched())
        for number, uid in enumerate(fronts):
            mesh.put(uid, msgspec.structs.replace(member(model.UIDS[number], waypoint), uid=uid), Touched())
        found = desired_service(mesh, shop.name, rules)
        (frontend,) = found.frontends.values()
        uids = {uid for values in found.lists.values() for uid in values.values()}
        assert frontend.verdict is (Reason.ROUTED if uids else Reason.WAYPOINT_UNAVAILABLE)
        return uids

    alone, with_key = Rules(), Rules(has_mesh_key=True)
    assert instances(alone, elsewhere) == set()
    assert instances(with_key, elsewhere) == {elsewhere}
    assert instances(with_key, elsewhere, of_here) == {of_here} == instances(alone, elsewhere, of_here)


def member(uid: str, service: Service) -> Workload:
    drawn = (model.change(number).resource for number in range(1000))
    found = next(resource for resource in drawn if isinstance(resource, Workload))
    message = Address(workload={"uid": uid, "name": repr(service)})
    return msgspec.structs.replace(
        found,
        uid=uid,
        network="",
        addresses=(ip_from_text(f"10.1.1.{model.UIDS.index(uid)}"),),
        services=((service.name, ()),),
        healthy=True,
        capacity=1,
        raw=message.SerializeToString(),
    )


def test_an_address_of_the_nodes_is_a_pods_when_no_service_leads_there_any_more() -> None:
    world, address = World(), ip_from_text("10.1.1.0")
    (old, stays, new), shop = model.UIDS[:3], made("shop/a.shop", vips=(("", ip_from_text("10.96.0.1")),))
    of_node = msgspec.structs.replace(member(old, shop), host_network=True)
    pod = msgspec.structs.replace(
        member(new, made("shop/b.shop")), addresses=(address,), prefers_hbone=False, waypoint=None
    )
    pod = msgspec.structs.replace(pod, raw=model.encoded(pod))
    world.take([Change(shop.name, shop), Change(old, of_node), Change(stays, member(stays, shop))])
    touched, place = Touched(), place_of("", address)
    model.put(world.mesh, [Change(old, None), Change(new, pod)], touched)
    assert touched.new_pods == [place]
    for _ in world.maps.writes(world.planner.plan(world.mesh, touched)):
        leads_there = any(
            text.startswith("10.1.1.0 ") for found in world.maps.reachable().values() for text in found
        )
        assert not (leads_there and place in world.maps.maps["addresses"])
    assert place in world.maps.maps["addresses"]


@EXAMPLES
@given(responses(ranges=False))
def test_a_client_is_sent_where_it_was_before_or_will_be_after_and_nowhere_else(
    script: list[list[Change]],
) -> None:
    """To a service that was its before or will be, in its old or new state; or let be as before or after.

    Also while its namespace gains a view of its own, or loses it. (Not so with ranges: where one push
    makes a range of a namespace's own and an address in it of another, the range may show a moment before.)
    """
    world = World()
    for response in script:
        clients = set(_clients(world.mesh))
        before = _decisions(world.maps, clients)
        touched = Touched()
        model.put(world.mesh, response, touched)
        steps = list(world.planner.plan(world.mesh, touched))
        done = copy.deepcopy(world.maps)
        done.apply(steps)
        stay = clients & set(_clients(world.mesh))
        after = _decisions(done, stay)
        for _ in world.maps.writes(steps):
            for where, decision in _decisions(world.maps, stay).items():
                (_, own), (_, was), (_, becomes) = decision, before[where], after[where]
                is_theirs = own != "" and own in (was, becomes)
                assert is_theirs or decision in (before[where], after[where]), where


def _clients(mesh: Mesh) -> Iterator[tuple[Ip, int, str]]:
    """The workloads that are found by an address, with their namespace."""
    for workload in mesh.all_workloads():
        for ip in workload.addresses:
            if mesh.pod_at(place_of(workload.network, ip)) == workload:
                yield ip, network_id(workload.network), workload.namespace


def _decisions(maps: Maps, clients: set[tuple[Ip, int, str]]) -> dict[tuple[object, ...], tuple[Reason, str]]:
    return {
        (ip, network, vip, port): maps.decision((ip, network), vip, port)
        for ip, network, _ in clients
        for vip in model.VIPS
        for port in model.PORTS
    }


@EXAMPLES
@example([[change(259584), change(35060394), change(36836799)]])  # an own range in one that has a view
@given(responses())
def test_each_client_gets_to_the_service_that_it_sees(script: list[list[Change]]) -> None:
    """Own addresses before ranges, its namespace's own ranges before longer ones of others."""
    world = World()
    for response in script:
        world.take(response)
    for ip, network, namespace in set(_clients(world.mesh)):
        for asked in model.ASKED if not network else ():
            service = model.seen(world.mesh, namespace, asked)
            for port in model.PORTS:
                verdict, found = world.maps.decision((ip, network), asked, port)
                if service is not None and port in dict(service.ports):
                    assert found == f"{service.name} {port}"
                else:
                    passes = service is None or (service.mode is Mode.PASSTHROUGH and not service.waypoints)
                    assert not found
                    assert (verdict in (Reason.ROUTED, Reason.PASSTHROUGH)) == passes


@EXAMPLES
@given(responses())
def test_what_is_held_is_always_what_the_maps_hold(script: list[list[Change]]) -> None:
    world = World()
    for response in script:
        world.take(response)
    read = held(world.maps)
    assert world.planner.held.services == read.services
    assert world.planner.held.addresses == read.addresses
    assert {k: split(v) for k, v in world.planner.held.lists.items() if v} == read.lists
    assert world.planner.held.endpoints == read.endpoints


@EXAMPLES
@given(responses(), responses())
def test_a_sweep_over_another_meshs_maps_is_safe_and_leaves_this_mesh_alone(
    before: list[list[Change]], after: list[list[Change]]
) -> None:
    old = World()
    for response in before:
        old.take(response)
    new = World(maps=old.maps)
    for response in after:
        model.put(new.mesh, response, Touched())
    new.maps.apply(new.planner.sweep(new.mesh))
    assert new.maps.plain() == model.expected(new.mesh)
    assert list(new.planner.sweep(new.mesh)) == []


@EXAMPLES
@given(responses(), responses(), st.data())
def test_a_sweep_mends_maps_that_a_crash_left_anyhow(
    before: list[list[Change]], after: list[list[Change]], data: st.DataObject
) -> None:
    broken = World()
    for response in before:
        broken.take(response)
    for name, entries in broken.maps.maps.items():
        for key in data.draw(
            st.lists(st.sampled_from(sorted(entries)), unique=True) if entries else st.just([])
        ):
            del broken.maps.maps[name][key]
    new = World(maps=broken.maps)
    for response in after:
        model.put(new.mesh, response, Touched())
    new.maps.apply(new.planner.sweep(new.mesh), checked=False)
    new.maps.assert_safe()
    assert new.maps.plain() == model.expected(new.mesh)


@EXAMPLES
@given(responses())
def test_a_mesh_that_does_not_change_plans_nothing(script: list[list[Change]]) -> None:
    world = World()
    for response in script:
        world.take(response)
    again = Touched()
    again.add(world.mesh.services, world.mesh.places())
    assert list(world.planner.plan(world.mesh, again)) == []
    assert list(world.planner.sweep(world.mesh)) == []


@EXAMPLES
@given(
    responses(ranges=False), responses(ranges=False), st.integers(0, 6), st.integers(0, 8), st.integers(0, 8)
)
def test_limits_are_kept_at_every_step_and_what_does_not_fit_is_named(
    first: list[list[Change]], then: list[list[Change]], services: int, endpoints: int, addresses: int
) -> None:
    world = World(Limits(services, endpoints, addresses))
    for response in [*first, *then]:
        world.take(response)
        said, wanted = world.maps.plain(full=True), model.expected(world.mesh)
        if world.planner.refused:
            assert {limit for why in world.planner.refused.values() for limit in why.split(", ")} <= {
                f"map {name} is full ({getattr(world.maps.limits, name)} entries)" for name in Limits._fields
            }
            assert world.planner.refused.keys() <= world.mesh.services.keys() | world.mesh.workloads.keys()
            _assert_only_less(said, wanted)
            _assert_closed(world, said, wanted)
        else:
            assert said == wanted


def without_shares(endpoints: Iterable[object]) -> set[str]:
    return {str(endpoint).rpartition(" ")[0] for endpoint in endpoints}


def _assert_only_less(said: Plain, wanted: Plain) -> None:
    """What is there is right; some of it may be missing."""
    for key, found in said["addresses"].items():
        assert found == wanted["addresses"][key] or found[:2] == NO_ROOM
    for key, (verdict, _, _, *endpoints) in said["services"].items():
        right, _, _, *all_of_them = wanted["services"][key]
        assert without_shares(endpoints) <= without_shares(all_of_them)
        assert verdict == (Reason.NO_ROOM if all_of_them and not endpoints else right)


def _assert_closed(world: World, said: Plain, wanted: Plain) -> None:
    """An address of which a port is missing refuses for want of room, unless it is to be left alone.

    It is one of a service that is refused by name. One of a workload that goes by way of a waypoint says so.
    """
    left_alone = (AddressKind.SERVICE, Reason.PASSTHROUGH)
    refused = (AddressKind.WORKLOAD, Reason.WAYPOINT_UNAVAILABLE)
    for key in wanted["services"].keys() - said["services"].keys():
        assert said["addresses"].get(key.rpartition(" ")[0], NO_ROOM)[:2] in (NO_ROOM, left_alone, refused)
    for key, found in said["addresses"].items():
        if found[:2] == NO_ROOM:
            network, ip = key.split(" ")
            owner = model.owner(world.mesh, ip_from_text(ip), network.removeprefix("@") or None)
            assert owner is not None
            assert owner.name in world.planner.refused


@EXAMPLES
@given(responses(), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_once_everything_else_has_gone_what_is_left_fits_after_all(
    script: list[list[Change]], services: int, endpoints: int, addresses: int
) -> None:
    """Room made by a removal is used in the same plan: there may be no other for a long time."""
    world = World(Limits(services, endpoints, addresses))
    for response in script:
        world.take(response)
    for name in [*world.mesh.services, *world.mesh.workloads]:
        wanted = model.expected(world.mesh)
        lists = {(s, e) for s, (_, *es) in wanted["services"].items() for e in es}
        if (
            len(wanted["services"]) <= services
            and len(lists) <= endpoints
            and len(wanted["addresses"]) <= addresses
        ):
            assert world.planner.refused == {}
            assert world.maps.plain() == wanted
        world.take([Change(name, None)])
    assert world.planner.refused == {}
    assert world.maps.plain() == {"services": {}, "addresses": {}, "ranges": {}}


def test_an_address_that_moves_into_a_full_map_takes_the_place_of_what_goes() -> None:
    world = World(Limits(1, 1, 1))
    service, other = (f"shop/{letter}.shop" for letter in "ab")
    for name, goes, vip in ((service, other, model.VIPS[0]), (other, service, model.VIPS[1])):
        world.take([Change(goes, None), Change(name, made(name, vips=(("", vip),)))])
        assert world.planner.refused == {}
        assert world.maps.plain() == model.expected(world.mesh)


def test_a_range_leads_to_what_is_there_and_one_without_room_is_named() -> None:
    world = World(Limits(9, 9, 9, ranges=1))
    first, second = (
        made(f"shop/{letter}.shop", ranges=(Range("", ip_from_text(f"10.{number}.0.0"), 112),))
        for number, letter in enumerate("ab")
    )
    world.take([Change(first.name, first), Change(second.name, second)])
    assert world.planner.refused == {second.name: "map ranges is full (1 entries)"}
    assert ranges(world) == {"10.0.0.0/16"}
    world.take([Change(first.name, None)])
    assert world.planner.refused == {}
    assert ranges(world) == {"10.1.0.0/16"}
    after = World(ROOMY, world.maps)
    after.take([])
    assert ranges(after) == {"10.1.0.0/16"}
    after.maps.apply(after.planner.sweep(after.mesh))
    assert not any(after.maps.maps.values())


def ranges(world: World) -> set[str]:
    keys = map(RANGE_KEY.unpack, world.maps.maps["ranges"])
    return {range_to_text(ip, bits - 32) for bits, _, ip in keys}


def made(name: str, *, vips: tuple[tuple[str, Ip], ...] = (), ranges: tuple[Range, ...] = ()) -> Service:
    return Service(
        name=name,
        hostname="h",
        vips=vips,
        ranges=ranges,
        ports=((80, 8080),),
        families=Families.V4,
        mode=Mode.UNSPECIFIED,
        scopes=(),
        allows_unhealthy=False,
        waypoints=(),
        canonical=False,
    )


def test_a_service_may_name_a_range_twice() -> None:
    world = World()
    twice = Range("", ip_from_text("10.96.0.0"), 120)
    drawn = (model.change(number).resource for number in range(1000))
    service = next(resource for resource in drawn if isinstance(resource, Service))
    service = msgspec.structs.replace(service, ranges=(twice, twice))
    world.take([Change(service.name, service)])
    world.take([Change(service.name, None)])
    assert world.maps.plain() == {"services": {}, "addresses": {}, "ranges": {}}


HERE, THERE = ip_from_text("10.5.0.1"), ip_from_text("10.5.0.2")


def outside(hostname: str, service: Service) -> Workload:
    return msgspec.structs.replace(
        member(model.UIDS[0], service), uid=hostname, hostname=hostname, addresses=()
    )


def host_world() -> tuple[World, Service]:
    world, service = World(), made("shop/out.example.com", vips=(("", ip_from_text("240.0.0.1")),))
    touched = Touched()
    world.mesh.put(service.name, service, touched)
    world.mesh.put("a", outside("a.test", service), touched)
    world.mesh.resolve("a.test", (HERE,), touched)
    world.maps.apply(world.planner.plan(world.mesh, touched))
    return world, service


def endpoints(world: World) -> set[str]:
    lists = world.planner.held.lists.values()
    return {ip_to_text(ENDPOINT_VALUE.unpack(value)[1]) for found in lists for value in split(found)}


def test_a_host_name_is_what_it_was_for_who_was_there_before_until_it_is_looked_up() -> None:
    world, service = host_world()
    assert endpoints(world) == {"10.5.0.1"}
    mesh, planner = Mesh(), Planner(held(world.maps), ROOMY, Rules())
    mesh.put(service.name, service, Touched())
    mesh.put("a", outside("a.test", service), Touched())
    planner.stand_in_hosts(mesh, is_first=True)
    assert mesh.resolved == {"a.test": (HERE,)}
    assert not mesh.stand_ins
    assert not mesh.unlooked


def test_one_that_comes_in_place_of_another_stands_for_the_same_until_it_is_looked_up() -> None:
    world, service = host_world()
    touched = Touched()
    world.mesh.remove("a", touched)
    world.mesh.put("b", outside("b.test", service), touched)
    world.planner.stand_in_hosts(world.mesh, is_first=False)
    world.maps.apply(world.planner.plan(world.mesh, touched))
    assert endpoints(world) == {"10.5.0.1"}
    assert world.mesh.stand_ins == {"b.test"}
    world.mesh.resolve("b.test", (THERE,), touched := Touched())
    world.maps.apply(world.planner.plan(world.mesh, touched))
    assert endpoints(world) == {"10.5.0.2"}
    assert not world.mesh.stand_ins


def test_it_stands_for_nothing_that_a_pod_left() -> None:
    world, service = host_world()
    touched = Touched()
    world.mesh.remove("a", touched)
    world.mesh.resolve("a.test", (), touched)
    world.mesh.put("p", msgspec.structs.replace(member(model.UIDS[1], service), addresses=(THERE,)), touched)
    world.maps.apply(world.planner.plan(world.mesh, touched))
    touched = Touched()
    world.mesh.remove("p", touched)
    world.mesh.put("b", outside("b.test", service), touched)
    world.planner.stand_in_hosts(world.mesh, is_first=False)
    assert not world.mesh.resolved


def own(world: World, service: Service) -> list[tuple[str, int, list[str]]]:
    (found,) = own_endpoints(world.mesh, service, Rules()).values()
    return [(each.address, each.weight, each.others) for each in found]


def test_a_host_with_several_addresses_is_as_many_endpoints_which_share_its_weight() -> None:
    world, service = host_world()
    touched = Touched()
    addresses = ["10.5.0.1", "10.5.0.2", "10.5.0.3"]
    world.mesh.resolve("a.test", tuple(map(ip_from_text, addresses)), touched)
    pod = msgspec.structs.replace(member(model.UIDS[1], service), addresses=(ip_from_text("10.6.0.1"),))
    world.mesh.put("b", pod, touched)
    assert own(world, service) == [(each, 1, []) for each in addresses] + [("10.6.0.1", 3, [])]


@pytest.mark.parametrize("vip", ["240.0.0.1", "fd00::99"])
def test_a_pod_with_addresses_of_both_families_is_one_endpoint(vip: str) -> None:
    """At that of the family that the service has first; one that has none of it is at its own."""
    world, service = World(), made("shop/out.example.com", vips=(("", ip_from_text(vip)),))
    service = msgspec.structs.replace(service, families=Families.DUAL)
    touched = Touched()
    world.mesh.put(service.name, service, touched)
    for uid, addresses in zip(model.UIDS, (["10.6.0.1", "fd00::1"], ["10.6.0.2"], ["fd00::3"]), strict=False):
        pod = msgspec.structs.replace(member(uid, service), addresses=tuple(map(ip_from_text, addresses)))
        world.mesh.put(uid, pod, touched)
    found = own(world, service)
    assert {weight for _, weight, _ in found} == {0}
    expected = {"10.6.0.1": ["fd00::1"], "10.6.0.2": [], "fd00::3": []}
    if ":" in vip:
        expected = {"fd00::1": ["10.6.0.1"], "10.6.0.2": [], "fd00::3": []}
    assert {address: others for address, _, others in found} == expected
