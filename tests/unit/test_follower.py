"""However the log arrives, map_writer's mesh becomes what xds_client holds."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykmesh.contracts.address import Policy, Service, Workload, decode_address, decode_policy
from pykmesh.contracts.bulk import MANY, Ordinary
from pykmesh.contracts.messages import VERSION, ConfigBatch, Resource, ResourceType, SnapshotPage
from pykmesh.kernel.layout import AddressKind
from pykmesh.kernel.records import ADDRESS_VALUE, ip_from_text
from services.map_writer import follower as followers
from services.map_writer.desired import Rules
from services.map_writer.follower import Change, Follower, GapError
from services.map_writer.mesh import Mesh, Touched, place_of
from services.map_writer.planner import Held as HeldMaps
from services.map_writer.planner import Limits, Planner
from services.xds_client import store as stores
from services.xds_client.store import Held, Store
from tests.control.resources import pod, policy, service
from tests.unit import mesh_model

ROOMY = Limits(1000, 1000, 1000)
_NAMES = "abcd"


def address(seed: int) -> Resource:
    """One of a few names, in one of a few versions."""
    name, variant = _NAMES[seed % 4], seed // 4 % 5
    if seed % 3:
        members = [other for bit, other in enumerate(_NAMES) if variant >> bit & 1]
        named = [f"shop/{other}" for other in members] if variant % 2 else []
        found = pod(f"p-{name}", f"10.1.0.{variant + 1}", services=members, policies=named)
    else:
        found = service(name, f"10.96.0.{variant + 1}")
    return Resource(found.name, found.resource.value)


def policies(seed: int) -> Resource:
    found = policy(_NAMES[seed % 4], "shop" if seed % 3 else "bank")
    return Resource(found.name, found.resource.value)


class World:
    """xds_client's store, a bus that may lose and repeat, and a follower with its maps."""

    def __init__(self) -> None:
        self.store = Store()
        self.stores = {self.store.epoch: self.store}
        self.bus: deque[ConfigBatch] = deque()
        self.follower = Follower()
        self.lost = True
        self.maps = mesh_model.Maps(ROOMY)
        self.planner = Planner(HeldMaps(), ROOMY, Rules())
        self.between_pages: list[int] = []

    def respond(self, seed: int) -> None:
        """The control plane says something; the store publishes it in one batch or two."""
        kind = ResourceType.ADDRESS if seed % 4 else ResourceType.AUTHORIZATION
        made = [
            address(seed // 5 + n) if kind is ResourceType.ADDRESS else policies(seed // 5 + n)
            for n in range(seed % 4)
        ]
        upserts = list({resource.name: Held("v", resource.value) for resource in made}.items())
        held = list(self.store.held[kind])
        removed = self.store.remove(kind, held[: seed // 7 % 3])
        fresh = self.store.put(kind, upserts)
        if seed % 5 == 0 and fresh:
            self.bus.append(self.store.batch(kind, removed, fresh[:1], complete=False))
            removed, fresh = [], fresh[1:]
        self.store.answered.add(kind)
        self.bus.append(self.store.batch(kind, removed, fresh, complete=True))

    def restart(self) -> None:
        self.store = Store()
        self.stores[self.store.epoch] = self.store

    def deliver(self, times: int = 1) -> None:
        if self.lost:
            self.resync()
        if not self.bus:
            return
        batch = self.bus.popleft()
        for _ in range(times):
            try:
                self.write(self.follower.offer(batch))
            except GapError:
                self.lost = True
                self.resync()

    def resync(self) -> None:
        try:
            self.write(run(self.follower.resync(self.fetch)))
        except GapError:
            return
        self.lost = False

    async def fetch(self, cursor: str) -> SnapshotPage:
        if cursor and self.between_pages:
            self.respond(self.between_pages.pop())
        page = self.store.snapshot(cursor)
        if page is None:
            raise GapError("no such page")
        return page

    def write(self, change: Change | None) -> None:
        if change is None:
            return
        assert self.stores[self.follower.epoch].synced, "written before the control plane had said everything"
        mesh = self.follower.mesh
        self.maps.apply(self.planner.sweep(mesh) if change.sweep else self.planner.plan(mesh, change.touched))

    def settle(self) -> None:
        """Nothing is lost any more, and the head of the log is repeated, as it is each second."""
        for _ in range(3):
            while self.bus:
                self.deliver()
            self.bus.append(self.store.heartbeat())
            self.deliver()


def run(coroutine: Coroutine[Any, Any, Change | None]) -> Change | None:
    """A coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: Change | None = end.value
        return result
    raise AssertionError("it waits")


EVENTS = st.lists(st.tuples(st.sampled_from("rrrrddddlupsh"), st.integers(0, 10_000)), max_size=40)


@settings(max_examples=300, database=None, deadline=None)
@given(EVENTS, st.lists(st.integers(0, 10_000), max_size=3), st.sampled_from([1, 3, MANY]))
def test_any_interleaving_of_batches_losses_repetitions_restarts_and_snapshots_converges(
    events: list[tuple[str, int]], between_pages: list[int], many: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(followers, "MANY", many)
        _converges(events, between_pages)


def _converges(events: list[tuple[str, int]], between_pages: list[int]) -> None:
    world = World()
    for what, seed in events:
        match what:
            case "r":
                world.respond(seed)
            case "d":
                world.deliver()
            case "l" if world.bus:
                world.bus.popleft()
            case "u":
                world.deliver(times=2)
            case "p":
                world.between_pages = list(between_pages)
            case "s":
                world.restart()
            case "h":
                world.bus.append(world.store.heartbeat())
    for kind in ResourceType:
        if kind not in world.store.answered:
            world.store.answered.add(kind)
            world.bus.append(world.store.batch(kind, [], [], complete=True))
    world.settle()
    _assert_same(world)
    assert world.follower.received_seq == world.store.seq


def _assert_same(world: World) -> None:
    mesh, held = world.follower.mesh, world.store.held
    wanted = {name: decode_address(found.value) for name, found in held[ResourceType.ADDRESS].items()}
    assert mesh.services == {name: found for name, found in wanted.items() if isinstance(found, Service)}
    assert {w.uid: w for w in mesh.all_workloads()} == {
        name: found for name, found in wanted.items() if isinstance(found, Workload)
    }
    assert mesh.policies == {
        name: decode_policy(name, found.value) for name, found in held[ResourceType.AUTHORIZATION].items()
    }
    named = Counter(
        policy for found in wanted.values() if isinstance(found, Workload) for policy in found.policies
    )
    assert mesh.missing_policies() == {name: n for name, n in named.items() if name not in mesh.policies}
    one_by_one = Mesh()
    for name, found in wanted.items():
        one_by_one.put(name, found, Touched())
    fresh = mesh_model.Maps(ROOMY)
    fresh.apply(Planner(HeldMaps(), ROOMY, Rules()).sweep(one_by_one))
    assert world.maps.plain() == fresh.plain()


@pytest.mark.parametrize("order", ["service first", "pod first", "service of before", "pod that goes"])
def test_an_address_that_is_not_only_an_ordinary_pods_is_never_written_as_one(order: str) -> None:
    """Ordinary workloads are planned many together, without a look at each."""
    web, api = service("web", "10.96.0.1", "10.1.0.1"), pod("a-0", "10.1.0.1", services=["web"])
    others = [pod(f"b-{n}", f"10.1.1.{n}", services=["web"]) for n in range(followers.GROUPED)]
    mesh, touched = Mesh(), Touched()
    planner, maps = Planner(HeldMaps(), ROOMY, Rules()), mesh_model.Maps(ROOMY)
    place = place_of("", ip_from_text("10.1.0.1"))
    if order == "service of before":
        mesh.put(web.name, decode_address(web.resource.value), touched)
        maps.apply(planner.plan(mesh, touched))
        touched = Touched()
    ordinary = Ordinary()
    assert all(ordinary.take([found.resource.value for found in (api, *others)]))
    if order == "service first":
        mesh.put(web.name, decode_address(web.resource.value), touched)
    mesh.put_ordinary([*ordinary.groups()], touched)
    assert place in touched.new_pods
    if order == "pod first":
        mesh.put(web.name, decode_address(web.resource.value), touched)
    elif order == "pod that goes":
        mesh.remove(api.name, touched)
    for _ in maps.writes(planner.plan(mesh, touched)):
        found = maps.maps["addresses"].get(place)
        assert found is None or ADDRESS_VALUE.unpack(found)[0] == AddressKind.SERVICE
    assert (place in maps.maps["addresses"]) is (order != "pod that goes")
    assert len(maps.maps["addresses"]) == len(others) + 2 * (order != "pod that goes")


def batch(epoch: str, seq: int, *, complete: bool = True, synced: bool = True) -> ConfigBatch:
    return ConfigBatch(VERSION, epoch, seq, ResourceType.ADDRESS, [], [], complete=complete, synced=synced)


def following(epoch: str = "e") -> Follower:
    """One that has taken the snapshot of an epoch that has just begun."""
    follower = Follower()
    empty = SnapshotPage(VERSION, epoch, 0, False, ResourceType.ADDRESS, [], "")

    async def fetch(_: str) -> SnapshotPage:
        return empty

    assert run(follower.resync(fetch)) is None
    return follower


def test_a_batch_that_is_missing_is_noticed_at_the_next_and_at_a_heartbeat() -> None:
    follower = following()
    assert follower.offer(batch("e", 1)) is not None
    with pytest.raises(GapError, match="batch 3 of epoch e, not 2"):
        follower.offer(batch("e", 3))
    with pytest.raises(GapError):
        follower.offer(batch("e", 2, complete=False))  # a heartbeat: the second batch was there and was lost


def test_another_epoch_is_followed_from_its_snapshot_alone() -> None:
    """Whoever publishes the first batch of one: an empty mesh that is complete would empty the maps."""
    follower = following()
    assert follower.offer(batch("e", 1)) is not None
    for number in range(3):
        with pytest.raises(GapError, match=f"epoch f at {number}, not e"):
            follower.offer(batch("f", number))
    assert (follower.epoch, follower.received_seq, follower.synced) == ("e", 1, True)
    with pytest.raises(GapError, match="not any"):
        Follower().offer(batch("e", 1))


def test_nothing_is_swept_before_the_first_full_state() -> None:
    follower = following()
    assert follower.offer(batch("e", 1, synced=False)) is None
    change = follower.offer(batch("e", 2))
    assert change is not None
    assert change.sweep
    again = follower.offer(batch("e", 3))
    assert again is not None
    assert not again.sweep


def test_a_batch_that_comes_twice_changes_nothing() -> None:
    follower = following()
    follower.offer(batch("e", 1))
    assert follower.offer(batch("e", 1)) is None
    assert follower.received_seq == 1


def test_a_snapshot_of_two_epochs_is_none() -> None:
    first, second = Store(), Store()

    async def fetch(cursor: str) -> SnapshotPage:
        page = (second if cursor else first).snapshot("")
        assert page is not None
        return page

    with pytest.raises(GapError, match="in a snapshot of"):
        run(Follower().resync(fetch))


def test_pages_name_everything_once_and_hold_about_what_a_batch_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stores, "BATCH_BYTES", 1000)
    store = Store()
    store.put(ResourceType.ADDRESS, [(f"a-{n}", Held("v", bytes(100))) for n in range(50)])
    store.put(ResourceType.AUTHORIZATION, [(f"p-{n}", Held("v", bytes(5000))) for n in range(3)])
    pages = read_all(store)
    assert [r.name for p in pages for r in p.resources] == [f"a-{n}" for n in range(50)] + [
        f"p-{n}" for n in range(3)
    ]
    assert all(len(page.resources) <= 10 for page in pages)
    assert [len(p.resources) for p in pages if p.type is ResourceType.AUTHORIZATION] == [1, 1, 1]


def read_all(store: Store) -> list[SnapshotPage]:
    pages = [store.snapshot("")]
    while pages[-1] is not None and pages[-1].next_cursor:
        pages.append(store.snapshot(pages[-1].next_cursor))
    return [page for page in pages if page is not None]


@pytest.mark.parametrize("cursor", ["unknown.0", "x", ".", "0", "-1.-1", "a.b", "\u0663.\u0663"])
def test_a_cursor_that_is_not_known_has_no_page(cursor: str) -> None:
    store = Store()
    store.snapshot("")
    assert store.snapshot(cursor) is None


def test_a_finished_snapshot_is_forgotten_and_old_ones_make_room_for_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stores, "BATCH_BYTES", 1)
    store = Store()
    store.put(ResourceType.ADDRESS, [(f"a-{n}", Held("v", b"x")) for n in range(3)])
    first = store.snapshot("")
    assert first is not None
    for _ in range(stores.SNAPSHOTS_KEPT):
        assert store.snapshot("") is not None
    assert store.snapshot(first.next_cursor) is None, "the oldest"
    last = read_all(store)[-2].next_cursor
    assert store.snapshot(last) is None, "read to its end"


def test_what_changes_while_a_snapshot_is_read_is_in_the_batches_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stores, "BATCH_BYTES", 1)
    store = Store()
    store.put(ResourceType.ADDRESS, [("a", Held("v", b"x")), ("b", Held("v", b"x")), ("c", Held("v", b"x"))])
    first = store.snapshot("")
    assert first is not None
    store.remove(ResourceType.ADDRESS, ["b"])
    store.put(ResourceType.ADDRESS, [("c", Held("v2", b"new")), ("d", Held("v", b"x"))])
    second = store.snapshot(first.next_cursor)
    assert second is not None
    assert second.resources == [Resource("b", b"x")]
    third = store.snapshot(second.next_cursor)
    assert third is not None
    assert third.resources == [Resource("c", b"x")]
    assert {page.seq for page in (first, second, third)} == {0}


def test_only_what_differs_is_published_and_only_what_was_held_is_removed() -> None:
    store = Store()
    first = [("a", Held("1", b"x")), ("b", Held("1", b"y"))]
    assert [r.name for r in store.put(ResourceType.ADDRESS, first)] == ["a", "b"]
    again = [("a", Held("2", b"x")), ("b", Held("2", b"z"))]
    assert store.put(ResourceType.ADDRESS, again) == [Resource("b", b"z")]
    assert store.versions(ResourceType.ADDRESS) == {"a": "2", "b": "2"}
    store.forget_version(ResourceType.ADDRESS, "a")
    store.forget_version(ResourceType.ADDRESS, "never")
    assert store.versions(ResourceType.ADDRESS) == {"a": "", "b": "2"}
    assert store.remove(ResourceType.ADDRESS, ["never", "b", "b"]) == ["b"]


def snapshot(
    epoch: str, *resources: Resource, synced: bool, rejected: list[str] | None = None
) -> SnapshotPage:
    return SnapshotPage(VERSION, epoch, 1, synced, ResourceType.ADDRESS, [*resources], "", rejected or [])


def taking(follower: Follower, page: SnapshotPage) -> Change | None:
    async def fetch(_: str) -> SnapshotPage:
        return page

    return run(follower.resync(fetch))


def said(found: Any) -> Resource:
    return Resource(found.name, found.resource.value)


def test_the_mesh_before_is_answered_with_until_another_is_whole() -> None:
    follower = Follower()
    web, api = said(service("web", "10.96.0.1")), said(service("api", "10.96.0.2"))
    assert taking(follower, snapshot("e", web, synced=True))
    assert taking(follower, snapshot("f", synced=False)) is None
    assert follower.synced
    assert follower.mesh.services.keys() == {web.name}
    upsert = ConfigBatch(VERSION, "f", 2, ResourceType.ADDRESS, [], [api], complete=True, synced=True)
    change = follower.offer(upsert)
    assert change is not None
    assert change.sweep
    assert follower.mesh.services.keys() == {api.name}


@pytest.mark.parametrize("by_snapshot", [True, False])
def test_what_a_new_epoch_has_wrong_stays_as_it_was_and_goes_when_that_is_said(*, by_snapshot: bool) -> None:
    follower = Follower()
    web, p0 = said(service("web", "10.96.0.1")), said(pod("p-0", "10.1.0.1", services=["web"]))
    assert taking(follower, snapshot("e", web, p0, synced=True))
    names = [web.name, p0.name, "never/there"]
    if by_snapshot:
        change = taking(follower, snapshot("f", synced=True, rejected=names))
    else:
        assert taking(follower, snapshot("f", synced=False)) is None
        change = follower.offer(ConfigBatch(VERSION, "f", 2, ResourceType.ADDRESS, [], [], True, True, names))
    assert change is not None
    assert change.sweep
    assert follower.mesh.services.keys() == {web.name}
    assert [w.uid for w in follower.mesh.members_of(web.name)] == [p0.name]
    seq = follower.received_seq + 1
    gone = ConfigBatch(VERSION, "f", seq, ResourceType.ADDRESS, names, [], complete=True, synced=True)
    assert follower.offer(gone) is not None
    assert not follower.mesh.services
    assert not follower.mesh.workloads


def test_many_names_that_are_said_wrongly_all_stay_as_they_were() -> None:
    """More than go into one page."""
    follower, store = Follower(), Store()
    services = [said(service(f"{'x' * 40}-{n}", f"10.96.{n // 256}.{n % 256}")) for n in range(12_000)]
    names = [found.name for found in services]
    assert taking(follower, snapshot("e", *services, synced=True))
    for kind in ResourceType:
        store.answered.add(kind)
    store.note_rejected(ResourceType.ADDRESS, names, dict.fromkeys(names, "no good"), is_all=True)
    assert len(read_all(store)) > len(ResourceType)

    async def fetch(cursor: str) -> SnapshotPage:
        page = store.snapshot(cursor)
        assert page is not None
        return page

    change = run(follower.resync(fetch))
    assert change is not None
    assert change.sweep
    assert follower.mesh.services.keys() == set(names)


def unread(namespace: str | None) -> Policy:
    return Policy("shop/p", namespace, is_read=False)


def test_a_policy_that_nobody_could_ever_read_concerns_all_of_its_namespace() -> None:
    follower, p = following(), said(policy("p", "shop"))
    kind, epoch = ResourceType.AUTHORIZATION, "e"
    root = "istio-system/q"
    wrong = ConfigBatch(VERSION, epoch, 1, kind, [], [], True, True, [p.name, root])
    assert follower.offer(wrong) is not None
    assert follower.mesh.policies == {p.name: unread("shop"), root: Policy(root, "", is_read=False)}
    well = ConfigBatch(VERSION, epoch, 2, kind, [root], [p], complete=True, synced=True)
    assert follower.offer(well) is not None
    assert follower.mesh.policies == {p.name: decode_policy(p.name, p.value)}
    assert follower.offer(msgspec.structs.replace(wrong, seq=3)) is not None
    assert follower.mesh.policies[p.name].is_read, "it is as it was"


def test_what_xds_client_took_and_this_one_cannot_read_is_as_if_it_had_been_rejected() -> None:
    """Two releases beside one another."""
    follower, web = Follower(), said(service("web", "10.96.0.1"))
    assert taking(follower, snapshot("e", web, synced=True))
    assert taking(follower, snapshot("f", Resource(web.name, b"\xff"), synced=True))
    assert follower.mesh.services.keys() == {web.name}
    anew = Follower()
    assert taking(anew, snapshot("f", Resource(web.name, b"\xff"), synced=True))
    assert [*anew.mesh.unreadable] == [web.name]
