"""Follows xds_client's log: batches in sequence, and a snapshot whenever the sequence breaks.

Pure but for the call that it is given. A mesh is only swept into the maps when xds_client called it
complete; until then the one before counts, for all who look something up. What the control plane says wrongly
of a resource leaves that as it was, also where xds_client has begun anew and never saw it, or both have
(`recall`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import structlog

from pykmesh.contracts.address import FieldError, decode_policy, unread_policy
from pykmesh.contracts.bulk import MANY, Ordinary, decode_addresses
from pykmesh.contracts.messages import NO_NAME, ConfigBatch, Resource, ResourceType, SnapshotPage
from pykmesh.kernel.records import Ip
from services.map_writer.locality import NOWHERE, Locality
from services.map_writer.mesh import Mesh, Touched

log = structlog.get_logger(__name__)

GROUPED: Final = 2
"""Times MANY ordinary workloads are put together: while more are on their way, and not in small groups."""
FetchPage = Callable[[str], Awaitable[SnapshotPage]]


class Change(NamedTuple):
    """Something to write: all of the mesh (sweep), or what was touched."""

    sweep: bool
    touched: Touched


class Follower:
    """`offer` takes each batch; `resync` starts anew from a snapshot."""

    def __init__(self, here: Locality = NOWHERE) -> None:
        self._here = here
        self.mesh = self._taken = Mesh(here)
        self._rejected: dict[ResourceType, set[str]] = {kind: set() for kind in ResourceType}
        """Names that are said wrongly, of the mesh that is being taken, until it is whole."""
        self.epoch = ""
        self.received_seq = 0
        self.synced = False
        """The mesh is complete: of what is followed, or was."""
        self._is_whole = False
        """What is taken is: it may replace what the maps hold."""
        self.resyncs = 0
        self._touched = Touched()
        self._taking = False
        """A response has begun, and its last batch has not come."""
        self._waiting: list[Resource] = []
        self._ordinary = Ordinary()
        self._in_bulk = False
        """Of this response many are taken together: the rest of it too, also where it is few."""

    def offer(self, batch: ConfigBatch) -> Change | None:
        """Takes the next batch. Returns what to write when it completes a response.

        Raises GapError when batches are missing, or are of another epoch: only `resync` helps. So nobody
        makes the mesh another by what he publishes: who answers for the snapshot says what there is.
        """
        if batch.epoch != self.epoch:
            raise GapError(f"epoch {batch.epoch} at {batch.seq}, not {self.epoch or 'any'}")
        expected = self.received_seq if batch.is_heartbeat else self.received_seq + 1
        if batch.seq < expected:
            return None
        if batch.seq > expected:
            raise GapError(f"batch {batch.seq} of epoch {batch.epoch}, not {expected}")
        if batch.is_heartbeat:
            return None
        self._take(batch)
        self._taking = not batch.complete
        self.received_seq = batch.seq
        return self._complete(batch.synced) if batch.complete else None

    def _begin(self, epoch: str) -> None:
        self._taken, self._touched = Mesh(self._here), Touched()
        self._taken.resolved, self._taken.stand_ins = self.mesh.resolved, self.mesh.stand_ins
        self._rejected, self._is_whole = {kind: set() for kind in ResourceType}, False
        if not self.synced:
            self.mesh = self._taken
        self._waiting, self._ordinary, self._in_bulk = [], Ordinary(), False
        self.epoch, self.received_seq, self._taking = epoch, 0, False

    def _complete(self, synced: bool) -> Change | None:
        self._put_everything()
        self._in_bulk = False
        if not self._is_whole and not synced:
            self._touched = Touched()
            return None
        is_new, self._is_whole = not self._is_whole, True
        if is_new:
            self._keep_rejected()
            self.mesh, self.synced = self._taken, True
        touched, self._touched = self._touched, Touched()
        return Change(sweep=is_new, touched=touched)

    def _keep_rejected(self) -> None:
        """As they were in the mesh before, or in the maps, where this one does not have them."""
        before, taken = self.mesh, self._taken
        for name in self._rejected[ResourceType.AUTHORIZATION] - taken.policies.keys() - {NO_NAME}:
            taken.put_policy(before.policies.get(name) or unread_policy(name), self._touched)
        for name in self._rejected[ResourceType.ADDRESS] - taken.services.keys() - taken.workloads.keys():
            if name in before.services:
                taken.put(name, before.services[name], self._touched)
            elif name in before.workloads:
                taken.put(name, before.workload(name), self._touched)
            else:
                taken.unreadable[name] = None

    def _take(self, batch: ConfigBatch) -> None:
        if batch.type is ResourceType.ADDRESS:
            if batch.removed:
                self._put_everything()
            for name in batch.removed:
                self._taken.remove(name, self._touched)
        else:
            for name in batch.removed:
                self._taken.remove_policy(name, self._touched)
        if not self._is_whole:
            self._rejected[batch.type].difference_update(batch.removed)
        for name in batch.rejected:
            self._reject(batch.type, name)
        self._put(batch.type, batch.upserts)

    def _reject(self, kind: ResourceType, name: str) -> None:
        """What it was it stays: what is whole has that, but for a policy that nobody ever could read."""
        if not self._is_whole:
            self._rejected[kind].add(name)
        elif kind is ResourceType.AUTHORIZATION and name != NO_NAME and name not in self._taken.policies:
            self._taken.put_policy(unread_policy(name), self._touched)

    def _put(self, kind: ResourceType, resources: list[Resource]) -> None:
        if kind is ResourceType.ADDRESS:
            self._waiting.extend(resources)
            if len(self._waiting) >= MANY:
                self._put_waiting()
            return
        for resource in resources:
            try:
                self._taken.put_policy(decode_policy(resource.name, resource.value), self._touched)
            except FieldError as error:
                self._not_understood(kind, resource.name, error)

    def _put_waiting(self) -> None:
        """Addresses of several batches are decoded together, and ordinary workloads of more put together."""
        waiting, self._waiting = self._waiting, []
        if len(waiting) >= MANY or self._in_bulk:
            self._in_bulk = True
            taken = self._ordinary.take([resource.value for resource in waiting])
            waiting = [resource for resource, gone in zip(waiting, taken, strict=True) if not gone]
            if len(self._ordinary) >= GROUPED * MANY:
                self._put_ordinary()
        self._put_each([resource.name for resource in waiting], [resource.value for resource in waiting])

    def _put_each(self, names: list[str], values: list[bytes]) -> None:
        for name, address in zip(names, decode_addresses(values), strict=True):
            if isinstance(address, FieldError):
                self._not_understood(ResourceType.ADDRESS, name, address)
            else:
                self._taken.put(name, address, self._touched)

    def _not_understood(self, kind: ResourceType, name: str, error: FieldError) -> None:
        """xds_client checks with the same code: this is another version of it."""
        log.error("resource_not_understood", resource=name, error=str(error))
        self._reject(kind, name)

    def _put_everything(self) -> None:
        self._put_waiting()
        self._put_ordinary()

    def _put_ordinary(self) -> None:
        if not self._ordinary.uids:
            return
        ordinary, self._ordinary = self._ordinary, Ordinary()
        try:
            self._taken.put_ordinary([*ordinary.groups()], self._touched)
        except (FieldError, ValueError):
            self._put_each(ordinary.uids, ordinary.raws)

    def resolve(self, hostname: str, addresses: tuple[Ip, ...] | None) -> Change | None:
        """Takes what a host name stands for. Nothing is to be written while a response is being taken.

        None: it could not be found, so it is what it was, but for one that never was found.
        """
        if addresses is None:
            self.mesh.unlooked.discard(hostname)
            addresses = () if hostname in self.mesh.stand_ins else self.mesh.resolved.get(hostname, ())
        self.mesh.resolve(hostname, addresses, self._touched)
        if not self._is_whole or self._taking or not (self._touched.services or self._touched.places):
            return None
        touched, self._touched = self._touched, Touched()
        return Change(sweep=False, touched=touched)

    async def resync(self, fetch: FetchPage) -> Change | None:
        """Takes a whole snapshot. What was published since is offered afterwards, in order."""
        self.resyncs += 1
        page = await fetch("")
        epoch, seq, synced = page.epoch, page.seq, page.synced
        self._begin(epoch)
        while True:
            self._put(page.type, page.resources)
            self._rejected[page.type].update(page.rejected)
            if not page.next_cursor:
                break
            page = await fetch(page.next_cursor)
            if page.epoch != epoch:
                raise GapError(f"epoch {page.epoch} in a snapshot of {epoch}")
        self.received_seq = seq
        return self._complete(synced)


class GapError(Exception):
    """The log cannot be followed from where the reader stands."""
