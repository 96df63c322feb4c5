"""What draining records costs telemetry, as a ratio to what writing them costs the kernel.

    python -m bench.drain [--rate 300000] [--seconds 5]

Records are written by a program in the kernel (BPF_PROG_TEST_RUN) at a steady rate and drained on the timer
that telemetry has, with sums and without names. `lost`: the ring was full, so the machine is too slow for it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from pykmesh.contracts.settings import LoaderSettings, TelemetrySettings
from pykmesh.kernel.ring import RingReader
from tests.telemetry.books import Books, Producer
from tests.telemetry.kernel import Instance, compile_emitter, instance
from tests.telemetry.waiting import until


async def drain(node: Instance, rate: int, seconds: float) -> dict[str, Any]:
    with RingReader(node.maps_dir) as ring:
        books, producer = Books(ring), Producer(node, rate, seconds)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(books.drain.run, TelemetrySettings().drain_interval_s)
            spent = time.thread_time()
            producer.start()
            await anyio.to_thread.run_sync(producer.join)
            await until("empty ring", lambda: not ring.lag_bytes)
            spent = time.thread_time() - spent
            tasks.cancel_scope.cancel()
    drained = books.drain.drained
    assert producer.tried == drained + node.lost()
    return {
        "records_per_s": round(producer.tried / producer.took_s),
        "drained": drained,
        "lost": node.lost(),
        "drain_us": round(spent / drained * 1e6, 3),
        "write_us": round(producer.spent_s / producer.tried * 1e6, 3),
        "ratio": round(spent / drained / (producer.spent_s / producer.tried), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=int, default=300_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        with instance(directory, compile_emitter(directory), LoaderSettings().flows_bytes) as node:
            print(json.dumps(anyio.run(drain, node, options.rate, options.seconds)))


if __name__ == "__main__":
    main()
