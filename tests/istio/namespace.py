"""A Kubernetes namespace of a test. What is made in it goes with the test."""

from __future__ import annotations

from tests.control.resources import host
from tests.istio.api_server import ApiServer
from tests.mesh.manifests import Object

NODE = "n1"
"""Where the pods are, and the mesh under test, unless a test says otherwise."""


class Namespace:
    def __init__(self, api: ApiServer, name: str) -> None:
        self._api = api
        self._made: dict[tuple[str, str], Object] = {}
        self.name = name
        self.api = api
        api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def apply(self, *objects: Object) -> None:
        """Creates or changes these, in this namespace."""
        for manifest in objects:
            metadata = {**manifest["metadata"], "namespace": self.name}
            placed = {**manifest, "metadata": metadata}
            if manifest["kind"] == "Pod":
                placed["spec"] = {"nodeName": NODE, **manifest["spec"]}
            self._made[manifest["kind"], metadata["name"]] = placed
            self._api.apply(placed)

    def get(self, kind: str, name: str) -> Object:
        return self._api.get(self._made[kind, name])

    def delete(self, kind: str, *names: str) -> None:
        """All of the kind, when no name is given."""
        for name in names or [name for other, name in self._made if other == kind]:
            self._api.delete(self._made.pop((kind, name)))

    def end(self) -> None:
        for kind in {kind for kind, _ in self._made}:
            self.delete(kind)

    def vips(self, service: str) -> list[str]:
        """What the API server chose: IPv4, then IPv6."""
        found: list[str] = self.get("Service", service)["spec"]["clusterIPs"]
        return sorted(found, key=lambda address: ":" in address)

    def host(self, service: str) -> str:
        """The resource name of a service."""
        return host(service, self.name)
