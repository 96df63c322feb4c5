"""Wires telemetry: pins -> drain -> ledger -> metrics and live flows; names come by the bus.

One loop owns all sums. Reading large maps and writing the text of a scrape run in threads. Draining
waits for nobody: neither for the bus, nor for map_writer, nor for who scrapes or follows.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from pykmesh.admin import Admin, Page, Query
from pykmesh.bus import Headers
from pykmesh.contracts import messages
from pykmesh.contracts.messages import ContractError, Subject
from pykmesh.contracts.requests import RequestSums
from pykmesh.contracts.settings import TelemetrySettings
from pykmesh.kernel import pins
from pykmesh.kernel.layout import Reason, check_enums
from pykmesh.kernel.maps import PinError, PinnedMap
from pykmesh.kernel.records import OPEN_KEY, Ip
from pykmesh.kernel.ring import RingHeldError, RingReader
from pykmesh.process import Runtime
from services.telemetry.flows import IPPROTO_TCP, Drain
from services.telemetry.labels import NO_FLAGS, Edge
from services.telemetry.ledger import Amounts, Ledger, of_tcp, without_names
from services.telemetry.live import Live
from services.telemetry.metrics import CONTENT_TYPE, LOST_STAGES, Exposition, MapFill, Snapshot
from services.telemetry.names import Names
from services.telemetry.opens import Opened, Opens
from services.telemetry.requests import Requests

log = structlog.get_logger(__name__)

TICK_S: Final = 1.0
RETRY_S: Final = 0.2
NAMES_INTERVAL_S: Final = 0.02
FILL_INTERVAL_S: Final = 30.0
FILL_SHARE: Final = 100
"""Counting a map's entries may take one in so many parts of the time."""
FILLED: Final = ("pods", "datagrams", "affinities", "loads", "shunned", "handoffs")
"""Maps whose entries are counted here, with `opens`; of the ones that map_writer fills, it tells."""


class Pins:
    """What telemetry opens of an instance. PinError or RingHeldError leave nothing open."""

    def __init__(self, pin_dir: Path) -> None:
        directory = pins.maps_dir(pin_dir)
        with contextlib.ExitStack() as opened:
            self.ring = opened.enter_context(RingReader(directory))
            self.opens = opened.enter_context(PinnedMap(directory, "opens"))
            self.counters = opened.enter_context(PinnedMap(directory, "counters"))
            self.filled = {name: opened.enter_context(PinnedMap(directory, name)) for name in FILLED}
            self.close = opened.pop_all().close

    def are_current(self) -> bool:
        """False when bpf_loader has made a map anew: the programs then write to another than is read here."""
        others = (self.opens, self.counters, *self.filled.values())
        return self.ring.is_current() and all(other.is_current() for other in others)


class Telemetry:
    """The state of the process and its loops."""

    def __init__(self, runtime: Runtime[TelemetrySettings], opened: Pins) -> None:
        self._settings = runtime.settings
        self._note_error = runtime.note_error
        self._pins = opened
        self.names = Names(runtime.settings.network)
        self.ledger: Ledger[Edge, Amounts] = Ledger(of_tcp(self.names), without_names)
        self.requests = Requests(self.names)
        self.live = Live(self.names, runtime.settings.observe_buffer)
        self.drain = Drain(opened.ring, self.ledger, self.live.publish)
        self._opens: Opens
        self.opened = 0
        self.counters = opened.counters.counter_sums()
        self._fill: dict[str, MapFill] = {}
        self._rates: dict[str, float] = {}
        self.names.on_answer = self._settle
        self.names.on_change = self._unbind

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Runs until cancelled; started once the counters' state is known."""
        self._opens = await anyio.to_thread.run_sync(Opens, self._pins.opens)
        self.drain.opens_since_ns = self._opens.since_ns
        log.info("drain_started", lag_bytes=self._pins.ring.lag_bytes)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.drain.run, self._settings.drain_interval_s)
            tasks.start_soon(self.names.run, NAMES_INTERVAL_S)
            tasks.start_soon(self._tick)
            tasks.start_soon(self._count_fill)
            tasks.start_soon(self._watch_pins)
            task_status.started()

    async def _tick(self) -> None:
        before = time.monotonic()
        while True:
            counted = self.drain.drained, self.opened
            self._add_opens(await anyio.to_thread.run_sync(self._opens.read))
            self._read_counters()
            self._settle()
            for ledger in (self.ledger, self.requests.ledger):
                ledger.drop_rested()
            await anyio.sleep(TICK_S)
            now = time.monotonic()
            self._rates = {
                "drained_per_s": round((self.drain.drained - counted[0]) / (now - before), 1),
                "opened_per_s": round((self.opened - counted[1]) / (now - before), 1),
            }
            before = now

    def _settle(self) -> None:
        self.ledger.settle()
        self.requests.ledger.settle()

    def _unbind(self) -> None:
        self.ledger.unbind()
        self.requests.ledger.unbind()

    async def served(self, data: bytes, _: Headers) -> None:
        """From waypoint_mgr."""
        try:
            self.requests.take(messages.decode(RequestSums, data))
        except (ContractError, ValueError) as error:
            self._note_error("requests_not_understood", error=error)

    def _add_opens(self, found: list[Opened]) -> None:
        for key, count in found:
            local, remote, service, direction, protocol = OPEN_KEY.unpack(key)
            self.opened += count
            if protocol == IPPROTO_TCP:
                edge = Edge(Ip(local), Ip(remote), service, direction, NO_FLAGS)
                self.ledger.add(edge, Amounts(opened=count))

    def _read_counters(self) -> None:
        before, self.counters = self.counters, self._pins.counters.counter_sums()
        missing = self.counters[Reason.RECORD_LOST] - before[Reason.RECORD_LOST]
        if missing:
            self.live.note_unrecorded(missing)
            log.warning("flows_lost", flows=missing, effect="closed connections and bytes are missing")

    async def _count_fill(self) -> None:
        """Reads whole maps, as seldom as their size asks for."""
        while True:
            started = time.monotonic()
            for name, pinned in self._pins.filled.items():
                entries = await anyio.to_thread.run_sync(len, pinned)
                self._fill[name] = MapFill(entries, pinned.max_entries)
            await anyio.sleep(max(FILL_INTERVAL_S, (time.monotonic() - started) * FILL_SHARE))

    async def _watch_pins(self) -> None:
        """Ends the process when its maps are no more the ones of the programs: the next one opens those."""
        while True:
            if not self._pins.are_current():
                raise RuntimeError("a map was made anew by bpf_loader: starting again to read it")
            await anyio.sleep(TICK_S)

    def snapshot(self) -> Snapshot:
        ring = self._pins.ring
        return Snapshot(
            series=self.ledger.snapshot(),
            requests=self.requests.ledger.snapshot(),
            counters=self.counters,
            drained=self.drain.drained,
            not_understood=ring.skipped,
            observer_lost=self.live.lost,
            lag_bytes=ring.lag_bytes,
            ring_bytes=ring.size_bytes,
            series_folded=self.ledger.folded,
            maps={**self._fill, "opens": MapFill(self._opens.entries, self._opens.max_entries)},
        )

    async def scrape(self, _: Query) -> Page:
        self._read_counters()
        text = await anyio.to_thread.run_sync(Exposition(self.snapshot()).text)
        return Page(text, content_type=CONTENT_TYPE)

    def status(self) -> dict[str, Any]:
        return {
            "ring": self.drain.status(),
            "lost": {reason.label: self.counters[reason] for reason in LOST_STAGES},
            "opens": {
                "counted": self.opened,
                "entries": self._opens.entries,
                "max_entries": self._opens.max_entries,
            },
            "rates": self._rates,
            "ledger": self.ledger.status(),
            "requests": self.requests.status(),
            "resolvers": self.names.status(),
            "observe": self.live.status(),
            "maps": {name: [fill.entries, fill.max_entries] for name, fill in self._fill.items()},
        }


async def run(runtime: Runtime[TelemetrySettings]) -> None:
    """Waits for the pins, then drains and serves until cancelled. What is in the ring then stays there."""
    check_enums()
    for task in ("pins", "bus"):
        runtime.readiness.wait_for(task)
    metrics = Admin()
    with contextlib.ExitStack() as held:
        # The pins are closed after the last task has ended: a thread may be reading them until then.
        async with anyio.create_task_group() as tasks:
            port = await _listen(runtime, tasks, metrics)
            opened = await runtime.open_pins(Pins, PinError, RingHeldError)
            held.callback(opened.close)
            telemetry = Telemetry(runtime, opened)
            await tasks.start(telemetry.run)
            for path in ("/metrics", "/stats/prometheus"):
                metrics.route(path, telemetry.scrape)
            runtime.admin.route("/flows", telemetry.live.page)
            runtime.details = lambda: {"metrics_port": port, **telemetry.status()}
            bus = telemetry.names.bus = await runtime.connect_bus()
            await bus.subscribe(Subject.MAP_NAMES, telemetry.names.changed)
            await bus.subscribe(Subject.REQUESTS, telemetry.served)
            await anyio.sleep_forever()


async def _listen(runtime: Runtime[TelemetrySettings], tasks: anyio.abc.TaskGroup, metrics: Admin) -> int:
    host, port = runtime.settings.metrics_host, runtime.settings.metrics_port
    try:
        found: int = await tasks.start(metrics.serve, host, port)
    except OSError as error:
        raise RuntimeError(
            f"metrics port {host}:{port}: {error.strerror or error}; set PYKMESH_METRICS_PORT"
        ) from error
    return found
