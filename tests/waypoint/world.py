"""A waypoint without the kernel's help: what it would be told of a connection are addresses of loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from pykmesh.contracts.handoff import NOBODY, Identity, told_address
from pykmesh.contracts.waypoints import Endpoint, MeshService, ServicePort
from pykmesh.kernel.records import ip_from_text
from pykmesh.manifests.objects import (
    KINDS,
    Gateway,
    GRPCRoute,
    HTTPRoute,
    ObjectRef,
    Service,
    TCPRoute,
    from_plain,
)
from services.waypoint_mgr import instances
from services.waypoint_mgr.ads import AdsServer, NodeStatus
from services.waypoint_mgr.blame import bootstrap_of
from services.waypoint_mgr.encode import resources
from services.waypoint_mgr.policies import Clients
from services.waypoint_mgr.routes import Configuration, Wanted, translate
from services.waypoint_mgr.source import Authentication, Destination, Policy, Route, Virtual
from services.waypoint_mgr.spans import Spans
from services.waypoint_mgr.tls import NO_ROOTS

from .backends import free_port

DOMAIN = "cluster.local"
NODE = "waypoint~1"
DEADLINE_S = 20.0
SECRET = bytes(range(1, 41))
"""What addresses of IPv6 are hashed with."""
TO_WEB = {"group": "", "kind": "Service", "name": "web"}


def at(vip: str, client: Identity = NOBODY) -> str:
    """Where a client of a service at `vip` connects to."""
    return told_address(ip_from_text(vip), SECRET, client)


def named(namespace: str, name: str) -> str:
    return f"{namespace}/{name}.{namespace}.svc.{DOMAIN}"


def gateway(
    annotations: Mapping[str, str] | None = None,
    lets_in: str = "Same",
    kinds: Sequence[Mapping[str, str]] = (),
) -> Gateway:
    plain = {
        "metadata": {"name": "waypoint", "namespace": "shop", "annotations": dict(annotations or {})},
        "spec": {
            "gatewayClassName": "pykmesh-waypoint",
            "listeners": [
                {
                    "name": "mesh",
                    "port": 15019,
                    "protocol": "TCP",
                    "allowedRoutes": {"namespaces": {"from": lets_in}, "kinds": [*kinds]},
                }
            ],
        },
    }
    made = from_plain(plain, Gateway)
    assert isinstance(made, Gateway)
    return made


def http_route(namespace: str, name: str, spec: dict[str, Any], created: str = "") -> Route:
    """Attached to the Service web, if it does not say otherwise."""
    plain = {
        "metadata": {"name": name, "namespace": namespace, "creationTimestamp": created},
        "spec": {"parentRefs": [TO_WEB], **spec},
    }
    made = from_plain(plain, KINDS["gateway.networking.k8s.io", "HTTPRoute"])
    assert isinstance(made, HTTPRoute)
    return Route.of(made)


def tcp_route(namespace: str, name: str, *backends: dict[str, Any], **spec: Any) -> Route:
    """Attached to the Service web, if it does not say otherwise."""
    plain = {
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"parentRefs": [TO_WEB], "rules": [{"backendRefs": list(backends)}], **spec},
    }
    made = from_plain(plain, KINDS["gateway.networking.k8s.io", "TCPRoute"])
    assert isinstance(made, TCPRoute)
    return Route.of(made)


def grpc_route(namespace: str, name: str, spec: dict[str, Any]) -> Route:
    """Attached to the Service web."""
    plain = {"metadata": {"name": name, "namespace": namespace}, "spec": {"parentRefs": [TO_WEB], **spec}}
    made = from_plain(plain, KINDS["gateway.networking.k8s.io", "GRPCRoute"])
    assert isinstance(made, GRPCRoute)
    return Route.of(made)


def kubernetes_service(
    namespace: str, name: str, *ports: dict[str, Any], annotations: Mapping[str, str] | None = None
) -> Service:
    metadata = {"name": name, "namespace": namespace, "annotations": dict(annotations or {})}
    plain = {"metadata": metadata, "spec": {"ports": list(ports)}}
    made = from_plain(plain, Service)
    assert isinstance(made, Service)
    return made


def mesh_service(
    namespace: str, name: str, ports: Mapping[int, Iterable[Endpoint]], vips: Sequence[str] = ()
) -> MeshService:
    listed = [ServicePort(port, list(endpoints)) for port, endpoints in ports.items()]
    return MeshService(named(namespace, name), list(vips), listed)


class World:
    """What there is: change it, then `apply`."""

    def __init__(self) -> None:
        self.gateway = gateway()
        self.users: list[MeshService] = []
        self.known: dict[str, MeshService] = {}
        self.services: dict[str, Service] = {}
        self.routes: list[Route] = []
        self.policies: list[Policy] = []
        self.destinations: list[Destination] = []
        self.virtuals: list[Virtual] = []
        self.authentications: list[Authentication] = []
        self.clients = Clients(service_secret=SECRET)
        self.spans: Spans | None = None
        self.names: Path | None = None
        self.roots = NO_ROOTS
        self.is_reduced = False
        self.blamed: dict[ObjectRef, str] = {}

    def add_user(self, service: MeshService, kubernetes: Service) -> None:
        self.users.append(service)
        self.services[service.name] = kubernetes

    def add_backend(self, service: MeshService) -> None:
        self.known[service.name] = service

    def configuration(self) -> Configuration:
        wanted = Wanted(
            self.routes,
            self.policies,
            self.destinations,
            self.virtuals,
            self.authentications,
            roots=self.roots,
        ).blaming(self.blamed)
        return translate(
            self.gateway,
            self.users,
            self.known,
            self.services,
            wanted.reduced if self.is_reduced else wanted,
            DOMAIN,
            self.clients,
            self.spans,
            self.names,
        )


async def refusal_aside(configuration: Configuration) -> str:
    """Of an Envoy that serves nobody: whom it would have blamed (`services/waypoint_mgr/blame.py`)."""
    return await instances.refusal(bootstrap_of(configuration))


class Waypoint:
    """An Envoy that gets its configuration from a server of ours."""

    def __init__(self, server: AdsServer, spec: instances.Spec, port: int) -> None:
        self.server = server
        self.spec = spec
        self.port = port
        self.instance = instances.start(spec)

    async def apply(self, configuration: Configuration) -> NodeStatus:
        self.server.publish(self.spec.node_id, resources(configuration, "::", self.port))
        with anyio.fail_after(DEADLINE_S):
            return await self.server.settled(self.spec.node_id)

    async def ready(self) -> None:
        with anyio.fail_after(DEADLINE_S):
            while not await self.instance.is_ready():  # noqa: ASYNC110  (it does not say when)
                await anyio.sleep(0.02)

    async def end(self) -> None:
        await self.instance.stop()
        self.instance.close()


@asynccontextmanager
async def ads_server(path: Path) -> AsyncIterator[AdsServer]:
    server, started = AdsServer(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, path, started.set)
        await started.wait()
        yield server
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def waypoint(
    server: AdsServer, folder: Path, node_id: str = NODE, **spec: Any
) -> AsyncIterator[Waypoint]:
    said = instances.Spec(
        node_id=node_id,
        waypoint="shop/waypoint",
        state_dir=folder / node_id,
        ads_socket=folder / "ads",
        **spec,
    )
    found = Waypoint(server, said, free_port())
    try:
        yield found
    finally:
        await found.end()
