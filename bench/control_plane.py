"""A scripted control plane in a process of its own: nothing when asked, then what it is told.

    python -m bench.control_plane SERVICES PODS [KIND] [at-once]

KIND: of pods, by `meshes.KINDS`. at-once: the whole mesh when asked.
Commands come as JSON lines on standard input: `{"mesh": true}`, the whole mesh in one response;
`{"health": n, "healthy": b}`, a pod's health; `{"replace": n}`, a pod is replaced. Answers go as JSON
lines to standard output, `sent` and `acked` in seconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import grpc
import grpc.aio

from bench import meshes
from pykmesh.contracts.messages import TYPE_URLS, ResourceType
from pykmesh.proto import discovery_pb2, workload_pb2

Request = discovery_pb2.DeltaDiscoveryRequest
METHOD = "DeltaAggregatedResources"
SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"


class Plane:
    """Serves one client at a time."""

    def __init__(self, services: int, pods: int, kind: str, *, at_once: bool) -> None:
        self.services, self.pods, self.kind = services, pods, kind
        self.at_once = at_once
        self.mesh = meshes.response(list(meshes.mesh(services, pods, kind)), "mesh")
        self.outbox: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.sent: dict[str, float] = {}
        self.number = 0
        self.next_address = services * pods
        self.generation = [0] * services

    async def stream(self, _: grpc.aio.StreamStreamCall, context: grpc.aio.ServicerContext) -> None:
        writer = asyncio.create_task(self._write(context))
        try:
            while (request := await context.read()) is not grpc.aio.EOF:
                await self._read(request)
        finally:
            writer.cancel()

    async def _read(self, request: Request) -> None:
        if not request.response_nonce:
            if self.at_once and request.type_url == TYPE_URLS[ResourceType.ADDRESS]:
                await self.outbox.put(("mesh", self.mesh))
                return
            # An empty mesh at first: the processes are warm when the mesh comes.
            nonce = "first" if request.type_url == TYPE_URLS[ResourceType.ADDRESS] else "policies"
            empty = discovery_pb2.DeltaDiscoveryResponse(type_url=request.type_url, nonce=nonce)
            await self.outbox.put((nonce, empty.SerializeToString()))
            return
        now = time.monotonic()
        say(nonce=request.response_nonce, sent=self.sent.pop(request.response_nonce), acked=now,
            error=request.error_detail.message)  # fmt: skip

    async def _write(self, context: grpc.aio.ServicerContext) -> None:
        while True:
            nonce, data = await self.outbox.get()
            self.sent[nonce] = time.monotonic()
            await context.write(data)

    async def command(self, line: str) -> None:
        command = json.loads(line)
        if "mesh" in command:
            await self.outbox.put(("mesh", self.mesh))
            return
        self.number += 1
        nonce = f"push-{self.number}"
        if "health" in command:
            service, pod = command["health"] % self.services, 0
            healthy = bool(command["healthy"])
            address = service * self.pods + pod
            resources = [meshes.workload(service, pod, address, self.kind, healthy=healthy)]
            await self.outbox.put((nonce, meshes.response(resources, nonce)))
        if "replace" in command:
            service = command["replace"] % self.services
            old = self.generation[service]
            self.generation[service] += 1
            self.next_address += 1
            resources = [meshes.workload(service, self.pods + old, self.next_address, self.kind)]
            gone = meshes.pod_uid(service, self.pods + old - 1)
            await self.outbox.put((nonce, meshes.response(resources, nonce, (gone,))))


def floor_ms(response: bytes) -> float:
    """The baseline: parsing the response and each address in it, reading nothing from them."""
    began = time.perf_counter()
    for resource in discovery_pb2.DeltaDiscoveryResponse.FromString(response).resources:
        workload_pb2.Address.FromString(resource.resource.value)
    return (time.perf_counter() - began) * 1e3


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def main(services: int, pods: int, kind: str, *, at_once: bool) -> None:
    plane = Plane(services, pods, kind, at_once=at_once)
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    handler = grpc.stream_stream_rpc_method_handler(plane.stream, request_deserializer=Request.FromString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(port=port, bytes=len(plane.mesh), floor_ms=floor_ms(plane.mesh))
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        await plane.command(line.decode())


if __name__ == "__main__":
    words = sys.argv[3:]
    kind = next((word for word in words if word in meshes.KINDS), "plain")
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), kind, at_once="at-once" in words))
