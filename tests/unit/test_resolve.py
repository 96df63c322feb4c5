"""Names as map_writer answers them: of the mesh as it is at that moment."""

from __future__ import annotations

import msgspec
import pytest

from pykmesh.contracts import messages
from pykmesh.contracts.address import Service, Waypoint, decode_address
from pykmesh.contracts.messages import (
    VERSION,
    NamesChanged,
    ResolveReply,
    ResolveRequest,
    WorkloadName,
)
from pykmesh.kernel.records import ip_from_text
from services.map_writer.desired import PortId, Rules
from services.map_writer.follower import Change, Follower
from services.map_writer.mesh import Touched
from services.map_writer.names import Names
from services.map_writer.planner import Held, Limits, Planner
from tests.control.resources import Resource, broken_locality, host, pod, service, uid

pytestmark = pytest.mark.anyio


async def named(address: str, *resources: Resource) -> WorkloadName | None:
    """What is said of an address in a mesh of these."""
    follower = Follower()
    follower.synced = True
    for found in resources:
        follower.mesh.put(found.name, decode_address(found.resource.value), Touched())
    planner = Planner(Held(), Limits(10, 10, 10), Rules())
    request = ResolveRequest(VERSION, [], [("", ip_from_text(address))])
    answer = await Names(follower, lambda: planner).answer(messages.encode(request))
    (name,) = messages.decode(ResolveReply, answer).addresses
    return name


async def test_a_workload_has_the_first_by_name_of_the_services_that_there_are() -> None:
    web = pod("web-1", "10.1.0.1", services=["web", "shop", "api"])
    services = [service(name, f"10.96.0.{number}") for number, name in enumerate(("web", "shop"))]
    found = await named("10.1.0.1", web, *services)
    assert found is not None
    assert (found.name, found.service) == ("web-1", host("shop"))


async def test_a_workload_of_no_service_and_an_address_of_nobody_have_none() -> None:
    found = await named("10.1.0.1", pod("web-1", "10.1.0.1"))
    assert found is not None
    assert found.service == ""
    assert await named("10.1.0.2", pod("web-1", "10.1.0.1")) is None


async def test_a_services_own_address_is_said_to_be_its_and_a_workloads_comes_before_it() -> None:
    found = await named("10.96.0.1", service("web", "10.96.0.1"), service("api", "10.96.0.1"))
    assert found == WorkloadName(*[""] * 11, service=host("api"))
    assert found.is_service
    both = await named("10.1.0.1", service("web", "10.1.0.1"), pod("web-1", "10.1.0.1"))
    assert both is not None
    assert (both.name, both.is_service) == ("web-1", False)


async def test_a_workload_of_which_not_all_can_be_read_still_has_its_uid() -> None:
    found = await named("10.1.0.1", broken_locality("web-1", "10.1.0.1"))
    assert found is not None
    assert (found.uid, found.name) == (uid("web-1"), "")


async def test_a_connection_from_before_a_service_gained_its_waypoint_is_still_its() -> None:
    follower, planner, shop = Follower(), Planner(Held(), Limits(10, 10, 10), Rules()), host("shop")
    follower.synced = True
    lists = {way: PortId(shop, 80, 4, way).id for way in (False, True)}
    for waypoint in ("", host("wp"), ""):
        touched, found = Touched(), decode_address(service("shop", "10.96.0.1").resource.value)
        assert isinstance(found, Service)
        by_way = (Waypoint(service=waypoint),) if waypoint else ()
        follower.mesh.put(shop, msgspec.structs.replace(found, waypoints=by_way), touched)
        list(planner.plan(follower.mesh, touched))
        request = messages.encode(ResolveRequest(VERSION, [*lists.values()], []))
        answer = messages.decode(ResolveReply, await Names(follower, lambda: planner).answer(request))
        assert [name and name.name for name in answer.services] == ["shop", "shop"]


async def test_while_the_mesh_is_not_whole_nobody_is_said_to_be_nobody() -> None:
    names = Names(Follower(), lambda: Planner(Held(), Limits(10, 10, 10), Rules()))
    assert await names.answer(messages.encode(ResolveRequest(VERSION, [1], []))) == b""


@pytest.mark.parametrize("sweep", [False, True])
async def test_who_asked_for_an_address_is_told_when_it_is_somebody_elses(sweep: bool) -> None:
    follower, asked = Follower(), [("", ip_from_text(f"10.1.0.{n}")) for n in (1, 2)]
    follower.synced = True
    names = Names(follower, lambda: Planner(Held(), Limits(10, 10, 10), Rules()))

    def put(*resources: Resource) -> Change:
        touched = Touched()
        for found in resources:
            follower.mesh.put(found.name, decode_address(found.resource.value), touched)
        return Change(sweep, Touched() if sweep else touched)

    put(pod("a", "10.1.0.1"), pod("b", "10.1.0.2"))
    await names.answer(messages.encode(ResolveRequest(VERSION, [], asked)))
    assert not [*names.changed(put(pod("b", "10.1.0.2", healthy=False), pod("c", "10.1.0.3")))]
    gone = Touched()
    follower.mesh.remove(uid("a"), gone)
    assert [*names.changed(Change(sweep, gone))] == [NamesChanged(VERSION, asked[:1], [None])]
    (news,) = names.changed(put(pod("d", "10.1.0.1")))
    assert [name and name.name for name in news.names] == ["d"]
