"""The health check of a container: exit status 0 when the process in it is ready.

`python -S ready.py` asks the process's own /readyz; `python -S ready.py broker PORT` looks for a NATS
server's greeting. Only `socket`, so that it costs little.
"""

from __future__ import annotations

import os
import socket
import sys

TIMEOUT_S = 2.0


def answer(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        connection.sendall(request)
        return connection.recv(1024)


def is_ready(words: list[str]) -> bool:
    if words and words[0] == "broker":
        return answer(int(words[1]), b"").startswith(b"INFO ")
    request = b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n"
    return answer(int(os.environ["PYKMESH_ADMIN_PORT"]), request).startswith(b"HTTP/1.1 200 ")


if __name__ == "__main__":
    try:
        sys.exit(not is_ready(sys.argv[1:]))
    except OSError as error:
        sys.exit(f"not ready: {error}")
