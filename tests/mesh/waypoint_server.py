"""A waypoint that says to each client, before it hears anything, what the kernel told it of the connection.

`python -m tests.mesh.waypoint_server PORT`; it listens on both families and asks as Envoy's listener filter
`original_dst` does.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading

SO_ORIGINAL_DST = 80
SOCKADDR_IN6_BYTES = 28


def original_destination(connection: socket.socket) -> str:
    level = socket.IPPROTO_IP if connection.family == socket.AF_INET else socket.IPPROTO_IPV6
    try:
        data = connection.getsockopt(level, SO_ORIGINAL_DST, SOCKADDR_IN6_BYTES)
    except OSError:
        return "nothing"
    family, port = struct.unpack("=H", data[:2])[0], struct.unpack("!H", data[2:4])[0]
    if family == socket.AF_INET:
        return f"{socket.inet_ntoa(data[4:8])} {port}"
    return f"{socket.inet_ntop(socket.AF_INET6, data[8:24])} {port}"


def serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(original_destination(connection).encode())


def main() -> None:
    port = int(sys.argv[1])
    listeners = [
        socket.create_server(("0.0.0.0", port)),
        socket.create_server(("::", port), family=socket.AF_INET6),
    ]
    for listener in listeners:
        threading.Thread(target=serve, args=(listener,)).start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
