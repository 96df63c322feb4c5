"""What is said of where connections to a waypoint come in, before all is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from services.waypoint_mgr.fleet import Fleet, Group


def test_nothing_is_taken_back_before_the_loader_has_answered_once() -> None:
    """It may start after this process: what was said before is still so."""
    group = Group("shop/wp")
    fleet: Any = SimpleNamespace(members={}, groups={"shop/wp": group}, _standing=lambda _: [])
    assert Fleet.places(fleet, "shop/wp") is None
    group.is_known = True
    assert Fleet.places(fleet, "shop/wp") == []
    assert Fleet.places(fleet, "shop/nobody") == []
