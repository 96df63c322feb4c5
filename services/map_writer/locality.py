"""Which endpoints are near enough: the locality rules of load balancing. Pure (xds.md 3.3).

Endpoints of another network are not usable at all here, and this node's network is its setting: so whether
a network that differs ends the comparison (istiod up to 1.30) or is skipped (1.31) makes no difference, and
there is no setting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final, NamedTuple

from pykmesh.contracts.address import Mode, Service, Workload, workload_message

REMEMBERED: Final = 65_536


class Locality(NamedTuple):
    """Where something runs; "" is a name like any other, and equals itself."""

    region: str = ""
    zone: str = ""
    subzone: str = ""
    node: str = ""
    cluster: str = ""
    network: str = ""


NOWHERE: Final = Locality()
# istio.workload.LoadBalancing.Scope
_SCOPES: Final[dict[int, Callable[[Locality], str]]] = {
    1: lambda place: place.region,
    2: lambda place: place.zone,
    3: lambda place: place.subzone,
    4: lambda place: place.node,
    5: lambda place: place.cluster,
    6: lambda place: place.network,
}


def rank(scopes: tuple[int, ...], here: Locality, there: Locality) -> int:
    """How many scopes match before the first that does not."""
    for found, scope in enumerate(scopes):
        part = _SCOPES[scope]
        if part(here) != part(there):
            return found
    return len(scopes)


def is_ranked(service: Service) -> bool:
    """Whether it matters for a service where its endpoints are."""
    return bool(service.scopes) and service.mode in (Mode.STRICT, Mode.FAILOVER)


def nearness(service: Service, raw: bytes, here: Locality) -> int:
    """Of a workload's message."""
    return rank(service.scopes, here, locality(raw))


def best_of(service: Service, ranks: Iterable[int]) -> int:
    """STRICT: whoever matches in everything. FAILOVER: who matches in the most."""
    return len(service.scopes) if service.mode is Mode.STRICT else max(ranks, default=0)


def near(service: Service, workloads: list[Workload], here: Locality) -> tuple[list[Workload], int]:
    """The nearest, and how near they are."""
    ranks = [nearness(service, workload.raw, here) for workload in workloads]
    best = best_of(service, ranks)
    return [workload for workload, found in zip(workloads, ranks, strict=True) if found == best], best


@lru_cache(maxsize=REMEMBERED)
def locality(raw: bytes) -> Locality:
    """Of a workload's message."""
    message = workload_message(raw)
    where, cluster = message.locality, message.cluster_id or "Kubernetes"
    return Locality(where.region, where.zone, where.subzone, message.node, cluster, message.network)
