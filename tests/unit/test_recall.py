"""What is said wrongly when map_writer and xds_client have begun anew stays as the maps have it."""

from __future__ import annotations

import copy
from itertools import chain

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykmesh.contracts.address import Policy, Waypoint
from pykmesh.contracts.waypoints import HANDOFF_PORT
from pykmesh.kernel.layout import Reason
from pykmesh.kernel.records import SERVICE_VALUE, ip_from_text, is_view
from pykmesh.proto.workload_pb2 import Address
from services.map_writer.desired import Rules
from services.map_writer.mesh import Touched
from services.map_writer.planner import Held, Planner
from services.map_writer.recall import place_of_key
from services.map_writer.slots import weighed, weights_of
from tests.unit import mesh_model as model
from tests.unit.mesh_model import NAMES, UIDS, Change, responses
from tests.unit.test_planner import EXAMPLES, ROOMY, World, held, made, member

VIP = ip_from_text("10.96.0.1")
SHOP = made("shop/a.shop", vips=(("", VIP),))


def begun_anew(old: World, *wrong: str) -> World:
    """With the same maps and the same mesh, but for what nobody can read any more."""
    new = World(maps=copy.deepcopy(old.maps))
    for name, found in chain(old.mesh.services.items(), old.mesh.workloads.items()):
        if name not in wrong:
            new.mesh.put(name, old.mesh.workload(name) if isinstance(found, bytes) else found, Touched())
    new.mesh.unreadable.update(dict.fromkeys(wrong))
    new.maps.apply(new.planner.sweep(new.mesh))
    assert list(new.planner.sweep(new.mesh)) == [], "as it is it is as it should be"
    return new


@EXAMPLES
@given(responses(), st.sets(st.sampled_from(NAMES + UIDS), min_size=1))
def test_it_is_reached_at_least_where_it_was_and_goes_or_comes_when_that_is_said(
    script: list[list[Change]], wrong: set[str]
) -> None:
    old = World()
    for response in script:
        old.take(response)
    new = begun_anew(old, *wrong)
    before, now = old.maps.maps, new.maps.maps
    for key, value in before["services"].items():
        place, list_id = place_of_key(key), SERVICE_VALUE.unpack(value)[0]
        owner = old.planner.owner_of_list[list_id].service
        is_taken = new.mesh.is_a_services(place) or (owner in UIDS and new.mesh.is_a_workloads(place))
        if is_view(key) or is_taken or owner not in wrong:
            continue
        assert new.maps.list_of(key) == list_id
        assert new.maps.members().get(list_id, set()) <= old.maps.members().get(list_id, set())
        assert now["addresses"][place] == before["addresses"][place]
    known = {name: old.mesh.services.get(name) for name in wrong}
    known |= {name: old.mesh.workload(name) for name in wrong & old.mesh.workloads.keys()}
    well, gone = begun_anew(old, *wrong), new
    well.take([Change(name, found) for name, found in known.items()])
    gone.take([Change(name, None) for name in known])
    for world in (well, gone):
        assert world.maps.plain() == model.expected(world.mesh)
        assert not world.planner.recalled.names


@EXAMPLES
@given(responses(), st.sets(st.sampled_from(NAMES + UIDS), min_size=1), responses())
def test_whatever_comes_then_the_maps_are_what_a_start_would_make_of_them(
    script: list[list[Change]], wrong: set[str], later: list[list[Change]]
) -> None:
    old = World()
    for response in script:
        old.take(response)
    world = begun_anew(old, *wrong)
    for response in later:
        world.take(response)
        at_a_start = Planner(held(world.maps), ROOMY, Rules())
        assert list(at_a_start.sweep(world.mesh)) == []
        assert at_a_start.recalled.names == world.planner.recalled.names


def endpoints(world: World) -> list[str]:
    """With what each gets of a thousand connections."""
    ((verdict, _, _, *found),) = world.maps.plain()["services"].values()
    assert verdict is Reason.ROUTED
    return [str(each) for each in found]


def shop(*uids: str) -> World:
    world = World()
    world.take([Change(SHOP.name, SHOP), *(Change(uid, member(uid, SHOP)) for uid in uids)])
    return world


def test_members_go_and_none_comes_until_it_is_said_well_again() -> None:
    world = begun_anew(shop(*UIDS[:3]), SHOP.name)
    assert [text.split()[0] for text in endpoints(world)] == [f"10.1.1.{n}" for n in (0, 1, 2)]
    world.take([Change(UIDS[1], None), Change(UIDS[4], member(UIDS[4], SHOP))])
    assert [text.split()[0] for text in endpoints(world)] == ["10.1.1.0", "10.1.1.2"]
    world.take([Change(UIDS[0], None), Change(UIDS[2], None)])
    assert endpoints(world) == [], "refused for want of endpoints, and not let through"
    world.take([Change(SHOP.name, SHOP)])
    assert [text.split()[0] for text in endpoints(world)] == ["10.1.1.4"]


def test_an_endpoint_that_is_another_workloads_now_is_none_of_it() -> None:
    old = shop(*UIDS[:2])
    other = made("bank/c.bank", vips=(("", ip_from_text("10.96.0.2")),))
    taken = msgspec.structs.replace(member(UIDS[3], other), addresses=member(UIDS[0], SHOP).addresses)
    new = World(maps=copy.deepcopy(old.maps))
    for name, found in ((other.name, other), (UIDS[3], taken), (UIDS[1], member(UIDS[1], SHOP))):
        new.mesh.put(name, found, Touched())
    new.mesh.unreadable[SHOP.name] = None
    new.maps.apply(new.planner.sweep(new.mesh))
    assert [text.split()[0] for text in endpoints_at(new, "10.96.0.1")] == ["10.1.1.1"]
    assert [text.split()[0] for text in endpoints_at(new, "10.96.0.2")] == ["10.1.1.0"]


def endpoints_at(world: World, ip: str) -> list[str]:
    (found,) = (value for name, value in world.maps.plain()["services"].items() if f" {ip} " in name)
    return [str(each) for each in found[3:]]


def test_weights_stay() -> None:
    old = shop(UIDS[0])
    heavy = msgspec.structs.replace(member(UIDS[1], SHOP), capacity=3)
    heavy = msgspec.structs.replace(heavy, raw=Address(workload={"uid": UIDS[1]}).SerializeToString())
    old.take([Change(UIDS[1], heavy), Change(UIDS[2], member(UIDS[2], SHOP))])
    assert endpoints(begun_anew(old, SHOP.name)) == endpoints(old)
    new = begun_anew(old, SHOP.name)
    new.take([Change(UIDS[2], None)])
    assert [text.split()[-1] for text in endpoints(new)] == ["250", "750"]


@EXAMPLES
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8))
def test_weights_are_what_makes_the_same_slots_again(weights: list[int]) -> None:
    values = [bytes([number]) + bytes(model.VALUE_BYTES["endpoints"] - 1) for number in range(len(weights))]
    once = weighed(values, dict(zip(values, weights, strict=True)))
    found = weights_of(once)
    again = weighed(values, found)
    assert weights_of(again) == found
    assert [found[v] / sum(found.values()) for v in values] == pytest.approx(
        [w / sum(weights) for w in weights]
    )


def test_it_goes_by_way_of_its_waypoint_as_long_as_that_has_instances_and_is_refused_then() -> None:
    old = World()
    waypoint = msgspec.structs.replace(made("shop/b.shop"), ports=((HANDOFF_PORT, 15088),))
    guarded = msgspec.structs.replace(SHOP, waypoints=(Waypoint(service=waypoint.name),))
    old.take([Change(each.name, each) for each in (guarded, waypoint)])
    old.take([Change(uid, member(uid, waypoint)) for uid in UIDS[:2]])
    new = begun_anew(old, guarded.name)
    assert endpoints(new) == endpoints(old)
    new.take([Change(UIDS[0], None)])
    assert len(endpoints(new)) == 1
    new.take([Change(waypoint.name, None)])
    assert endpoints(new) == []


def test_an_address_is_another_services_when_one_that_is_known_has_it() -> None:
    world = begun_anew(shop(*UIDS[:2]), SHOP.name)
    other = made("bank/c.bank", vips=(("", VIP),))
    world.take([Change(other.name, other)])
    assert world.maps.plain() == model.expected(world.mesh)
    assert world.planner.recalled.names == []
    world.take([Change(other.name, None)])
    assert world.maps.plain() == model.expected(world.mesh)


def test_an_address_that_is_a_workloads_for_a_while_stays_the_services() -> None:
    world = begun_anew(shop(UIDS[0]), SHOP.name)
    at = {"addresses": world.maps.plain()["addresses"]}
    guest = msgspec.structs.replace(member(UIDS[3], made("bank/c.bank")), addresses=(VIP,))
    for found in (guest, None):
        world.take([Change(UIDS[3], found)])
        assert world.maps.plain()["addresses"] == at["addresses"]


def test_endpoints_by_host_name_are_what_they_were_until_the_name_is_looked_up() -> None:
    old = World()
    by_name = msgspec.structs.replace(member(UIDS[0], SHOP), addresses=(), hostname="db.example")
    old.take([Change(SHOP.name, SHOP), Change(UIDS[0], by_name)])

    def looked_up(world: World, *ips: str) -> list[str]:
        touched = Touched()
        world.mesh.resolve("db.example", tuple(map(ip_from_text, ips)), touched)
        world.maps.apply(world.planner.plan(world.mesh, touched))
        return [text.split()[0] for text in endpoints(world)]

    assert looked_up(old, "10.9.9.8", "10.9.9.9") == ["10.9.9.8", "10.9.9.9"]
    new = begun_anew(old, SHOP.name)
    assert endpoints(new) == endpoints(old)
    assert looked_up(new, "10.9.9.7", "10.9.9.9") == ["10.9.9.9"]


def test_a_member_that_weighs_nothing_any_more_goes() -> None:
    world = begun_anew(shop(*UIDS[:2]), SHOP.name)
    raw = Address(workload={"uid": UIDS[0], "capacity": {"value": 0}}).SerializeToString()
    world.take([Change(UIDS[0], msgspec.structs.replace(member(UIDS[0], SHOP), capacity=0, raw=raw))])
    assert [text.split()[0] for text in endpoints(world)] == ["10.1.1.1"]


def test_a_waypoint_that_is_wrong_too_serves_who_went_by_way_of_it() -> None:
    old = World()
    waypoint = made("shop/z.shop", vips=(("", ip_from_text("10.96.0.9")),))
    waypoint = msgspec.structs.replace(waypoint, ports=((HANDOFF_PORT, 15088),))
    guarded = msgspec.structs.replace(SHOP, waypoints=(Waypoint(service=waypoint.name),))
    old.take([Change(each.name, each) for each in (guarded, waypoint)])
    old.take([Change(uid, member(uid, waypoint)) for uid in UIDS[:2]])
    new = begun_anew(old, guarded.name, waypoint.name)
    assert endpoints_at(new, "10.96.0.1") == endpoints_at(old, "10.96.0.1")


def test_a_workload_that_was_refused_for_its_policies_is_refused_until_it_is_known() -> None:
    rules = Rules(refuse_unenforced_policy=True)
    old = World()
    old.planner = Planner(Held(), ROOMY, rules)
    old.mesh.put_policy(Policy("shop/p", None), Touched())
    raw = Address(workload={"uid": UIDS[0], "name": "guarded"}).SerializeToString()
    guarded = msgspec.structs.replace(member(UIDS[0], SHOP), policies=("shop/p",), raw=raw)
    old.take([Change(SHOP.name, SHOP), Change(UIDS[0], guarded)])
    refused = old.maps.addresses()[" 10.1.1.0"]
    assert refused[1] is Reason.POLICY_UNSUPPORTED

    new = World(maps=copy.deepcopy(old.maps))
    new.planner = Planner(held(new.maps), ROOMY, rules)
    new.mesh.put(SHOP.name, SHOP, Touched())
    new.mesh.unreadable[UIDS[0]] = None
    new.maps.apply(new.planner.sweep(new.mesh))
    assert new.maps.addresses()[" 10.1.1.0"] == refused
    new.take([Change(UIDS[0], None)])
    assert " 10.1.1.0" not in new.maps.addresses()
