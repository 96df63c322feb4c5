"""Wires map_writer: bus -> follower -> planner -> maps, and reports back.

One task owns the mesh, the plan and the maps; the bus only fills its inbox. Writes run in a thread,
so that answers and heartbeats go on meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import anyio
import structlog
from prometheus_client.core import Metric

from pykmesh import metrics, tracing
from pykmesh.bus import Bus, BusUnavailableError, Headers
from pykmesh.contracts import messages
from pykmesh.contracts.address import Selection
from pykmesh.contracts.handoff import read_mesh_key
from pykmesh.contracts.messages import (
    REFUSED_NAMED,
    ConfigBatch,
    ContractError,
    MapReport,
    NamesChanged,
    RefusedReply,
    RefusedRequest,
    SnapshotPage,
    SnapshotRequest,
    Subject,
)
from pykmesh.contracts.settings import AFFINITY_S_MAX, MapWriterSettings, SettingsError
from pykmesh.kernel import libbpf
from pykmesh.kernel.layout import check_enums
from pykmesh.kernel.maps import MapFullError, PinError
from pykmesh.kernel.records import Ip
from pykmesh.process import Runtime, give_way
from services.map_writer.desired import Rules
from services.map_writer.directory import Directory
from services.map_writer.dns import Dns
from services.map_writer.follower import Change, Follower, GapError
from services.map_writer.hosts import HostNames
from services.map_writer.identities import Identities
from services.map_writer.locality import Locality
from services.map_writer.names import Names
from services.map_writer.pages import Inspection
from services.map_writer.planner import Limits, Planner
from services.map_writer.waypoints import Waypoints
from services.map_writer.writer import Maps, Writing

log = structlog.get_logger(__name__)

INBOX_BATCHES = 4096
INBOX_BYTES = 320 * 1024 * 1024
"""A little more than xds_client lets be under way: 64 batches of a resource of 4 MiB each."""
TOGETHER_BYTES = 32 * 1024
"""Of responses that are written with another: about a hundred small ones."""
REPORT_INTERVAL_S = 1.0
REPORT_EVERY_BATCHES = 16
MANY_ENTRIES = 10_000
RETRY_S = 0.2
ORIGINS_MAX = 16
COVERED_NAMED = 1000
"""Services in the status, at most."""


class Item(NamedTuple):
    """A batch that waits, and how large it was."""

    batch: ConfigBatch
    headers: Headers
    size: int


class Resolved(NamedTuple):
    """What a host name stands for now; None: it could not be found."""

    hostname: str
    addresses: tuple[Ip, ...] | None


class MapWriter:
    """The state of the process and its loop."""

    def __init__(
        self, runtime: Runtime[MapWriterSettings], bus: Bus, maps: Maps, identities: Identities
    ) -> None:
        settings = runtime.settings
        self._runtime = runtime
        self._bus = bus
        self.maps = maps
        self.identities = identities
        self.follower = Follower(_here(settings))
        self.directory = Directory()
        self.names = Names(self.follower, lambda: self.planner)
        self.rules = Rules(
            settings.network,
            settings.refuse_unenforced_policy,
            selections(settings),
            has_mesh_key=settings.mesh_key_file is not None,
        )
        self.planner: Planner
        self._applied = ("", 0)
        self.last_write: dict[str, Any] = {}
        self.last_sync = 0.0
        self._writing = Writing(maps)
        self._origins: deque[Headers] = deque(maxlen=ORIGINS_MAX)
        """Of the responses that are written next: the first full state is of several."""
        self._lost = True
        """The log cannot be followed: a snapshot is needed."""
        self._inbox_bytes = 0
        self._inbox: asyncio.Queue[Item | Resolved] = asyncio.Queue(INBOX_BATCHES)
        self._kept: Item | Resolved | None = None
        """Of the inbox, the next."""

    @property
    def applied_seq(self) -> int:
        """The last batch that is in the maps; 0 until one of the epoch that is followed is."""
        epoch, seq = self._applied
        return seq if epoch == self.follower.epoch else 0

    def is_settled(self) -> bool:
        """The mesh is whole, and what was received of it is in the maps."""
        return self.follower.synced and self._applied == (self.follower.epoch, self.follower.received_seq)

    async def receive(self, data: bytes, headers: Headers) -> None:
        """From the bus. A full inbox drops the batch: the gap is found by its number."""
        try:
            batch = messages.decode(ConfigBatch, data)
        except ContractError as error:
            self._runtime.note_error("batch_not_understood", error=error)
            return
        if self._inbox_bytes + len(data) > INBOX_BYTES:
            log.warning("inbox_full", bytes=INBOX_BYTES, effect="resync")
            return
        try:
            self._inbox.put_nowait(Item(batch, headers, len(data)))
        except asyncio.QueueFull:
            log.warning("inbox_full", batches=INBOX_BATCHES, effect="resync")
        else:
            self._inbox_bytes += len(data)

    async def open(self) -> None:
        """Reads what the maps hold: before anything else."""
        await self._read_maps()
        self._runtime.readiness.done("maps")

    async def run(self) -> None:
        """Follows until cancelled."""
        while True:
            if self._lost:
                await self._resync()
            item, self._kept = self._kept or await self._inbox.get(), None
            if isinstance(item, Resolved):
                await self._resolve(item)
                continue
            change = self._offer(item)
            if change is not None:
                if not gc.isenabled():  # the end of a large response: taking it in took long
                    await give_way()
                self._add_what_waits(change)
                await self._write(change)
            elif not self._lost and item.batch.seq % REPORT_EVERY_BATCHES == 0:
                await self.report()

    def _offer(self, item: Item) -> Change | None:
        """What is to be written when it completes a response. A gap: only a snapshot helps."""
        batch, headers, size = item
        self._inbox_bytes -= size
        if not (batch.complete or batch.is_heartbeat):
            gc.disable()  # a large response: until it is written
        try:
            change = self.follower.offer(batch)
        except GapError as gap:
            log.info("gap_found", gap=str(gap))
            self._lost = True
            return None
        if batch.complete:
            self._origins.append(headers)
        return change

    def _add_what_waits(self, change: Change) -> None:
        """Small responses that came meanwhile are written with it: so who is behind catches up."""
        room = 0 if change.sweep else TOGETHER_BYTES
        while room > 0 and not (self._lost or self._inbox.empty()):
            item = self._inbox.get_nowait()
            if isinstance(item, Resolved) or not item.batch.complete or item.size > room:
                self._kept = item
                return
            room -= item.size
            more = self._offer(item)
            if more is not None:
                change.touched.extend(more.touched)

    async def resolved(self, hostname: str, addresses: tuple[Ip, ...] | None) -> None:
        """From whoever looks host names up. Waits its turn, as a batch does."""
        await self._inbox.put(Resolved(hostname, addresses))

    async def _resolve(self, found: Resolved) -> None:
        """Writes what it changes at once, or with the response that is being taken."""
        change = self.follower.resolve(found.hostname, found.addresses)
        if change is not None:
            await self._write(change)

    async def _read_maps(self) -> None:
        held = await self._writing.read_again()
        self.planner = Planner(held, self.maps.limits, self.rules)
        log.info("maps_read", **held.sizes._asdict())

    async def _resync(self) -> None:
        """Fetches a snapshot, again and again until xds_client answers. The maps stay as they are."""
        self._runtime.readiness.wait_for("snapshot")
        while self._lost:
            self._drop_batches()
            gc.disable()
            try:
                change = await self.follower.resync(self._fetch)
                self._lost = False
            except (BusUnavailableError, GapError, ContractError) as error:
                log.info("snapshot_awaited", error=str(error))
                await anyio.sleep(RETRY_S)
                continue
            finally:
                gc.enable()
        self._origins.clear()
        if change is not None:
            await self._write(change)
        else:
            self._runtime.readiness.wait_for("control plane")
            await self.report()
        self._runtime.readiness.done("snapshot")

    def _drop_batches(self) -> None:
        """What was received until now is in a snapshot that is asked for now."""
        while self._kept is not None or not self._inbox.empty():
            item, self._kept = self._kept or self._inbox.get_nowait(), None
            if isinstance(item, Resolved):
                self.follower.resolve(item.hostname, item.addresses)
            else:
                self._inbox_bytes -= item.size

    async def _fetch(self, cursor: str) -> SnapshotPage:
        request = SnapshotRequest(messages.VERSION, cursor)
        data = await self._bus.request(Subject.CONFIG_SNAPSHOT, messages.encode(request))
        return messages.decode(SnapshotPage, data)

    async def _write(self, change: Change) -> None:
        self.directory.follow(self.follower.mesh, change.touched.services)
        origins = [*self._origins]
        self._origins.clear()
        with tracing.span("map_writer apply", origins) as span:
            started = time.perf_counter()
            written = await self._apply(change)
            took_ms = round((time.perf_counter() - started) * 1e3, 3)
            self.last_write = {"entries": dict(written), "took_ms": took_ms, "time": time.time()}
            span.set_attributes({f"pykmesh.entries.{name}": number for name, number in written.items()})
        self.identities.follow(self.follower.mesh, change)
        self._applied = (self.follower.epoch, self.follower.received_seq)
        if change.sweep or written.total() > MANY_ENTRIES:
            gc.freeze()
        gc.enable()
        self.last_sync = time.time()
        if change.sweep:
            self._runtime.readiness.done("control plane")
            log.info("maps_synced", epoch=self.follower.epoch, **self.last_write)
        elif written.total() > MANY_ENTRIES:
            log.info("maps_written", **self.last_write)
        await self.report()
        for news in self.names.changed(change):
            await self._publish(Subject.MAP_NAMES, news)

    async def _apply(self, change: Change) -> Counter[str]:
        """Returns how many entries of each map were written or removed.

        A write that fails leaves other maps than the planner thinks: they are read and swept anew.
        """
        mesh = self.follower.mesh
        self.planner.stand_in_hosts(mesh, is_first=change.sweep)
        try:
            if change.sweep:
                return await self._writing.take(self.planner.sweep_in_pieces(mesh))
            return await self._writing.take(self.planner.plan_in_pieces(mesh, change.touched))
        except (MapFullError, libbpf.KernelError) as error:
            self._runtime.note_error("map_write_failed", error=error, effect="maps are read again")
            await self._read_maps()
            return await self._writing.take(self.planner.sweep_in_pieces(mesh))

    async def report(self) -> None:
        """A report that is lost is made up for by the next one."""
        follower = self.follower
        refused = self.planner.refused
        named = dict(islice(refused.items(), REFUSED_NAMED))
        report = MapReport(
            messages.VERSION, follower.epoch, follower.received_seq, self.applied_seq, named, len(refused)
        )
        await self._publish(Subject.MAP_REPORT, report)

    async def _publish(self, subject: Subject, message: MapReport | NamesChanged) -> None:
        try:
            await self._bus.publish(subject, messages.encode(message))
        except BusUnavailableError:
            log.debug("message_dropped", subject=subject)

    async def tell_refused(self, data: bytes) -> bytes:
        """Raises ContractError."""
        asked, refused = messages.decode(RefusedRequest, data), self.planner.refused
        found = {name: refused[name] for name in asked.names if name in refused}
        return messages.encode(RefusedReply(messages.VERSION, found))

    def status(self) -> dict[str, Any]:
        mesh, held = self.follower.mesh, self.planner.held
        return {
            "epoch": self.follower.epoch,
            "applied_seq": self.applied_seq,
            "last_sync": self.last_sync,
            "resyncs": self.follower.resyncs,
            "services": len(mesh.services),
            "workloads": len(mesh.workloads),
            "locality": mesh.here._asdict(),
            "networks_instead": mesh.networks_instead(self.rules.network),
            "policies": len(mesh.policies),
            "policy_not_enforced": mesh.unenforced(),
            "policies_missing": mesh.missing_policies(),
            "policies_unread": mesh.unread_policies(),
            "maps": {
                name: [size, limit]
                for name, size, limit in zip(Limits._fields, held.sizes, self.maps.limits, strict=True)
            },
            "map_memory_bytes": self.maps.memory_bytes(),
            "refused": self.planner.refused,
            "unreadable": len(mesh.unreadable),
            "kept_as_in_maps": self.planner.recalled.names,
            "services_covered": dict(islice(mesh.covered(), COVERED_NAMED)),
            "last_write": self.last_write,
        }

    def health(self) -> Iterator[Metric]:
        """What Prometheus is told of the process itself."""
        held, limits, mesh = self.planner.held, self.maps.limits, self.follower.mesh
        sizes = held.sizes._asdict()
        yield metrics.by_label("mesh_map_entries", "Entries of a map.", "map", sizes)
        yield metrics.by_label("mesh_map_max_entries", "Room in a map.", "map", limits._asdict())
        yield metrics.gauge(
            "mesh_map_refused_resources", "Resources that do not fit.", len(self.planner.refused)
        )
        yield metrics.gauge(
            "mesh_services_covered",
            "Services that nobody reaches at an address of theirs: it is another's.",
            sum(1 for _ in mesh.covered()),
        )
        yield metrics.counter("mesh_bus_resyncs", "Snapshots taken.", self.follower.resyncs)
        yield metrics.gauge(
            "mesh_policy_unenforced_workloads",
            "Workloads with policies, which are not enforced.",
            mesh.unenforced(),
        )
        yield metrics.gauge(
            "mesh_policies_missing",
            "Policies that workloads name and the control plane has not sent.",
            len(mesh.missing_policies()),
        )


def selections(settings: MapWriterSettings) -> dict[str, Selection]:
    """How the settings say that endpoints of services are chosen. SettingsError for what is no such text."""
    found: defaultdict[str, Selection] = defaultdict(Selection)
    for text in filter(None, map(str.strip, settings.session_affinity.split(","))):
        name, _, seconds = text.partition("=")
        if "/" not in name or not seconds.isdecimal() or not 0 < int(seconds) <= AFFINITY_S_MAX:
            raise SettingsError(f"session_affinity has {text!r}: namespace/hostname=seconds")
        found[name] = Selection(int(seconds))
    for name in filter(None, map(str.strip, settings.least_connections.split(","))):
        if "/" not in name:
            raise SettingsError(f"least_connections has {name!r}: namespace/hostname")
        found[name] = found[name]._replace(least_connections=True)
    return dict(found)


def _here(settings: MapWriterSettings) -> Locality:
    """SettingsError for a locality that is none."""
    parts = settings.locality.split("/") if settings.locality else []
    if len(parts) > 3:
        raise SettingsError(f"locality is {settings.locality!r}: region/zone/subzone")
    region, zone, subzone = [*parts, "", "", ""][:3]
    node = settings.node_name or socket.gethostname()
    return Locality(region, zone, subzone, node, settings.cluster_id, settings.network)


SWITCH_S = 0.0005
"""Python's own 5 ms, for which a thread waits until it may write or say so, are as long as a step takes."""


async def run(runtime: Runtime[MapWriterSettings]) -> None:
    """Waits for pins and broker, then follows until cancelled. Exit leaves the maps as they are."""
    check_enums()
    sys.setswitchinterval(SWITCH_S)
    key_file = runtime.settings.mesh_key_file
    mesh_key = read_mesh_key(key_file) if key_file else None
    for task in ("pins", "maps", "snapshot"):
        runtime.readiness.wait_for(task)
    maps = await runtime.open_pins(Maps, PinError)
    bus = await runtime.connect_bus()
    identities = Identities(runtime.settings.pin_dir, runtime.note_error, mesh_key)
    writer = MapWriter(runtime, bus, maps, identities)
    async with anyio.create_task_group() as tasks:
        await bus.subscribe(Subject.CONFIG_LOG, writer.receive)
        await writer.open()
        await bus.serve(Subject.MAP_REFUSED, writer.tell_refused)
        await bus.serve(Subject.MAP_RESOLVE, writer.names.answer)
        dns = Dns(writer.follower, maps, writer.directory, runtime.settings.cluster_domain)
        await bus.serve(Subject.DNS_RESOLVE, dns.answer)
        await bus.serve(Subject.WAYPOINTS, Waypoints(writer.follower, writer.rules, identities).answer)
        runtime.details = writer.status
        Inspection(writer.follower, lambda: writer.planner, maps, writer.rules, writer.is_settled).add_pages(
            runtime.admin
        )
        hosts = HostNames(writer.follower, runtime.settings.hostname_refresh_s)
        metrics.add_page(runtime.admin, lambda: chain(writer.health(), hosts.health()))
        tasks.start_soon(_report_each_second, writer)
        tasks.start_soon(hosts.run, writer.resolved)
        tasks.start_soon(identities.run)
        await writer.run()


async def _report_each_second(writer: MapWriter) -> None:
    """Ends the process when its maps are no more the ones that the programs read: the next one reads them."""
    while True:
        if not (writer.maps.are_current() and writer.identities.are_current()):
            raise RuntimeError("a map was made anew by bpf_loader: starting again to fill it")
        await writer.report()
        await anyio.sleep(REPORT_INTERVAL_S)
