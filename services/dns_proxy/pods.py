"""In which pods the proxy listens, and the heartbeat by which the programs know that it does.

Owns the map `dns_listeners`, and what is removed from `dns_servers`. A pod is served as long as it is in the
map of pods: its sockets, and the descriptor of its network namespace, keep that namespace alive until then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
import anyio.to_thread
import structlog
from prometheus_client.core import Metric

from pykmesh import metrics
from pykmesh.contracts.enrollment import EnrollmentError, ask_for_namespaces
from pykmesh.kernel import pins
from pykmesh.kernel.maps import MapFullError, PinnedMap
from pykmesh.kernel.records import (
    DNS_KEY,
    DNS_LISTENER,
    DNS_SERVER,
    DNS_SLOTS,
    NO_IP,
    POD_KEY,
    POD_VALUE,
    port_number,
)
from services.dns_proxy.resolver import Client, Resolver
from services.dns_proxy.slots import Slot, listen

log = structlog.get_logger(__name__)

BEAT_S: Final = 0.2
LOOK_S: Final = 0.5
REFILL_S: Final = 1.0
"""The first time; twice as long each time after."""
REFILL_MAX_S: Final = 60.0


class Pins:
    """What the proxy opens of an instance. PinError leaves nothing open."""

    def __init__(self, pin_dir: Path) -> None:
        directory = pins.maps_dir(pin_dir)
        with contextlib.ExitStack() as opened:
            self.pods = opened.enter_context(PinnedMap(directory, "pods"))
            self.listeners = opened.enter_context(PinnedMap(directory, "dns_listeners"))
            self.servers = opened.enter_context(PinnedMap(directory, "dns_servers"))
            self.close = opened.pop_all().close

    def are_current(self) -> bool:
        return all(pinned.is_current() for pinned in (self.pods, self.listeners, self.servers))


class Pod:
    """One pod that is served, by tasks of its own: they close what they use, at their end."""

    def __init__(self, cookie: int, client: Client, slots: list[Slot]) -> None:
        self.cookie = cookie
        self.client = client
        self.slots = slots
        self.scope = anyio.CancelScope()
        self.refill_s = REFILL_S
        self.refill_at = time.monotonic() + REFILL_S
        """When slots that could not be had are tried again."""
        self._slot_scopes: dict[Slot, anyio.CancelScope] = {}
        self._tasks: anyio.abc.TaskGroup

    async def serve(self, resolver: Resolver) -> None:
        """Runs until `scope` is cancelled."""
        try:
            with self.scope:
                async with anyio.create_task_group() as self._tasks:
                    for slot in self.slots:
                        self._tasks.start_soon(self._serve_slot, resolver, slot)
                    await anyio.sleep_forever()
        finally:
            os.close(self.client.netns_fd)

    async def _serve_slot(self, resolver: Resolver, slot: Slot) -> None:
        scope = self._slot_scopes[slot] = anyio.CancelScope()
        try:
            with scope:
                await resolver.serve(slot, self.client)
        finally:
            slot.close()

    def end(self, slot: Slot) -> None:
        self._slot_scopes.pop(slot).cancel()

    def begin(self, slot: Slot, resolver: Resolver) -> None:
        self.slots.append(slot)
        self._tasks.start_soon(self._serve_slot, resolver, slot)


class Pods:
    def __init__(
        self,
        opened: Pins,
        enroll_socket: Path,
        resolver: Resolver,
        rest_s: float,
        note_error: Callable[..., None],
    ) -> None:
        self._pins = opened
        self._enroll_socket = enroll_socket
        self._resolver = resolver
        self._rest_s = rest_s
        self._note_error = note_error
        self._pods: dict[int, Pod] = {}
        self._told: dict[int, str] = {}
        self.loader_error = ""
        """Why bpf_loader names no namespaces; "" when it does."""

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Runs until cancelled; started once the pods that are there are served."""
        try:
            async with anyio.create_task_group() as tasks:
                await self._look(tasks)
                self._beat()
                task_status.started()
                tasks.start_soon(self._keep_beating)
                while True:
                    await anyio.sleep(LOOK_S)
                    if not self._pins.are_current():
                        raise RuntimeError("a map was made anew by bpf_loader: starting again to fill it")
                    await self._look(tasks)
        finally:
            self._end()

    def status(self) -> dict[str, Any]:
        return {"pods": len(self._pods), "waiting": dict(self._told), "loader": self.loader_error}

    def fill(self) -> Iterator[Metric]:
        """Of the two maps that are the proxy's."""
        held = {"dns_listeners": self._pins.listeners, "dns_servers": self._pins.servers}
        entries = {name: len(pinned) for name, pinned in held.items()}
        limits = {name: pinned.max_entries for name, pinned in held.items()}
        yield metrics.by_label("mesh_map_entries", "Entries of a map.", "map", entries)
        yield metrics.by_label("mesh_map_max_entries", "Room in a map.", "map", limits)

    async def _keep_beating(self) -> None:
        while True:
            await anyio.sleep(BEAT_S)
            self._beat()

    def _beat(self) -> None:
        """From the event loop: where that stands still, the beat is missing."""
        self._write_beats(time.clock_gettime_ns(time.CLOCK_MONOTONIC))

    def _write_beats(self, beat_ns: int) -> None:
        slots = [slot for pod in self._pods.values() for slot in pod.slots]
        if not slots:
            return
        keys, values = (slot.key for slot in slots), (slot.value(beat_ns) for slot in slots)
        try:
            self._pins.listeners.write(b"".join(keys), b"".join(values))
        except MapFullError as error:
            self._note_error("dns_listeners_full", error=error, effect="some pods ask past the proxy")

    def _end(self) -> None:
        """Questions go past the proxy from here on; the ports stay known, for the next one to take."""
        self._write_beats(0)
        self._pods.clear()

    async def _look(self, tasks: anyio.abc.TaskGroup) -> None:
        """Serves the pods that are there, and no others."""
        found = {POD_KEY.unpack(key)[0]: value for key, value in self._pins.pods.items()}
        for cookie in self._pods.keys() - found.keys():
            self._pods.pop(cookie).scope.cancel()
        for cookie in self._told.keys() - found.keys():
            del self._told[cookie]
        self._remove_strays(found.keys())
        self._follow_addresses(found)
        if missing := sorted(found.keys() - self._pods.keys()):
            await self._open(missing, found, tasks)
        for pod in self._pods.values():
            await self._free_one(pod)
            await self._refill(pod)

    def _remove_strays(self, cookies: Collection[int]) -> None:
        """What is written of pods that went."""
        for pinned in (self._pins.listeners, self._pins.servers):
            keys = [key for key, _ in pinned.items() if DNS_KEY.unpack(key)[0] not in cookies]
            if keys:
                pinned.erase(b"".join(keys))

    def _follow_addresses(self, found: dict[int, bytes]) -> None:
        for cookie, pod in self._pods.items():
            addresses = _addresses(found[cookie])
            if addresses != pod.client.addresses:
                pod.client.addresses[:] = addresses

    async def _open(self, cookies: list[int], values: dict[int, bytes], tasks: anyio.abc.TaskGroup) -> None:
        try:
            namespaces = await anyio.to_thread.run_sync(ask_for_namespaces, self._enroll_socket, cookies)
            self.loader_error = ""
        except EnrollmentError as error:
            self.loader_error = str(error)
            return
        for cookie in cookies:
            if cookie not in namespaces:
                self._tell(cookie, "no process of the pod is there yet")
        for cookie, netns_fd in namespaces.items():
            wanted = [(number, self._port_before(cookie, number)) for number in range(DNS_SLOTS)]
            try:
                slots = await anyio.to_thread.run_sync(listen, netns_fd, cookie, wanted)
            except OSError as error:
                os.close(netns_fd)
                self._tell(cookie, f"listen in its network namespace: {error.strerror or error}")
                continue
            client = Client(netns_fd, _addresses(values[cookie]), self._server_of)
            pod = self._pods[cookie] = Pod(cookie, client, slots)
            self._told.pop(cookie, None)
            tasks.start_soon(pod.serve, self._resolver)
            log.info("pod_served", netns_cookie=cookie, ports=[slot.port for slot in slots])
        self._beat()

    def _tell(self, cookie: int, why: str) -> None:
        if self._told.get(cookie) != why:
            log.info("pod_not_served", netns_cookie=cookie, why=why)
        self._told[cookie] = why

    def _port_before(self, cookie: int, number: int) -> int:
        """That of the process before this one: sockets that are connected to it go on. 0: none."""
        value = self._pins.listeners.get(DNS_KEY.pack(cookie, number))
        return 0 if value is None else port_number(DNS_LISTENER.unpack(value)[1])

    def _server_of(self, slot: Slot) -> bytes | None:
        value = self._pins.servers.get(slot.key)
        return None if value is None else bytes(DNS_SERVER.unpack(value)[0])

    async def _free_one(self, pod: Pod) -> None:
        """Where all slots of a family are taken, the one that rested longest gets another port and no server.

        First the programs stop to name it, then it ends: a question never meets another server's port.
        """
        for family in (socket.AF_INET, socket.AF_INET6):
            slots = [slot for slot in pod.slots if slot.udp.family == family]
            resting = min(slots, key=lambda slot: slot.used_at, default=None)
            if resting is None or time.monotonic() - resting.used_at < self._rest_s:
                continue
            if all(self._server_of(slot) is not None for slot in slots):
                await self._free(pod, resting)

    async def _refill(self, pod: Pod) -> None:
        """A pod whose loopback comes up late has had none of a family until then."""
        now = time.monotonic()
        if len(pod.slots) == DNS_SLOTS or now < pod.refill_at:
            return
        there = {DNS_KEY.unpack(slot.key)[1] for slot in pod.slots}
        missing = [(number, 0) for number in range(DNS_SLOTS) if number not in there]
        pod.refill_s = min(2 * pod.refill_s, REFILL_MAX_S)
        pod.refill_at = now + pod.refill_s
        with contextlib.suppress(OSError):
            for slot in await anyio.to_thread.run_sync(listen, pod.client.netns_fd, pod.cookie, missing):
                pod.begin(slot, self._resolver)

    async def _free(self, pod: Pod, resting: Slot) -> None:
        number = DNS_KEY.unpack(resting.key)[1]
        pod.slots.remove(resting)
        self._pins.listeners.remove(resting.key)
        await anyio.sleep(BEAT_S)
        pod.end(resting)
        self._pins.servers.remove(resting.key)
        try:
            [slot] = await anyio.to_thread.run_sync(listen, pod.client.netns_fd, pod.cookie, [(number, 0)])
        except OSError as error:
            log.warning("slot_lost", netns_cookie=pod.cookie, slot=number, error=str(error))
            return
        pod.begin(slot, self._resolver)
        log.info("slot_freed", netns_cookie=pod.cookie, slot=number)


def _addresses(value: bytes) -> list[bytes]:
    address4, address6, _, _ = POD_VALUE.unpack(value)
    return [ip for ip in (address4, address6) if ip != NO_IP]
