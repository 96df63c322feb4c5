"""A cluster to play the recorded steps in: an object store that behaves as an API server does to them.

What the API server and istiod's own controllers add is added here: creation times, the Service
`default/kubernetes`, statuses that survive a new main part, addresses of ServiceEntries without any.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from pykmesh.controlplane.translate import Cluster
from pykmesh.manifests.addresses import IP
from pykmesh.manifests.objects import (
    KINDS,
    HostAddress,
    Object,
    ServiceEntry,
    ServiceEntryStatus,
    from_plain,
)

Plain = dict[str, Any]
Key = tuple[str, str, str]


class World:
    """Objects by kind, namespace and name, as manifests and as what the control plane reads of them."""

    def __init__(self, api_server_target_port: int) -> None:
        self._manifests: dict[Key, Plain] = {}
        self._objects: dict[Key, Object] = {}
        self._clock = itertools.count()
        self._entry_addresses = itertools.count(1)
        self.apply(_kubernetes_service(api_server_target_port))

    @property
    def cluster(self) -> Cluster:
        return Cluster.of(self._objects.values())

    def play(self, operation: Plain) -> None:
        """Carries out one operation of a step; those of the client and of istiod change no object."""
        verb = next(iter(operation))
        verbs: Mapping[str, Callable[[], None]] = {
            "apply": lambda: self.apply(operation["apply"]),
            "status": lambda: self.set_status(operation["status"]),
            "delete": lambda: self.delete(operation["delete"], operation.get("grace_s", 0)),
            "generate": lambda: self.generate(**operation["generate"]),
            "stream": lambda: None,
            "istiod": lambda: None,
            "settle": lambda: None,
        }
        verbs[verb]()

    def apply(self, manifest: Plain) -> None:
        """Writes the main part; a status that the manifest does not have stays."""
        key = _key(manifest)
        before = self._manifests.get(key)
        metadata = dict(manifest["metadata"])
        metadata["creationTimestamp"] = before["metadata"]["creationTimestamp"] if before else self._now()
        kept = {"status": before["status"]} if before and "status" in before else {}
        self._store(key, {**kept, **manifest, "metadata": metadata})

    def set_status(self, manifest: Plain) -> None:
        key = _key(manifest)
        self._store(key, {**self._manifests[key], "status": manifest["status"]})

    def delete(self, manifest: Plain, grace_s: int) -> None:
        """With a grace the pod stays, terminating."""
        key = _key(manifest)
        if grace_s:
            stays = self._manifests[key]
            self._store(key, {**stays, "metadata": {**stays["metadata"], "deletionTimestamp": self._now()}})
        else:
            del self._manifests[key]
            self._objects.pop(key, None)

    def generate(self, services: int, pods: int) -> None:
        for manifest in generated(services, pods):
            self.apply(manifest)

    def _store(self, key: Key, manifest: Plain) -> None:
        self._manifests[key] = manifest
        group = manifest["apiVersion"].rpartition("/")[0]
        kind = KINDS.get((group, manifest["kind"]))
        if kind:
            obj = from_plain(_without_nulls(manifest), kind)
            self._objects[key] = self._with_addresses(obj) if isinstance(obj, ServiceEntry) else obj

    def _with_addresses(self, entry: ServiceEntry) -> ServiceEntry:
        """As istiod's controller does: the next free address of each range for each host."""
        addresses = []
        for host in filter(entry.takes_address, entry.spec.hosts):
            number = next(self._entry_addresses)
            values = (f"240.240.0.{number}", f"2001:2::{number:x}")
            addresses += [HostAddress(value=IP(value), host=host) for value in values]
        return msgspec.structs.replace(entry, status=ServiceEntryStatus(addresses=tuple(addresses)))

    def _now(self) -> str:
        return f"2026-01-01T00:{next(self._clock):08}Z"


def generated(services: int, pods: int) -> Iterator[Plain]:
    """The mesh of the recording `scale`: services in four namespaces, the pods of each on two nodes in turn.

    Service i has the address 10.96.(100 + i div 250).(i mod 250 + 1), port 80 to 8080. Pods are counted
    through: number n has 10.(245 + n div 65000).(n mod 65000 div 250).(n mod 250 + 1).
    """
    yield from (
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"scale-{i}"}} for i in range(4)
    )
    for i in range(services):
        name, namespace = f"svc-{i:04}", f"scale-{i % 4}"
        block, host = divmod(i, 250)
        address = f"10.96.{100 + block}.{host + 1}"
        yield {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "clusterIP": address,
                "clusterIPs": [address],
                "ipFamilies": ["IPv4"],
                "selector": {"app": name},
                "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
            },
        }
        yield from (_generated_pod(name, namespace, j, i * pods + j) for j in range(pods))


def _generated_pod(app: str, namespace: str, index: int, number: int) -> Plain:
    high, rest = divmod(number, 65000)
    middle, low = divmod(rest, 250)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{app}-{index}",
            "namespace": namespace,
            "labels": {"app": app, "version": "v1"},
            "annotations": {"ambient.istio.io/redirection": "enabled"},
        },
        "spec": {"nodeName": ("node-a", "node-b")[index % 2], "serviceAccountName": "default"},
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": f"10.{245 + high}.{middle}.{low + 1}"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def _kubernetes_service(target_port: int) -> Plain:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default"},
        "spec": {
            "clusterIPs": ["10.96.0.1"],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "https", "port": 443, "targetPort": target_port}],
        },
    }


def _key(manifest: Plain) -> Key:
    metadata = manifest["metadata"]
    return manifest["kind"], metadata.get("namespace", ""), metadata["name"]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
