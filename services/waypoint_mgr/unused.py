"""Routes, VirtualServices and DestinationRules that count nowhere here, and why. Pure.

They may be for others, gateways at the edge or sidecars: this is told, and no fault.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from pykmesh.contracts.address import ROOT_NAMESPACE
from pykmesh.manifests.objects import ObjectRef
from services.waypoint_mgr.source import Destination, EntryHost, Objects, Route, Virtual, mesh_name

_Names = Iterable[tuple[str, str]]
"""Of services: namespace and host."""


def unused(
    objects: Objects, served: Collection[str], known: Iterable[str], domain: str
) -> dict[ObjectRef, str]:
    """`served`: services that go by way of a waypoint; `known`: all that waypoints speak to; by name."""
    entries: dict[ObjectRef, list[str]] = {}
    for name, service in objects.services.items():
        if isinstance(service, EntryHost):
            entries.setdefault(ObjectRef("ServiceEntry", service.namespace, service.name), []).append(name)
    found: dict[ObjectRef, str] = {}
    for route in objects.routes:
        lost = list(_lost_parents(route, objects, served, entries, domain))
        if len(lost) == len(route.spec.parent_refs):
            found[route.ref] = "; ".join(lost)
    by_waypoint, spoken_to = [*map(_names, served)], [*map(_names, known)]
    delegates = {ref for virtual in objects.virtuals for ref in virtual.delegates}
    for virtual in objects.virtuals:
        if not virtual.is_for_mesh:
            found[virtual.ref] = f"it is for the gateways {', '.join(virtual.spec.gateways)} alone"
        elif not virtual.spec.hosts:
            if virtual.ref not in delegates:
                found[virtual.ref] = "it has no hosts, and no other delegates to it"
        elif why := _why_not(virtual, by_waypoint):
            found[virtual.ref] = f"{why} that goes by way of a waypoint: {', '.join(virtual.spec.hosts)}"
    of_waypoints = {each.namespace for each in objects.waypoints.values()}
    for rule in objects.destinations:
        own = rule.ref.namespace
        may_say = own == ROOT_NAMESPACE or own in of_waypoints
        if rule.spec.workload_selector is not None:
            found[rule.ref] = "workloadSelector: it is for sidecars"
        elif why := _why_not(rule, [each for each in spoken_to if may_say or each[0] == own]):
            of_it = "" if may_say else " of its namespace"
            found[rule.ref] = f"{why}{of_it} that a waypoint speaks to: {rule.host}"
    return found


def _lost_parents(
    route: Route,
    objects: Objects,
    served: Collection[str],
    entries: Mapping[ObjectRef, list[str]],
    domain: str,
) -> Iterator[str]:
    """Those that are no waypoint, nor anything that goes by way of one."""
    for parent in route.spec.parent_refs:
        namespace = parent.namespace or route.namespace
        kind = parent.whole_kind
        what, name = f"{kind} {namespace}/{parent.name}", mesh_name(namespace, parent.name, domain)
        if kind == "Gateway":
            if name not in objects.waypoints:
                yield f"{what} is no waypoint"
            continue
        names = entries.get(ObjectRef(kind, namespace, parent.name), [])
        if kind == "Service":
            names = [name] if name in objects.services else []
        if not names:
            yield f"there is no {what}"
        elif not any(each in served for each in names):
            yield f"{what} goes by way of no waypoint"


def _names(service: str) -> tuple[str, str]:
    namespace, _, host = service.partition("/")
    return namespace, host


def _why_not(said: Virtual | Destination, services: _Names) -> str:
    """Why it is for none of them; "" where it is for one."""
    named = [namespace for namespace, host in services if said.says_of(host)]
    if not named:
        return "there is no host"
    return "" if any(map(said.is_seen_in, named)) else "exportTo lets it be seen by no host"
