"""What is written on Gateways and routes in an API server, by what waypoints are and say. Pure.

Names, types and reasons are Gateway API's. A condition that stays as it was keeps its time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from pykmesh.manifests.http_route import GATEWAY_GROUP, whole_kind
from pykmesh.manifests.objects import ObjectRef
from services.waypoint_mgr.attachments import ACCEPTED, Condition, Listener

Plain = dict[str, Any]
CONTROLLER: Final = "pykmesh.io/waypoint"
"""Who writes: the class's controllerName."""
MESSAGE_MAX: Final = 32768
"""Of a condition; an API server takes no more."""
PROGRAMMED: Final = "Programmed"
_PENDING: Final = "Pending"
_TIME: Final = "lastTransitionTime"


def gateway_status(
    gateway: Plain,
    addresses: Sequence[str],
    hostname: str,
    listeners: Iterable[Listener] | None,
    *,
    is_reachable: bool,
    why: str = "",
    now: str,
) -> Plain:
    """Of a Gateway, as the server has it; `why` it cannot have a Service. `listeners` None: as they were.

    `addresses`: of its Service. It has them once somebody answers there, and keeps them, and is programmed
    from then on: a control plane sends traffic past a waypoint that has no address, and other nodes may
    reach what this one does not.
    """
    before: Plain = gateway.get("status", {})
    found: list[Plain] = before.get("conditions", [])
    known = before.get("addresses", [])
    if is_reachable:
        known = [{"type": "IPAddress", "value": each} for each in addresses]
        known.append({"type": "Hostname", "value": hostname})
    said = [_condition(ACCEPTED, True, ACCEPTED, "pykmesh runs it")]
    if known and not why:
        said.append(_condition(PROGRAMMED, True, PROGRAMMED, "data planes know where it is"))
    else:
        said.append(_condition(PROGRAMMED, False, _PENDING, why or "nobody takes connections yet"))
    status: Plain = {"addresses": known, "conditions": _beside(said, found, _generation(gateway), now)}
    if listeners is not None:
        status["listeners"] = [_listener(gateway, each, said[-1], now) for each in listeners]
    return status


def _listener(gateway: Plain, found: Listener, programmed: Plain, now: str) -> Plain:
    said = [
        _condition(ACCEPTED, True, ACCEPTED, "pykmesh runs it"),
        programmed,
        _condition("Conflicted", False, "NoConflicts", "a waypoint has one way in"),
        _condition("ResolvedRefs", True, "ResolvedRefs", "all is there")
        if found.are_kinds_known
        else _condition("ResolvedRefs", False, "InvalidRouteKinds", "takes kinds that waypoints do not read"),
    ]
    before = gateway.get("status", {}).get("listeners", [])
    old: Plain = next((each for each in before if each["name"] == found.name), {})
    return {
        "name": found.name,
        "supportedKinds": [{"group": GATEWAY_GROUP, "kind": kind} for kind in found.kinds],
        "attachedRoutes": found.routes,
        "conditions": _beside(said, old.get("conditions", ()), _generation(gateway), now),
    }


def class_status(gateway_class: Plain, now: str) -> Plain:
    said = [_condition(ACCEPTED, True, ACCEPTED, "waypoint_mgr runs its Gateways")]
    before = gateway_class.get("status", {}).get("conditions", ())
    return {"conditions": _dated(said, before, _generation(gateway_class), now)}


def route_parents(route: Plain, said: Iterable[Condition], now: str) -> list[Plain]:
    """All of a route's parents: what others say of it stays, and what we said and say no more goes."""
    before: list[Plain] = route.get("status", {}).get("parents", [])
    kept = [each for each in before if each.get("controllerName") != CONTROLLER]
    ours = {_key(each["parentRef"]): each for each in before if each.get("controllerName") == CONTROLLER}
    found = []
    conditions = [*said]
    for parent in route.get("spec", {}).get("parentRefs", ()):
        own = [each for each in conditions if _is(each, parent, route)]
        if own:
            old = ours.get(_key(parent), {}).get("conditions", ())
            dated = _dated(map(_told, own), old, max(each.generation for each in own), now)
            found.append({"parentRef": parent, "controllerName": CONTROLLER, "conditions": dated})
    return kept + found


def _is(condition: Condition, parent: Plain, route: Plain) -> bool:
    namespace = parent.get("namespace") or route["metadata"].get("namespace", "")
    kind = whole_kind(parent.get("group", GATEWAY_GROUP), parent.get("kind", "Gateway"))
    ref = ObjectRef(kind, namespace, parent["name"])
    at = parent.get("sectionName") or "", parent.get("port") or 0
    return (condition.parent, condition.section, condition.port) == (ref, *at)


def _told(found: Condition) -> Plain:
    return _condition(found.type, found.status, found.reason, found.message)


def _condition(kind: str, status: bool, reason: str, message: str) -> Plain:
    return {"type": kind, "status": str(status), "reason": reason, "message": message[:MESSAGE_MAX]}


def _generation(of: Plain) -> int:
    found: int = of["metadata"].get("generation", 0)
    return found


def _beside(said: Sequence[Plain], before: Sequence[Plain], generation: int, now: str) -> list[Plain]:
    """As `_dated`, and what others say."""
    types = {each["type"] for each in said}
    others = [each for each in before if each["type"] not in types]
    return [*_dated(said, before, generation, now), *others]


def _dated(said: Iterable[Plain], before: Iterable[Plain], generation: int, now: str) -> list[Plain]:
    """With the generation that they are of, and since when they are so."""
    known = {each["type"]: each for each in before}
    found = []
    for each in {one["type"]: one for one in said}.values():
        old = known.get(each["type"], {})
        since = old[_TIME] if old.get("status") == each["status"] and _TIME in old else now
        found.append({**each, "observedGeneration": generation, _TIME: since})
    return found


def _key(parent: Plain) -> tuple[object, ...]:
    return tuple(sorted(parent.items()))
