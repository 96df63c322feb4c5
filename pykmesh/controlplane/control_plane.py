"""The control plane as a whole: watches the folder, keeps the snapshot current, serves it.

Files are read and translated in a thread; the event loop only hands results over. Nothing that is in the
folder ends it. Clients delete what a control plane does not name, so it begins to serve only with a folder
that has a YAML file and reads without errors: before that it does not listen, and clients keep what they
have and try again. Once it serves it goes on: what can no longer be read counts as it last was, and is in
`errors`; files that go are gone, the last one too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import anyio
import anyio.to_thread
import msgspec
import structlog

from pykmesh.contracts.settings import ControlPlaneSettings
from pykmesh.controlplane.allocate import Shortage, allocate
from pykmesh.controlplane.server import Client, DeltaServer, Nack
from pykmesh.controlplane.settings import AddressRanges, MeshSettings
from pykmesh.controlplane.snapshot import Snapshot
from pykmesh.controlplane.translate import Cluster, translate
from pykmesh.manifests.folder import Content, Folders, Sights
from pykmesh.manifests.objects import ref_of
from pykmesh.manifests.parse import ConfigError, Located
from pykmesh.proto import workload_pb2 as wire

log = structlog.get_logger(__name__)

_MOST_DEBOUNCES = 25
"""A folder that never comes to rest is read all the same after so many periods of quiet not had."""


class Translation(msgspec.Struct, frozen=True):
    """What the content of the folder comes to."""

    resources: Mapping[str, wire.Address]
    errors: tuple[ConfigError, ...]


def translate_content(content: Content, ranges: AddressRanges, mesh: MeshSettings) -> Translation:
    """Objects that get no address are sent without, or not at all, and are among the errors."""
    allocation = allocate([located.object for located in content.objects], ranges)
    resources = translate(Cluster.of(allocation.objects), mesh)
    places = {ref_of(located.object): located for located in content.objects}
    shortages = (_error_of(shortage, places[shortage.ref]) for shortage in allocation.shortages)
    return Translation(resources, (*content.errors, *shortages))


class ControlPlane:
    """Serves one folder. `run` it once; the properties can be read at any time.

    Raises `ValueError` for settings that cannot be: a range that is none, an unknown dialect.
    """

    def __init__(self, settings: ControlPlaneSettings) -> None:
        self._settings = settings
        self._mesh, self._ranges = MeshSettings.of(settings), AddressRanges.of(settings)
        self._folder = Folders(settings.config_dir, filter(None, [settings.waypoints_dir]))
        self._server = DeltaServer()
        self._content: Content | None = None
        self._whole = anyio.Event()
        """Set by the first content in which no file is missing."""
        self._translation = Translation({}, ())
        self._started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._generation = 0

    @property
    def clients(self) -> tuple[Client, ...]:
        """The clients that are connected."""
        return self._server.clients

    @property
    def errors(self) -> tuple[ConfigError, ...]:
        """What is wrong in the folder now."""
        return self._translation.errors

    @property
    def kinds_ignored(self) -> tuple[str, ...]:
        """Kinds that are in the folder and are nothing to a mesh, or are misspelt."""
        return tuple(sorted(self._content.ignored)) if self._content else ()

    @property
    def last_nacks(self) -> tuple[Nack, ...]:
        """What clients refused, the latest last."""
        return self._server.last_nacks

    @property
    def resources(self) -> Mapping[str, wire.Address]:
        """What is served, by name; nothing before the folder could be read whole. Not to be changed."""
        return self._translation.resources

    async def run(
        self, *, started: Callable[[int], None], refused: Callable[[Sequence[ConfigError]], None]
    ) -> None:
        """Runs until cancelled. Calls `started` with the port once the folder is read whole and served.

        Until then it does not listen, and calls `refused` with the errors of files and folders that are in
        the way, whenever they change. Objects without an address, and twice in a file, are not in the way.
        Raises `OSError` if the port cannot be had.
        """
        await self._read(await anyio.to_thread.run_sync(self._folder.look), refused)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, refused)
            await self._whole.wait()
            await self._server.serve(self._settings.listen_host, self._settings.listen_port, started)

    async def _watch(self, refused: Callable[[Sequence[ConfigError]], None]) -> None:
        while True:
            await anyio.sleep(self._settings.poll_ms / 1000)
            sight = await anyio.to_thread.run_sync(self._folder.look)
            if self._folder.has_changed(sight):
                await self._read(await self._quiet(sight), refused)

    async def _quiet(self, sight: Sights) -> Sights:
        """Waits until the folder has stayed as it is for the debounce time."""
        for _ in range(_MOST_DEBOUNCES):
            await anyio.sleep(self._settings.debounce_ms / 1000)
            latest = await anyio.to_thread.run_sync(self._folder.look)
            if latest == sight:
                break
            sight = latest
        return sight

    async def _read(self, sight: Sights, refused: Callable[[Sequence[ConfigError]], None]) -> None:
        content = await anyio.to_thread.run_sync(self._folder.read, sight)
        if content == self._content:
            return
        if content.refused and not self._whole.is_set():
            self._content, self._translation = content, Translation({}, content.errors)
            log.error("not_served", errors=len(content.refused), first=str(content.refused[0]))
            refused(content.refused)
            return
        await self._publish(content)
        self._whole.set()

    async def _publish(self, content: Content) -> None:
        begin = time.monotonic()
        version = f"{self._started_at}/{self._generation + 1}"
        translation, snapshot = await anyio.to_thread.run_sync(self._translate, content, version)
        self._content, self._translation = content, translation
        self._generation += 1
        self._server.publish(snapshot)
        log.info(
            "folder_read",
            objects=len(content.objects),
            resources=len(translation.resources),
            errors=len(translation.errors),
            duration_ms=round((time.monotonic() - begin) * 1000, 1),
        )

    def _translate(self, content: Content, version: str) -> tuple[Translation, Snapshot]:
        translation = translate_content(content, self._ranges, self._mesh)
        says_versions = self._mesh.dialect.says_versions
        return translation, Snapshot.of(translation.resources, version=version, says_versions=says_versions)


def _error_of(shortage: Shortage, place: Located) -> ConfigError:
    return ConfigError(place.file, place.line, "", f"{shortage.ref} has no address: {shortage.why}")
