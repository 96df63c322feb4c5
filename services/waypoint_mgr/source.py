"""What is configured: Gateways that are waypoints, routes and services, from a folder that is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec

from pykmesh.manifests.folder import Content, Folder
from pykmesh.manifests.http_route import HTTPRouteSpec
from pykmesh.manifests.objects import (
    USE_WAYPOINT,
    USE_WAYPOINT_NAMESPACE,
    Gateway,
    GRPCRoute,
    HTTPRoute,
    Labels,
    Namespace,
    Object,
    ObjectRef,
    Service,
    ref_of,
    service_hostname,
)

_T = TypeVar("_T", bound=Object)


def mesh_name(namespace: str, name: str, domain: str) -> str:
    """A Kubernetes service's name in the mesh, `namespace/hostname`."""
    return f"{namespace}/{service_hostname(name, namespace, domain)}"


class Route(msgspec.Struct, frozen=True):
    """An HTTPRoute, or a GRPCRoute as the HTTPRoute that does the same."""

    ref: ObjectRef
    created: str
    spec: HTTPRouteSpec
    is_grpc: bool = False

    @classmethod
    def of(cls, obj: HTTPRoute | GRPCRoute) -> Route:
        is_grpc = isinstance(obj, GRPCRoute)
        spec = obj.spec.as_http if isinstance(obj, GRPCRoute) else obj.spec
        return cls(ref_of(obj), obj.metadata.creation_timestamp, spec, is_grpc)

    @property
    def namespace(self) -> str:
        return self.ref.namespace

    @property
    def name(self) -> str:
        return self.ref.name


class Objects(msgspec.Struct, frozen=True):
    """Waypoints and services by their names in the mesh (a waypoint is named as its own service is)."""

    waypoints: Mapping[str, Gateway] = {}
    services: Mapping[str, Service] = {}
    routes: tuple[Route, ...] = ()
    namespaces: Mapping[str, Labels] = {}
    """Those that are said, with their labels."""
    errors: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: Content, domain: str) -> Objects:
        objects = [located.object for located in content.objects]
        return cls(
            waypoints=_by_mesh_name((o for o in objects if isinstance(o, Gateway) and o.is_waypoint), domain),
            services=_by_mesh_name((o for o in objects if isinstance(o, Service)), domain),
            routes=tuple(Route.of(o) for o in objects if isinstance(o, HTTPRoute | GRPCRoute)),
            namespaces={o.name: o.labels for o in objects if isinstance(o, Namespace)},
            errors=tuple(map(str, content.errors)),
        )

    def namespaces_of(self, waypoint: Gateway) -> set[str]:
        """Those whose services may come by way of it any moment: its own, and guests that name it."""
        return {waypoint.namespace} | (self._named_by(waypoint) - self.turned_away(waypoint))

    def turned_away(self, waypoint: Gateway) -> set[str]:
        """Namespaces that name it, which it does not let in."""
        named = self._named_by(waypoint)
        return {one for one in named if not waypoint.lets_in(one, self.namespaces.get(one, {}))}

    def _named_by(self, waypoint: Gateway) -> set[str]:
        return {
            namespace
            for namespace, labels in self._labels()
            if labels.get(USE_WAYPOINT) == waypoint.name
            and labels.get(USE_WAYPOINT_NAMESPACE) == waypoint.namespace
        }

    def _labels(self) -> Iterator[tuple[str, Labels]]:
        yield from self.namespaces.items()
        for service in self.services.values():
            yield service.namespace, service.labels


def _by_mesh_name(objects: Iterable[_T], domain: str) -> dict[str, _T]:
    return {mesh_name(obj.namespace, obj.name, domain): obj for obj in objects}


async def watch(path: Path, domain: str, poll_s: float, changed: Callable[[Objects], None]) -> None:
    """Tells what the folder says, now and whenever that changes. Runs until cancelled."""
    folder = Folder(path)
    last: Objects | None = None
    while True:
        sight = await anyio.to_thread.run_sync(folder.look)
        if last is None or folder.has_changed(sight):
            found = Objects.of(await anyio.to_thread.run_sync(folder.read, sight), domain)
            if found != last:
                last = found
                changed(found)
        await anyio.sleep(poll_s)
