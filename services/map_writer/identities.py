"""Who the enrolled pods of this node are, for waypoints: `identities` follows the pods and the mesh.

An identity is that of the workload at the pod's address: as true as the control plane's word on who has
which address, and no more (no certificate is asked for). A pod at whose address nobody is known, or several
pods, is nobody. So is one whose address another pod had before, until the control plane speaks of it again:
what it said before was said of the other. A mesh that is read anew speaks of it if it says another there.

With a mesh key ids are the same on all nodes, and so are what seals the claims of connections to waypoints
of other nodes (bpf/handoff_option.h), and what stands for IPv6 services' addresses. When it changes these
do, and Envoys do not hear of it at once: until they have, every pod is nobody, which is stricter with each
policy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import anyio
import structlog

from pykmesh.contracts.address import Workload, workload_message
from pykmesh.contracts.handoff import ID_BYTES, NOBODY, Identity, MeshKey, service_secret
from pykmesh.contracts.waypoints import account_name
from pykmesh.kernel import libbpf, pins
from pykmesh.kernel.maps import MapFullError, PinnedMap
from pykmesh.kernel.records import (
    ADDRESS_KEY,
    HANDOFF_SECRET,
    IDENTITY_SECRET_BYTES,
    IDENTITY_SECRET_KEY,
    IDENTITY_VALUE,
    NO_IP,
    POD_KEY,
    POD_VALUE,
)
from pykmesh.kernel.upgrade import Gate
from services.map_writer.follower import Change
from services.map_writer.mesh import Mesh, Place

log = structlog.get_logger(__name__)

_NO_SECRET: Final = bytes(IDENTITY_SECRET_BYTES)
_NO_HANDOFF_SECRET: Final = bytes(HANDOFF_SECRET.size)
LOOK_S: Final = 0.2
WITHHELD_S: Final = 15.0
"""How long waypoint_mgr and its Envoys may take to hear of other ids: it asks at least every ten seconds."""


class Identities:
    """Until a whole mesh is followed the map stays as it was. PinError when the maps are not there."""

    def __init__(
        self, pin_dir: Path, note_error: Callable[..., None], mesh_key: MeshKey | None = None
    ) -> None:
        directory = pins.maps_dir(pin_dir)
        self._note_error = note_error
        self._mesh: Mesh | None = None
        self._pods: dict[bytes, tuple[Place, ...]] = {}
        self._places: set[Place] = set()
        self._had: dict[Place, bytes] = {}
        """The pod that had an address last, by its key. As many as this node's pods ever had addresses."""
        self._inherited: dict[Place, str] = {}
        """Addresses of which nothing was said since another pod has them, and whose they are said to be."""
        with contextlib.ExitStack() as opened:
            self._gate = Gate(pin_dir)
            opened.callback(self._gate.close)
            self._pods_map = opened.enter_context(PinnedMap(directory, "pods"))
            self._map = opened.enter_context(PinnedMap(directory, "identities"))
            self._secrets = opened.enter_context(PinnedMap(directory, "identity_secrets"))
            self._handoff_secrets = opened.enter_context(PinnedMap(directory, "handoff_secrets"))
            self._service_secrets = opened.enter_context(PinnedMap(directory, "service_secrets"))
            self.withheld_until = 0.0
            self._handoff_secret = mesh_key.handoff if mesh_key else _NO_HANDOFF_SECRET
            self._secret = self._take(mesh_key) if mesh_key else _secret(self._secrets)
            self.service_secret = service_secret(self._secret)
            self._service_secrets.put(IDENTITY_SECRET_KEY, self.service_secret)
            if not self.withheld_until:
                self._handoff_secrets.put(IDENTITY_SECRET_KEY, self._handoff_secret)
            self._gate.opened()
            self.close = opened.pop_all().close

    async def run(self) -> None:
        """Takes what pods come and go. Until cancelled."""
        while True:
            self.look()
            await anyio.sleep(LOOK_S)

    def _take(self, mesh_key: MeshKey) -> bytes:
        """In this order: who is ended in between withholds them again, until the last of it is written."""
        known = self._secrets.get(IDENTITY_SECRET_KEY) or _NO_SECRET
        is_new = (known, self._handoff_secrets.get(IDENTITY_SECRET_KEY)) != mesh_key
        if is_new and known != _NO_SECRET:
            self.withheld_until = time.monotonic() + WITHHELD_S
            self._handoff_secrets.put(IDENTITY_SECRET_KEY, _NO_HANDOFF_SECRET)
            for key in [key for key, _ in self._map.items()]:
                self._map.remove(key)
            log.warning("mesh_key_changed", effect=f"pods are nobody to waypoints for {WITHHELD_S:.0f} s")
        self._secrets.put(IDENTITY_SECRET_KEY, mesh_key.identity)
        return mesh_key.identity

    def look(self) -> None:
        if self.withheld_until and time.monotonic() > self.withheld_until:
            self.withheld_until = 0.0
            self._handoff_secrets.put(IDENTITY_SECRET_KEY, self._handoff_secret)
            self._say()
        pods = {key: tuple(_places(value)) for key, value in self._pods_map.items()}
        if pods != self._pods:
            for key, places in pods.items():
                taken = (place for place in places if self._had.setdefault(place, key) != key)
                self._inherited.update((place, self._said_at(place)) for place in taken)
                self._had.update(dict.fromkeys(places, key))
            self._pods = pods
            self._places = {place for places in pods.values() for place in places}
            self._say()

    def follow(self, mesh: Mesh, change: Change) -> None:
        """After the mesh has changed."""
        self._mesh = mesh
        touched = set(change.touched.among(self._places | self._inherited.keys()))
        for place, before in list(self._inherited.items()):
            if self._said_at(place) != before if change.sweep else place in touched:
                del self._inherited[place]
        if change.sweep or not self._places.isdisjoint(touched):
            self._say()

    def _said_at(self, place: Place) -> str:
        """The workload at an address, by its uid; empty: none, or nothing is known."""
        found = self._mesh.client_at(place) if self._mesh else None
        return found.uid if found else ""

    def are_current(self) -> bool:
        secrets = self._secrets, self._handoff_secrets, self._service_secrets
        opened = (self._pods_map, self._map, *secrets)
        return all(pinned.is_current() for pinned in opened)

    def namespace_id(self, namespace: str) -> bytes:
        return self._hash(f"ns {namespace}")

    def account_id(self, name: str) -> bytes:
        """Of a service account: `namespace/account`."""
        return self._hash(f"sa {name}")

    def _hash(self, text: str) -> bytes:
        hashed = hashlib.blake2b(text.encode(), key=self._secret, digest_size=ID_BYTES).digest()
        return hashed if any(hashed) else bytes(ID_BYTES - 1) + b"\1"

    def _say(self) -> None:
        """Makes the map say what is so: what cannot be written is tried again at the next change."""
        if self._mesh is None or self.withheld_until:
            return
        wanted = {}
        for key, places in self._pods.items():
            if (found := self._identity(self._mesh, places)) != NOBODY:
                wanted[key] = IDENTITY_VALUE.pack(*POD_KEY.unpack(key), *found)
        try:
            with self._gate.writing():
                said = dict(self._map.items())
                for key in said.keys() - wanted.keys():
                    self._map.remove(key)
                for key, value in wanted.items():
                    if said.get(key) != value:
                        self._map.put(key, value)
        except (MapFullError, libbpf.KernelError) as error:
            self._note_error("identities_not_written", error=error)

    def _identity(self, mesh: Mesh, places: tuple[Place, ...]) -> Identity:
        """All its addresses must be the same workload's, or nobody's."""
        if any(place in self._inherited for place in places):
            return NOBODY
        found = [mesh.client_at(place) for place in places if mesh.is_a_workloads(place)]
        first = found[0] if found else None
        if first is None or any(client is None or client.uid != first.uid for client in found):
            return NOBODY
        return self._of(first)

    def _of(self, workload: Workload) -> Identity:
        said = workload_message(workload.raw)
        if not said.namespace:
            return NOBODY
        name = account_name(said.namespace, said.service_account)
        return Identity(self.namespace_id(said.namespace), self.account_id(name))


def _places(pod: bytes) -> Iterator[Place]:
    address4, address6, network, _ = POD_VALUE.unpack(pod)
    for address in (address4, address6):
        if address != NO_IP:
            yield Place(ADDRESS_KEY.pack(address, network))


def _secret(secrets: PinnedMap) -> bytes:
    """Made by whoever is here first: as long as the map lives the ids that Envoys were told stay right."""
    known = secrets.get(IDENTITY_SECRET_KEY) or _NO_SECRET
    if known == _NO_SECRET:
        known = os.urandom(IDENTITY_SECRET_BYTES)
        secrets.put(IDENTITY_SECRET_KEY, known)
    return known
