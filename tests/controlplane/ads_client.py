"""A delta ADS client as plain as can be: it sends what it is told to, and every wait has a deadline."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import grpc.aio

from pykmesh.contracts.settings import ControlPlaneSettings
from pykmesh.controlplane.control_plane import ControlPlane
from pykmesh.controlplane.server import ADDRESS_TYPE, METHOD, SERVICE
from pykmesh.manifests.parse import ConfigError
from pykmesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status

DEADLINE_S = 10.0
NODE = Node(id="ztunnel~127.0.0.1~test.shop~shop.svc.cluster.local")


class AdsClient:
    """One stream. Holds what it was sent, by name, with the version."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.held: dict[str, bytes] = {}
        self.versions: dict[str, str] = {}

    async def request(self, **fields: Any) -> None:
        await self._call.write(DeltaDiscoveryRequest(**{"type_url": ADDRESS_TYPE, **fields}))

    async def subscribe(
        self, versions: Mapping[str, str] | None = None, type_url: str = ADDRESS_TYPE
    ) -> None:
        await self.request(node=NODE, type_url=type_url, initial_resource_versions=versions or {})

    async def receive(self, refuse: str = "") -> DeltaDiscoveryResponse:
        """The next response, answered at once; with `refuse` by a NACK."""
        with anyio.fail_after(DEADLINE_S):
            response: DeltaDiscoveryResponse = await self._call.read()
        for name in response.removed_resources:
            self.held.pop(name, None)
        for resource in response.resources:
            self.held[resource.name] = resource.resource.value
            self.versions[resource.name] = resource.version
        detail = Status(code=3, message=refuse) if refuse else None
        await self.request(type_url=response.type_url, response_nonce=response.nonce, error_detail=detail)
        return response

    async def code(self) -> grpc.StatusCode:
        with anyio.fail_after(DEADLINE_S):
            code: grpc.StatusCode = await self._call.code()
        return code


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[AdsClient]:
    options = (("grpc.max_receive_message_length", -1),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        call = channel.stream_stream(
            f"/{SERVICE}/{METHOD}",
            request_serializer=DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=DeltaDiscoveryResponse.FromString,
        )()
        try:
            yield AdsClient(call)
        finally:
            call.cancel()


class Begun:
    """A control plane that runs, whether it serves yet or not."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.port: int | None = None
        self._serves = anyio.Event()
        self._refusals: list[list[str]] = []
        self._refused = anyio.Event()

    def started(self, port: int) -> None:
        self.port = port
        self._serves.set()

    def refused(self, errors: Sequence[ConfigError]) -> None:
        self._refusals.append([str(error) for error in errors])
        self._refused.set()

    async def serving(self) -> int:
        """The port, once there is one."""
        with anyio.fail_after(DEADLINE_S):
            await self._serves.wait()
        assert self.port is not None
        return self.port

    async def refusal(self) -> list[str]:
        """The next errors for which it does not serve."""
        with anyio.fail_after(DEADLINE_S):
            while not self._refusals:
                self._refused = anyio.Event()
                await self._refused.wait()
        return self._refusals.pop(0)


@asynccontextmanager
async def begun(folder: Path, **settings: Any) -> AsyncIterator[Begun]:
    """A control plane of a folder, on a free port."""
    values = {"listen_port": 0, "poll_ms": 10, "debounce_ms": 5, **settings}
    found = Begun(ControlPlane(ControlPlaneSettings(config_dir=folder, **values)))

    async def run() -> None:
        await found.plane.run(started=found.started, refused=found.refused)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        yield found
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[tuple[ControlPlane, int]]:
    """The same, serving."""
    async with begun(folder, **settings) as found:
        yield found.plane, await found.serving()
