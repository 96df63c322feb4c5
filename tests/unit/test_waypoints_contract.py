"""However much is asked of the mesh, it is asked in messages that the bus takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pykmesh.contracts.messages import VERSION
from pykmesh.contracts.waypoints import MeshService, WaypointsReply, WaypointsRequest

NAMES = st.lists(st.text("abcé", min_size=1, max_size=12), max_size=12)


@given(NAMES, NAMES, NAMES, st.integers(1, 30))
def test_pages_ask_for_all_of_it_and_for_what_does_not_grow_once(
    backends: list[str], namespaces: list[str], accounts: list[str], size: int
) -> None:
    whole = WaypointsRequest(
        VERSION, ["w"], backends, ["n"], namespaces, accounts, ["r"], ["p"], with_principals=True
    )
    first, *rest = pages = [*whole.pages(size)]
    for kind, asked in (
        ("backends", backends), ("client_namespaces", namespaces), ("client_accounts", accounts),
    ):  # fmt: skip
        assert [name for page in pages for name in getattr(page, kind)] == asked
    longest = max((len(name.encode()) for name in (*backends, *namespaces, *accounts)), default=0)
    for page in pages:
        names = (*page.backends, *page.client_namespaces, *page.client_accounts)
        assert sum(len(name.encode()) for name in names) < size + longest
    assert (first.waypoints, first.namespaces, first.workload_namespaces) == (["w"], ["n"], ["p"])
    assert not any(page.waypoints or page.namespaces or page.with_principals for page in rest)


def test_answers_to_pages_are_one() -> None:
    """What was asked for by name counts: with revisions."""
    a, b, more = MeshService("a", ["10.0.0.1"]), MeshService("b"), MeshService("a")
    first = WaypointsReply(VERSION, True, {"w": ["a"]}, [more], {"n": b"12345"}, {})
    second = WaypointsReply(VERSION, True, {}, [a, b], {"m": b"54321"}, {"x": b"11111"})
    whole = first.with_page(second)
    assert whole.users == {"w": ["a"]}
    assert sorted(each.name for each in whole.services) == ["a", "b"]
    assert more not in whole.services
    assert (whole.namespace_ids, whole.account_ids) == ({"n": b"12345", "m": b"54321"}, {"x": b"11111"})
    assert not first.with_page(WaypointsReply(VERSION, False)).is_synced
