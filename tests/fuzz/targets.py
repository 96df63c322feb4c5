"""What takes input from outside, each as a function of bytes that raises for what should not be."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Final

import click
import msgspec
import structlog
from google.protobuf.message import DecodeError

from pykmesh.cli.main import main as command_line
from pykmesh.contracts import messages
from pykmesh.contracts import settings as all_settings
from pykmesh.contracts.address import FieldError
from pykmesh.contracts.messages import (
    VERSION,
    ConfigBatch,
    ContractError,
    Message,
    Resource,
    ResourceType,
    SnapshotPage,
)
from pykmesh.contracts.requests import RequestSums
from pykmesh.contracts.settings import SETTINGS_FILE_VARIABLE, ControlPlaneSettings, SettingsError
from pykmesh.contracts.waypoints import MeshService, ServicePort, WaypointsReply, WaypointsRequest
from pykmesh.controlplane.allocate import AddressRanges
from pykmesh.controlplane.control_plane import MeshSettings, translate_content
from pykmesh.manifests.folder import Content
from pykmesh.manifests.parse import parse as parse_manifests
from services.dns_proxy import wire
from services.map_writer.desired import Rules
from services.map_writer.follower import Change, Follower
from services.map_writer.planner import Held, Limits, Planner
from services.waypoint_mgr.encode import resources
from services.waypoint_mgr.routes import Wanted, translate
from services.waypoint_mgr.source import Objects
from services.xds_client import protocol
from services.xds_client.protocol import Reading, UnknownTypeError

DOMAIN: Final = "cluster.local"
LIMITS: Final = Limits(*([1 << 16] * len(Limits._fields)))
BUS: Final[tuple[type[Message], ...]] = (
    ConfigBatch,
    SnapshotPage,
    messages.SnapshotRequest,
    messages.MapReport,
    messages.RefusedRequest,
    messages.RefusedReply,
    messages.NamesChanged,
    messages.ResolveRequest,
    messages.ResolveReply,
    messages.DnsRequest,
    messages.DnsReply,
    RequestSums,
    WaypointsRequest,
    WaypointsReply,
)


class _Maps:
    """What map_writer does with a mesh, without a kernel, from the first batch on."""

    def __init__(self, first: ConfigBatch) -> None:
        self.follower = Follower()
        self.planner = Planner(Held(), LIMITS, Rules())
        page = SnapshotPage(VERSION, first.epoch, first.seq - 1, False, ResourceType.ADDRESS, [], "")

        async def fetch(_: str) -> SnapshotPage:
            return page

        with contextlib.suppress(StopIteration):
            self.follower.resync(fetch).send(None)

    def take(self, batch: ConfigBatch) -> None:
        """All of it is taken, but for a repetition."""
        self._write(self.follower.offer(batch))
        assert self.follower.received_seq == batch.seq

    def _write(self, change: Change | None) -> None:
        if change is None:
            return
        mesh = self.follower.mesh
        steps = self.planner.sweep(mesh) if change.sweep else self.planner.plan(mesh, change.touched)
        for step in steps:
            assert step.keys


def xds(data: bytes) -> None:
    """A response of the control plane: to what it becomes in the maps."""
    with contextlib.suppress(DecodeError, UnknownTypeError):
        reading = Reading(protocol.parse(data))
        taken = [upsert for part in reading.parts() for upsert in part]
        found = [Resource(name, held.value) for name, held in taken]
        batch = ConfigBatch(VERSION, "e", 1, reading.type, reading.removed, found, complete=True, synced=True)
        maps = _Maps(batch)
        maps.take(batch)
        maps.take(msgspec.structs.replace(batch, seq=2, removed=[name for name, _ in taken], upserts=[]))


def address(data: bytes) -> None:
    """One resource of a response, as most of them are."""
    for kind, name in ((ResourceType.ADDRESS, "ns/name"), (ResourceType.AUTHORIZATION, "ns/policy")):
        batch = ConfigBatch(VERSION, "e", 1, kind, [], [Resource(name, data)], complete=True, synced=True)
        with contextlib.suppress(FieldError):
            _Maps(batch).take(batch)


def bus(data: bytes) -> None:
    """A message, of whatever kind it is taken for."""
    for kind in BUS:
        with contextlib.suppress(ContractError):
            found: Any = messages.decode(kind, data)
            if isinstance(found, ConfigBatch) and not found.is_heartbeat:
                _Maps(found).take(found)


def manifests(data: bytes) -> None:
    """A file of the configuration folder: to what is served of it, and to what an Envoy is told."""
    parsed = parse_manifests(data, "a.yaml")
    settings = ControlPlaneSettings()
    translate_content(
        Content(parsed.objects, parsed.errors), AddressRanges.of(settings), MeshSettings.of(settings)
    )
    found = Objects.of((located.object for located in parsed.objects), DOMAIN)
    users = [
        MeshService(name, [f"10.96.0.{n % 250 + 1}"], [ServicePort(p.port, []) for p in service.spec.ports])
        for n, (name, service) in enumerate(found.services.items())
    ]
    known = {user.name: user for user in users}
    wanted = Wanted(found.routes, found.policies, found.destinations, found.virtuals, found.authentications)
    for waypoint in found.waypoints.values():
        resources(translate(waypoint, users, known, found.services, wanted, DOMAIN), "::", 15400)


def dns(data: bytes) -> None:
    """A pod's question, and what a server says to one: each may be anything."""
    query = wire.read(data)
    ends = wire.end_of_answers(query)
    if query is not None:
        for is_large in (False, True):
            addresses = (["2001:db8::1"] if query.is_6 else ["192.0.2.1"]) * (200 if is_large else 1)
            reply = wire.answer(query, addresses, "", wire.udp_room(query))
            assert len(reply) <= max(wire.udp_room(query), wire.UDP_BYTES_MIN)
            assert wire.answers(reply, data)
    if len(data) >= wire.HEADER_BYTES:
        assert len(wire.failure(data)) <= len(data)
        ends(data)
    wire.answers(data, data)


def settings(data: bytes) -> None:
    """A file of settings, and a variable of the environment."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        text = data[:64].decode("utf-8", "surrogateescape").replace("\0", "")
        for kind in all_settings.PROCESSES:
            for environment in ({SETTINGS_FILE_VARIABLE: file.name}, {"PYKMESH_PIN_DIR": text}):
                with contextlib.suppress(SettingsError):
                    all_settings.load(kind, environment)
        all_settings.misspelt({f"PYKMESH_{text}": text})


def words(data: bytes) -> None:
    """What somebody types behind `pykmesh`; nothing is done."""
    typed = data.decode("utf-8", "surrogateescape").split("\n")
    with contextlib.suppress(click.exceptions.ClickException, click.exceptions.Exit):
        context = command_line.make_context("pykmesh", typed)
        group: click.Command = command_line
        while isinstance(group, click.Group):
            rest = [*context._protected_args, *context.args]
            if not rest:
                break  # "Missing command."
            name, command, rest = group.resolve_command(context, rest)
            assert command
            context = command.make_context(name, rest, parent=context)
            group = command


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target for target in (xds, address, bus, manifests, dns, settings, words)
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what is told of bad input is written."""
    before = structlog.get_config()
    structlog.configure(logger_factory=lambda *_: _Nobody(), cache_logger_on_first_use=False)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield
    structlog.configure(**before)


class _Nobody:
    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None
