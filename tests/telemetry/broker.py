"""A broker of the tests' own, and map_writer's answers."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import anyio

from pykmesh import bus
from pykmesh.contracts import messages
from pykmesh.contracts.messages import ResolveReply, ResolveRequest, ServiceName, Subject, WorkloadName
from pykmesh.node.broker import find_server
from tests.telemetry.waiting import until


@contextlib.asynccontextmanager
async def broker(directory: Path) -> AsyncIterator[str]:
    """The URL of a nats-server on a port that it chose itself."""
    listen = ["-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(directory)]
    command = [str(find_server()), *listen]
    async with await anyio.open_process(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        ports = directory / f"nats-server_{process.pid}.ports"
        try:
            text = await until("ports of nats-server", lambda: ports.exists() and ports.read_text())
            yield json.loads(text)["nats"][0]
        finally:
            process.terminate()


@contextlib.asynccontextmanager
async def map_writer(
    url: str, services: Mapping[int, ServiceName], workloads: Mapping[bytes, WorkloadName]
) -> AsyncIterator[list[ResolveRequest]]:
    """Answers for as long as the block runs; yields what it was asked."""
    asked: list[ResolveRequest] = []

    async def answer(data: bytes) -> bytes:
        request = messages.decode(ResolveRequest, data)
        asked.append(request)
        found = [services.get(number) for number in request.services]
        named = [workloads.get(address) for _, address in request.addresses]
        return messages.encode(ResolveReply(messages.VERSION, found, named))

    connection = await bus.connect(url, "map_writer", None, lambda _: None)
    try:
        await connection.serve(Subject.MAP_RESOLVE, answer)
        yield asked
    finally:
        await connection.close()
