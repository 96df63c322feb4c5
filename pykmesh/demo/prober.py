"""A client that connects every 10 ms and says what it saw, in a process of its own.

`python -m pykmesh.demo.prober HOST PORT`; at SIGUSR1, and told to end, it writes one JSON line:
`connections`, `failed`, `errors` (by text), `answers` (by endpoint) and `longest_pause_ms`, the
longest gap between two successes.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections import Counter
from types import FrameType
from typing import Final

INTERVAL_S: Final = 0.01
TIMEOUT_S: Final = 2.0


class Prober:
    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._ended = False
        self.connections = self.failed = 0
        self.errors: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.longest_pause_ms = 0.0

    def end(self, _: int, __: FrameType | None) -> None:
        self._ended = True

    def tell(self, _: int = 0, __: FrameType | None = None) -> None:
        found = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        print(json.dumps({**found, "longest_pause_ms": round(self.longest_pause_ms, 1)}), flush=True)

    def run(self) -> None:
        """Until told to end. The next connection is begun on time, however long the last one took."""
        last, due = time.monotonic(), time.monotonic()
        while not self._ended:
            self.connections += 1
            try:
                self.answers[self._request()] += 1
            except OSError as error:
                self.failed += 1
                self.errors[error.strerror or type(error).__name__] += 1
            else:
                now = time.monotonic()
                self.longest_pause_ms, last = max(self.longest_pause_ms, (now - last) * 1e3), now
            due = max(due + INTERVAL_S, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def _request(self) -> str:
        with socket.create_connection(self._address, TIMEOUT_S) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: demo\r\nconnection: close\r\n\r\n")
            data = b""
            while part := connection.recv(4096):
                data += part
        if b" 200 " not in data[:20]:
            raise OSError(0, f"not an answer: {data[:40]!r}")
        return data.rpartition(b"\r\n")[2].decode().strip()


def main() -> None:
    prober = Prober(sys.argv[1], int(sys.argv[2]))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, prober.end)
    signal.signal(signal.SIGUSR1, prober.tell)
    print("ready", flush=True)
    prober.run()
    prober.tell()


if __name__ == "__main__":
    main()
