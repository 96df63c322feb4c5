"""The ledger: nothing counted is dropped, and no series ever falls."""

from __future__ import annotations

import pytest

from pykmesh.kernel.layout import Direction
from services.telemetry import ledger as module
from services.telemetry.labels import LABELS, Edge
from services.telemetry.ledger import Amounts, Ledger, of_tcp, without_names
from services.telemetry.names import Names
from tests.telemetry.rows import CLIENT, SERVER, WEB, Clock, ip, numbered_ip, workload

EDGE = Edge(ip(CLIENT), ip(SERVER), 7, Direction.OUTBOUND, "-")
ONE = Amounts(opened=1)


class Books:
    def __init__(self) -> None:
        self.clock = Clock()
        self.names = Names("", self.clock)
        self.ledger = Ledger(of_tcp(self.names), without_names, self.clock)

    def answer(self, **workloads: str) -> None:
        """Answers all that is open: workloads by address, the service always."""
        known = {ip(address.replace("_", ".")[1:]): workload(name) for address, name in workloads.items()}
        asked = self.names.workloads.next_questions()
        self.names.workloads.answer(asked, [known.get(address) for address in asked])
        asked = self.names.services.next_questions()
        self.names.services.answer(asked, [WEB for _ in asked])
        self.ledger.settle()

    def opened(self) -> dict[tuple[str, str], int]:
        at = LABELS.index("source_workload"), LABELS.index("destination_workload")
        found: dict[tuple[str, str], int] = {}
        for key, amounts in self.ledger.snapshot():
            ends = key[at[0]], key[at[1]]
            found[ends] = found.get(ends, 0) + amounts.opened
        return found


NAMED = {"_10_0_0_5": "client", "_10_0_0_9": "web"}


@pytest.fixture
def books() -> Books:
    return Books()


def test_what_is_counted_waits_for_names_and_then_has_them(books: Books):
    books.ledger.add(EDGE, ONE)
    books.ledger.add(EDGE, ONE)
    assert books.opened() == {}
    books.answer(**NAMED)
    assert books.opened() == {("client", "web"): 2}
    books.ledger.add(EDGE, ONE)
    assert books.opened() == {("client", "web"): 3}


def test_without_names_it_is_counted_as_unknown_after_a_while_and_stays_there(books: Books):
    books.ledger.add(EDGE, ONE)
    books.ledger.settle()
    books.clock.now += module.NAMES_WAIT_S + 0.1
    books.ledger.settle()
    assert books.opened() == {("unknown", "unknown"): 1}
    books.ledger.add(EDGE, ONE)
    assert books.opened() == {("unknown", "unknown"): 2}
    books.clock.now += module.RETRY_NAMES_S + 0.1
    books.answer(**NAMED)
    books.ledger.add(EDGE, ONE)
    assert books.opened() == {("unknown", "unknown"): 2, ("client", "web"): 1}


def test_an_address_that_changes_hands_counts_for_its_new_owner(books: Books):
    books.ledger.add(EDGE, ONE)
    books.answer(**NAMED)
    books.clock.now += 60
    books.ledger.add(EDGE, ONE)
    books.answer(**(NAMED | {"_10_0_0_9": "db"}))
    assert books.opened() == {("client", "web"): 1, ("client", "db"): 1}


def test_names_that_have_grown_old_are_better_than_none(books: Books):
    books.ledger.add(EDGE, ONE)
    books.answer(**NAMED)
    books.clock.now += 60
    books.ledger.add(EDGE, ONE)
    books.clock.now += module.NAMES_WAIT_S + 0.1
    books.ledger.settle()
    assert books.opened() == {("client", "web"): 2}


def test_too_many_series_are_folded_into_one_without_names(books: Books, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SERIES_MAX", 3)
    edges = [EDGE._replace(remote=ip(numbered_ip(1000 + n))) for n in range(5)]
    for edge in edges:
        books.ledger.add(edge, ONE)
    books.answer(_10_0_0_5="client", **{f"_10_0_3_{232 + n}": f"w{n}" for n in range(5)})
    assert sum(books.opened().values()) == 5
    assert books.opened()["unknown", "unknown"] == 2
    assert books.ledger.folded == 2


def test_too_many_that_wait_are_counted_without_names_at_once(books: Books, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "WAITING_MAX", 2)
    for n in range(5):
        books.ledger.add(EDGE._replace(remote=ip(numbered_ip(n))), ONE)
    assert books.opened() == {("unknown", "unknown"): 3}
    books.answer()
    assert sum(books.opened().values()) == 5


def test_a_series_that_rests_is_dropped_and_counts_from_zero_when_it_comes_again(books: Books):
    books.ledger.add(EDGE, ONE)
    books.answer(**NAMED)
    books.clock.now += module.SERIES_REST_S + 1
    books.ledger.drop_rested()
    assert books.opened() == {}
    books.ledger.add(EDGE, ONE)
    books.answer(**NAMED)
    assert books.opened() == {("client", "web"): 1}
