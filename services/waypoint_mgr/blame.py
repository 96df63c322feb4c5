"""Which objects it is for whose sake an Envoy refuses a waypoint's configuration.

The others shall not go without theirs, and what such an object guards is to stay closed: so it is looked for,
by asking an Envoy of its own (`envoy --mode validate`), which serves nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, Final

from pykmesh.manifests.objects import ObjectRef
from services.waypoint_mgr.envoy import Json
from services.waypoint_mgr.instances import RUNTIME
from services.waypoint_mgr.routes import Configuration

RefusalWithout = Callable[[Collection[ObjectRef]], Awaitable[str]]
"""Why an Envoy refuses what is made without these objects; "": it does not."""
EACH_MAX: Final = 8
"""So many of one namespace are looked for one by one: then all that are left of it are to blame."""


async def find_guilty(
    suspects: Iterable[ObjectRef], refusal_without: RefusalWithout, found: dict[ObjectRef, str]
) -> None:
    """Adds those without which an Envoy takes all the others, each when it is known, and why it refuses them.

    None where it refuses what is made without any of them, or takes what is made with all. So many questions
    as twice the logarithm of their number, for each that is found.
    """
    by_namespace = sorted(suspects, key=lambda each: (each.namespace, each))
    if not await refusal_without(()) or await refusal_without(by_namespace):
        return
    cleared: set[ObjectRef] = set()
    of_namespace: Counter[str] = Counter()

    async def search(some: Sequence[ObjectRef]) -> None:
        with_these = cleared.union(some)
        why = await refusal_without([each for each in by_namespace if each not in with_these])
        first, last = some[0].namespace, some[-1].namespace
        if not why:
            cleared.update(some)
        elif len(some) == 1 or (first == last and of_namespace[first] >= EACH_MAX):
            found.update(dict.fromkeys(some, why))
            of_namespace[first] += len(some)
        else:
            half = len(some) // 2
            await search(some[:half])
            await search(some[half:])

    await search(by_namespace)


def bootstrap_of(configuration: Configuration) -> Json:
    """An Envoy's that has all this from its start: it is only asked whether it would take it."""
    listener = configuration.listener("127.0.0.1", 0)
    return {
        "layeredRuntime": {"layers": [{"name": "static", "staticLayer": RUNTIME}]},
        "staticResources": {
            "listeners": [_with_routes(listener, configuration.routes)],
            "clusters": [
                _with_endpoints(cluster, configuration.assignments.get(name))
                for name, cluster in configuration.clusters.items()
            ],
        },
    }


def _with_endpoints(cluster: Json, endpoints: Json | None) -> Json:
    """A cluster whose endpoints stand in it, instead of where they are to be had."""
    if endpoints is None:
        return cluster
    found = {name: part for name, part in cluster.items() if name != "edsClusterConfig"}
    return found | {"type": "STATIC", "loadAssignment": endpoints}


_OWN: Final = ("rds", "accessLog")


def _with_routes(part: Any, routes: Any) -> Any:
    """A listener whose routes stand in it, instead of where they are to be had.

    Without its logs, in which nothing is that anybody says: an Envoy that is only asked crashes at their end.
    """
    if isinstance(part, list):
        return [_with_routes(each, routes) for each in part]
    if not isinstance(part, dict):
        return part
    found = {name: _with_routes(each, routes) for name, each in part.items() if name not in _OWN}
    if rds := part.get("rds"):
        found["routeConfig"] = {**routes.get(rds["routeConfigName"], {}), "validateClusters": False}
    return found
