"""A server to be an endpoint: HTTP on TCP, echo on UDP, both families. It counts what reaches it.

`python -m pykmesh.demo.endpoint NAME --http 8080 --udp 9090`; at SIGUSR1, and told to end, it writes
one JSON line with `connections`, `requests` and `datagrams`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket


class Counts:
    def __init__(self) -> None:
        self.connections = 0
        self.requests = 0
        self.datagrams = 0


class _Http(asyncio.Protocol):
    """Answers each request with the endpoint's name; keeps the connection unless told to close it."""

    def __init__(self, name: str, counts: Counts) -> None:
        body = f"{name}\n".encode()
        self._answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n%s" % (
            len(body),
            body,
        )
        self._counts = counts
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._counts.connections += 1

    def data_received(self, data: bytes) -> None:
        *requests, self._rest = (self._rest + data).split(b"\r\n\r\n")
        for request in requests:
            self._counts.requests += 1
            self._transport.write(self._answer)  # type: ignore[attr-defined]  # a socket's transport
            if b"connection: close" in request.lower():
                self._transport.close()


class _Echo(asyncio.DatagramProtocol):
    """Sends each datagram back behind the endpoint's name."""

    def __init__(self, name: str, counts: Counts) -> None:
        self._name = name.encode()
        self._counts = counts

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str | int, ...]) -> None:
        self._counts.datagrams += 1
        self._transport.sendto(self._name + b" " + data, address)  # type: ignore[attr-defined]


def _bound(kind: socket.SocketKind, port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET6, kind)
    found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("::", port))
    return found


async def _serve(name: str, http: list[int], udp: int | None, counts: Counts) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGUSR1, _tell, counts)
    for port in http:
        await loop.create_server(
            lambda: _Http(name, counts), sock=_bound(socket.SOCK_STREAM, port), backlog=1024
        )
    if udp is not None:
        await loop.create_datagram_endpoint(lambda: _Echo(name, counts), sock=_bound(socket.SOCK_DGRAM, udp))
    print("ready", flush=True)
    await ended.wait()


def _tell(counts: Counts) -> None:
    print(json.dumps(vars(counts)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--http", type=int, action="append", default=[])
    parser.add_argument("--udp", type=int)
    arguments, counts = parser.parse_args(), Counts()
    asyncio.run(_serve(arguments.name, arguments.http, arguments.udp, counts))
    _tell(counts)


if __name__ == "__main__":
    main()
