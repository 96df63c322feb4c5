"""HTTP servers on loopback that answer with what they were asked, and a client that asks as it is told."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pykmesh.contracts.waypoints import Endpoint
from pykmesh.node.instance import ports_of_no_client

DEADLINE_S = 10.0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one segment
    server: Backend

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen = {
            "backend": self.server.name,
            "method": self.command,
            "path": self.path,
            "headers": {name.lower(): ",".join(self.headers.get_all(name, [])) for name in self.headers},
            "body": body.decode(),
        }
        self.server.seen.put(seen)
        asked = parse_qs(urlsplit(self.path).query)
        if "wait" in asked:
            self.server.released.wait(float(asked["wait"][0]))
        fails = int(asked.get("fail", ["0"])[0])
        status = 503 if self.server.failures(self.path) < fails else 200
        status = 500 if self.server.is_broken else status
        answer = b"" if self.command == "HEAD" else json.dumps(seen).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("X-Backend", self.server.name)
        self.send_header("X-Extra", "extra")
        self.end_headers()
        self.wfile.write(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = do_GET  # noqa: N815  (its names)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


class Backend(ThreadingHTTPServer):
    """`seen`: the requests that came. `?wait=S` waits, `?fail=N` answers 503 N times first."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.seen: Queue[dict[str, Any]] = Queue()
        self.released = threading.Event()
        self.is_broken = False
        """It answers with 500."""
        self.connections = 0
        self._failed: dict[str, int] = {}

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("127.0.0.1", self.server_address[1])

    def failures(self, path: str) -> int:
        """How often the path was asked for before."""
        before = self._failed.get(path, 0)
        self._failed[path] = before + 1
        return before

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves early is part of the tests."""


@contextmanager
def serving(name: str) -> Iterator[Backend]:
    backend = Backend(name)
    thread = threading.Thread(target=backend.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield backend
    finally:
        backend.released.set()
        backend.shutdown()
        thread.join()
        backend.server_close()


class Answer:
    """What came back; `told` is the backend's account of the request, {} if none served it."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = body = response.read()
        is_told = "x-backend" in self.headers and body
        self.told: dict[str, Any] = json.loads(body) if is_told else {}


def ask(
    address: str, port: int, path: str = "/", method: str = "GET", headers: dict[str, str] | None = None
) -> Answer:
    connection = http.client.HTTPConnection(address, port, timeout=DEADLINE_S)
    try:
        connection.request(method, path, headers={"Host": "web", **(headers or {})})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def free_port() -> int:
    """One that the kernel gives to no client."""
    return ports_of_no_client(1)[0]
