"""The map of pods: a network namespace's addresses by its cookie, for the cgroups that are in it.

Invariant: an entry is there for as long as an enrolled cgroup has its namespace. Who has which is
told by the names of the link directories.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from pykmesh.kernel.libbpf import KernelError
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import NO_IP, POD_KEY, POD_VALUE, Ip
from services.bpf_loader.netns import Namespace

HOW_TO_RESIZE: Final = (
    "pykmesh uninstall (after down), then up: the pinned map stays as it was made until then"
)


class Pod(NamedTuple):
    """An entry, without its network. `cgroup_id` is one of the namespace's; 0: it is being unenrolled."""

    address4: Ip
    address6: Ip
    cgroup_id: int

    @property
    def has_address(self) -> bool:
        return (self.address4, self.address6) != (NO_IP, NO_IP)


class Pods:
    def __init__(self, map_dir: Path, network: int) -> None:
        self._map = PinnedMap(map_dir, "pods")
        self._network = network

    def close(self) -> None:
        self._map.close()

    def put(self, namespace: Namespace, cgroup_id: int) -> None:
        """OSError that says what to do when the map is full."""
        value = POD_VALUE.pack(namespace.address4, namespace.address6, self._network, cgroup_id)
        try:
            self._map.put(POD_KEY.pack(namespace.cookie), value)
        except KernelError as error:
            if error.errno != errno.E2BIG:
                raise
            room = self._map.max_entries
            why = f"no room for more than {room} pods (pods_max); for more: {HOW_TO_RESIZE}"
            raise OSError(error.errno, why) from error

    def get(self, cookie: int) -> Pod | None:
        value = self._map.get(POD_KEY.pack(cookie))
        if value is None:
            return None
        address4, address6, _, cgroup_id = POD_VALUE.unpack(value)
        return Pod(address4, address6, cgroup_id)

    def all(self) -> dict[int, Pod]:
        """By cookie."""
        found = {}
        for key, value in self._map.items():
            address4, address6, _, cgroup_id = POD_VALUE.unpack(value)
            found[POD_KEY.unpack(key)[0]] = Pod(address4, address6, cgroup_id)
        return found

    def disown(self, cookie: int, cgroup_id: int) -> None:
        """The entry names this cgroup no more: whoever finds it named would take it for enrolled."""
        pod = self.get(cookie)
        if pod is not None and pod.cgroup_id == cgroup_id:
            self.put(Namespace(cookie, pod.address4, pod.address6), 0)

    def settle(self, cgroups: Mapping[int, Collection[int]]) -> None:
        """By the enrolled cgroups of each cookie: drops entries of none; none names one that left."""
        for cookie, pod in self.all().items():
            ids = cgroups.get(cookie, ())
            if not ids:
                self._map.remove(POD_KEY.pack(cookie))
            elif pod.cgroup_id not in ids:
                self.put(Namespace(cookie, pod.address4, pod.address6), min(ids))
