"""Answers who an id or an address is, for telemetry: names are read from the messages when asked for.

Who has asked for an address is told when it becomes somebody else's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import msgspec

from pykmesh.contracts import messages
from pykmesh.contracts.address import workload_message
from pykmesh.contracts.messages import (
    NamesChanged,
    ResolveReply,
    ResolveRequest,
    ServiceName,
    WorkloadName,
)
from pykmesh.contracts.waypoints import is_workload
from pykmesh.kernel.records import Ip
from services.map_writer.desired import other_way
from services.map_writer.follower import Change, Follower
from services.map_writer.mesh import Place, place_of
from services.map_writer.planner import Planner

_NO_WORKLOAD: Final = WorkloadName(*[""] * 11)
TOLD_MAX: Final = 65_536
"""Addresses of which it is known what was answered: as many as telemetry keeps."""


NEWS_MAX: Final = 4096
"""Addresses in a message: about a megabyte."""


class Told(NamedTuple):
    network: str
    ip: Ip
    name: WorkloadName | None


class Names:
    """Reads the state that the loop owns; never changes it."""

    def __init__(self, follower: Follower, planner: Callable[[], Planner]) -> None:
        self._follower = follower
        self._planner = planner
        self._told: OrderedDict[Place, Told] = OrderedDict()

    async def answer(self, data: bytes) -> bytes:
        """No byte while the mesh is not whole: who is not known yet is not nobody. Raises ContractError."""
        request = messages.decode(ResolveRequest, data)
        if not self._follower.synced:
            return b""
        services = [self._service(number) for number in request.services]
        addresses = [self._told_of(network, Ip(ip)) for network, ip in request.addresses]
        return messages.encode(ResolveReply(messages.VERSION, services, addresses))

    def changed(self, change: Change) -> Iterator[NamesChanged]:
        """What of it has another name than was told, in messages that the bus takes."""
        places = [*(self._told if change.sweep else dict.fromkeys(change.touched.among(self._told)))]
        before = [self._told[place] for place in places]
        now = [told._replace(name=self._workload(told.network, told.ip)) for told in before]
        self._told.update(zip(places, now, strict=True))
        news = [told for told, was in zip(now, before, strict=True) if told != was]
        for first in range(0, len(news), NEWS_MAX):
            page = news[first : first + NEWS_MAX]
            yield NamesChanged(messages.VERSION, [(t.network, t.ip) for t in page], [t.name for t in page])

    def _told_of(self, network: str, ip: Ip) -> WorkloadName | None:
        place, name = place_of(network, ip), self._workload(network, ip)
        self._told[place] = Told(network, ip, name)
        self._told.move_to_end(place)
        if len(self._told) > TOLD_MAX:
            self._told.popitem(last=False)
        return name

    def _service(self, number: int) -> ServiceName | None:
        owners = self._planner().owner_of_list
        # A connection outlives its service's gaining or losing a waypoint.
        port_id = owners.get(number) or owners.get(other_way(number))
        if port_id is None or is_workload(port_id.service):
            return None
        return messages.service_name(port_id.service, port_id.port)

    def _workload(self, network: str, ip: Ip) -> WorkloadName | None:
        mesh, place = self._follower.mesh, place_of(network, ip)
        pod = mesh.pod_at(place)
        if pod is None:
            owner = mesh.vip_owner(place)
            return None if owner is None else msgspec.structs.replace(_NO_WORKLOAD, service=owner)
        message = workload_message(pod.raw)
        return WorkloadName(
            uid=pod.uid,
            name=message.name,
            namespace=message.namespace,
            workload=message.workload_name,
            service_account=message.service_account or "default",
            trust_domain=message.trust_domain or "cluster.local",
            canonical_name=message.canonical_name,
            canonical_revision=message.canonical_revision,
            cluster=message.cluster_id or "Kubernetes",
            region=message.locality.region,
            zone=message.locality.zone,
            service=min((name for name, _ in pod.services if name in mesh.services), default=""),
        )
