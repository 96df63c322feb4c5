"""What is configured: Gateways that are waypoints, routes and services, from a folder that is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec

from pykmesh.manifests.folder import Content, Folder
from pykmesh.manifests.objects import Gateway, HTTPRoute, Object, Service, service_hostname

_T = TypeVar("_T", bound=Object)


def mesh_name(namespace: str, name: str, domain: str) -> str:
    """A Kubernetes service's name in the mesh, `namespace/hostname`."""
    return f"{namespace}/{service_hostname(name, namespace, domain)}"


class Objects(msgspec.Struct, frozen=True):
    """Waypoints and services by their names in the mesh (a waypoint is named as its own service is)."""

    waypoints: Mapping[str, Gateway] = {}
    services: Mapping[str, Service] = {}
    routes: tuple[HTTPRoute, ...] = ()
    errors: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: Content, domain: str) -> Objects:
        objects = [located.object for located in content.objects]
        return cls(
            waypoints=_by_mesh_name((o for o in objects if isinstance(o, Gateway) and o.is_waypoint), domain),
            services=_by_mesh_name((o for o in objects if isinstance(o, Service)), domain),
            routes=tuple(o for o in objects if isinstance(o, HTTPRoute)),
            errors=tuple(map(str, content.errors)),
        )


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
