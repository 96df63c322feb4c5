"""The process as a whole, on the kernel's maps and a real broker: what it serves is what was written."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from pykmesh.contracts.settings import TelemetrySettings
from pykmesh.kernel import maps
from pykmesh.kernel.layout import FlowKind
from pykmesh.process import Runtime
from services.telemetry import app, ledger, live
from tests.telemetry.broker import broker, map_writer
from tests.telemetry.kernel import LOCAL, OPENS, Instance, remote
from tests.telemetry.rows import WEB, workload
from tests.telemetry.waiting import until

pytestmark = pytest.mark.anyio
NOBODY = "nats://127.0.0.1:1"
NAMES = {LOCAL: workload("client"), remote(0): workload("web")}


class Running:
    """Telemetry in this process, and its pages as others see them."""

    def __init__(
        self, runtime: Runtime[TelemetrySettings], admin_port: int, stop: Callable[[], None]
    ) -> None:
        self.runtime = runtime
        self.stop = stop
        self.url = f"http://127.0.0.1:{admin_port}"
        self.admin_port = admin_port

    async def get(self, path: str, port: int | None = None) -> tuple[int, bytes]:
        stream = await anyio.connect_tcp("127.0.0.1", port or self.admin_port)
        async with stream:
            await stream.send(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
            data = b""
            with anyio.fail_after(10), contextlib.suppress(anyio.EndOfStream):
                while True:
                    data += await stream.receive()
        head, body = data.split(b"\r\n\r\n", 1)
        return int(head.split()[1]), body

    async def metrics(self, path: str = "/metrics") -> dict[str, dict[tuple[str, str], float]]:
        """Sums by metric and (source workload, destination service)."""
        found: dict[str, dict[tuple[str, str], float]] = {}
        for sample in await self.samples(path):
            key = sample.labels.get("source_workload", ""), sample.labels.get("destination_service", "")
            sums = found.setdefault(sample.name, {})
            sums[key] = sums.get(key, 0) + sample.value
        return found

    async def samples(self, path: str = "/metrics") -> list[Sample]:
        status, body = await self.get(path, self.runtime.details()["metrics_port"])
        assert status == 200
        families = text_string_to_metric_families(body.decode())
        return [sample for family in families for sample in family.samples]

    async def metrics_with(self, name: str, value: float) -> dict[str, dict[tuple[str, str], float]]:
        with anyio.fail_after(20):
            while True:
                found = await self.metrics()
                if sum(found.get(name, {}).values()) == value:
                    return found


@contextlib.asynccontextmanager
async def telemetry(pin_dir: Path, nats_url: str) -> AsyncIterator[Running]:
    settings = TelemetrySettings(
        pin_dir=pin_dir, nats_url=nats_url, metrics_port=0, admin_port=0, observe_buffer=64
    )
    runtime = Runtime("telemetry", settings)
    async with anyio.create_task_group() as tasks:
        port = await tasks.start(runtime.admin.serve, "127.0.0.1", 0)
        runtime.admin.page("/status", runtime.status)
        tasks.start_soon(app.run, runtime)
        yield Running(runtime, port, tasks.cancel_scope.cancel)
        tasks.cancel_scope.cancel()
    if runtime.bus is not None:
        await runtime.bus.close()


async def serving(running: Running) -> None:
    await until("drain", lambda: "ring" in running.runtime.details())


async def ready(running: Running) -> None:
    await serving(running)
    await until("readiness", lambda: running.runtime.readiness.ready)


async def test_what_was_opened_closed_and_failed_is_served_under_istios_names(
    small: Instance, tmp_path: Path
):
    async with (
        broker(tmp_path) as url,
        map_writer(url, {7: WEB}, NAMES),
        telemetry(small.pin_dir, url) as running,
    ):
        await ready(running)
        small.emit(5, mode=OPENS, service=7)
        small.emit(3, service=7)
        small.emit(2, service=7, established=False)
        small.emit(1, service=7, kind=FlowKind.REFUSED, established=False, reason=2)
        found = await running.metrics_with("istio_tcp_connections_opened_total", 5)
        client = ("client", "web.shop.svc.cluster.local")
        assert found["istio_tcp_connections_opened_total"] == {client: 5}
        assert found["istio_tcp_connections_closed_total"] == {client: 3}
        assert found["istio_tcp_sent_bytes_total"] == {client: 3000}
        assert found["istio_tcp_received_bytes_total"] == {client: 30}
        assert found["istio_tcp_connections_failed_total"] == {client: 3}
        assert await running.metrics("/stats/prometheus")
        status = json.loads((await running.get("/status"))[1])
        assert status["ring"]["drained"] == 6
        assert status["lost"] == {"record_lost": 0, "open_lost": 0, "state_lost": 0}
        assert status["resolvers"]["services"]["cached"] == 1


async def test_without_a_broker_it_drains_and_serves_and_calls_nobody_by_name(
    small: Instance, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledger, "NAMES_WAIT_S", 0.1)
    async with telemetry(small.pin_dir, NOBODY) as running:
        await serving(running)
        assert running.runtime.readiness.pending == ["bus"]
        small.emit(4, service=7)
        found = await running.metrics_with("istio_tcp_connections_closed_total", 4)
        assert found["istio_tcp_connections_closed_total"] == {("unknown", "unknown"): 4}


async def test_how_full_is_told_of_the_maps_that_nobody_else_tells_of(small: Instance):
    own = {"opens", "pods", "datagrams", "affinities", "loads", "shunned", "handoffs"}
    async with telemetry(small.pin_dir, NOBODY) as running:
        await serving(running)
        await until("all counted", lambda: running.runtime.details()["maps"].keys() == own - {"opens"})
        found = await running.samples()
        for name in ("mesh_map_entries", "mesh_map_max_entries"):
            assert {sample.labels["map"] for sample in found if sample.name == name} == own


async def test_names_that_come_back_hold_for_what_is_counted_from_then_on(
    small: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledger, "NAMES_WAIT_S", 0.1)
    monkeypatch.setattr(ledger, "RETRY_NAMES_S", 0.1)
    async with broker(tmp_path) as url, telemetry(small.pin_dir, url) as running:
        await ready(running)
        small.emit(4, service=7)
        await running.metrics_with("istio_tcp_connections_closed_total", 4)
        async with map_writer(url, {7: WEB}, NAMES):
            await until("names", lambda: running.runtime.details()["resolvers"]["services"]["cached"])
            small.emit(2, service=7)
            found = await running.metrics_with("istio_tcp_connections_closed_total", 6)
    closed = found["istio_tcp_connections_closed_total"]
    assert closed["unknown", "unknown"] >= 4
    assert sum(closed.values()) == 6


async def test_it_waits_for_pins_that_are_not_there_yet(tmp_path: Path):
    async with telemetry(tmp_path / "later", NOBODY) as running:
        await until("wait for pins", lambda: "pins" in running.runtime.readiness.pending)
        assert running.runtime.details() == {}


async def test_a_restart_loses_no_record_and_what_closes_after_it_was_opened(
    small: Instance, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledger, "NAMES_WAIT_S", 0.1)
    async with telemetry(small.pin_dir, NOBODY) as first:
        await serving(first)
        small.emit(30, mode=OPENS)
        small.emit(10)
        await first.metrics_with("istio_tcp_connections_opened_total", 30)
        await first.metrics_with("istio_tcp_connections_closed_total", 10)
    small.emit(20)
    async with telemetry(small.pin_dir, NOBODY) as second:
        await serving(second)
        found = await second.metrics_with("istio_tcp_connections_closed_total", 20)
        assert found["istio_tcp_connections_opened_total"] == {("unknown", "unknown"): 20}
        small.emit(5, mode=OPENS)
        await second.metrics_with("istio_tcp_connections_opened_total", 25)
        small.emit(5)
        found = await second.metrics_with("istio_tcp_connections_closed_total", 25)
        assert found["istio_tcp_connections_opened_total"] == {("unknown", "unknown"): 25}


@pytest.mark.parametrize("name", ["flows", "opens", "counters", "pods"])
async def test_a_map_that_is_made_anew_ends_it_and_the_next_one_reads_that_map(small: Instance, name: str):
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="made anew"), flatten_subgroups=True):
        async with telemetry(small.pin_dir, NOBODY) as running:
            await serving(running)
            small.remake(name)
            with anyio.fail_after(5):
                await anyio.sleep_forever()
    async with telemetry(small.pin_dir, NOBODY) as again:
        await serving(again)


async def test_it_may_end_at_any_moment_while_its_maps_are_read(
    small: Instance, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "TICK_S", 0)
    monkeypatch.setattr(maps, "READ_CHUNK", 8)
    small.emit(1000, mode=OPENS, pairs=1000)
    for number in range(20):
        async with telemetry(small.pin_dir, NOBODY) as running:
            await serving(running)
            await anyio.sleep(number / 1000)


async def test_what_did_not_fit_the_ring_is_shown_as_lost(small: Instance):
    written = small.emit(1000)
    async with telemetry(small.pin_dir, NOBODY) as running:
        await serving(running)
        found = await running.metrics_with("mesh_flows_drained_total", written)
        assert sum(found["mesh_flow_lost_total"].values()) == 1000 - written


@contextlib.asynccontextmanager
async def observing(url: str, *words: str) -> AsyncIterator[tuple[Process, BufferedByteReceiveStream]]:
    """The command as a user runs it."""
    program = f"from pykmesh.cli.observe import command; command(lambda _: {url!r})()"
    async with await anyio.open_process(
        [sys.executable, "-c", program, *words], env={"TZ": "UTC"}
    ) as process:
        try:
            assert process.stdout is not None
            yield process, BufferedByteReceiveStream(process.stdout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def test_observe_follows_flows_as_they_end_until_it_is_interrupted(small: Instance, tmp_path: Path):
    async with (
        broker(tmp_path) as url,
        map_writer(url, {7: WEB}, NAMES),
        telemetry(small.pin_dir, url) as running,
    ):
        await ready(running)
        small.emit(3, service=7)
        await until("drain", lambda: running.runtime.details()["ring"]["drained"] == 3)
        with anyio.fail_after(20):
            async with observing(running.url, "-f", "--last", "2") as (process, lines):
                for _ in range(2):
                    await lines.receive_until(b"\n", 1000)
                small.emit(4, service=7)
                told = [await lines.receive_until(b"\n", 1000) for _ in range(4)]
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 0
                assert await process.stderr.receive() == b"6 flows, 0 lost\n"
    way = b"shop/client-1 10.0.0.1:40000 -> web.shop:80 -> shop/web-1 10.1.0.0:8080  TCP closed"
    assert all(way in line for line in told)


async def test_observe_says_so_when_telemetry_ends_the_stream(small: Instance):
    async with telemetry(small.pin_dir, NOBODY) as running:
        await serving(running)
        with anyio.fail_after(20):
            async with observing(running.url, "-f") as (process, _):
                await until("follower", lambda: running.runtime.details()["observe"]["followers"] == 1)
                running.stop()
                assert await process.wait() == 1


async def test_the_last_flows_are_a_page_of_lines(small: Instance, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "NAMES_WAIT_S", 0.1)
    small.emit(100, pairs=3)
    async with telemetry(small.pin_dir, NOBODY) as running:
        await serving(running)
        await until("drain", lambda: running.runtime.details()["ring"]["drained"] == 100)
        status, body = await running.get("/flows")
        assert (status, body.count(b'"verdict":"closed"')) == (200, 64)
        assert (await running.get("/flows?last=x"))[0] == 400
