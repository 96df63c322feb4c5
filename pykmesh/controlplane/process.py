"""The embedded control plane as a process of its own: settings from the environment, a status page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pykmesh.contracts.settings import ControlPlaneSettings
from pykmesh.controlplane.control_plane import ControlPlane
from pykmesh.manifests.parse import ConfigError
from pykmesh.process import Runtime, main
from pykmesh.readiness import Readiness


async def run(runtime: Runtime[ControlPlaneSettings]) -> None:
    """Serves until cancelled; ready when it listens, which a folder that cannot be read puts off."""
    runtime.readiness.wait_for("listening")
    plane = ControlPlane(runtime.settings)
    runtime.details = lambda: _details(plane)
    manifests = ManifestsTask(runtime.readiness)

    def started(_: int) -> None:
        manifests.done()
        runtime.readiness.done("listening")

    await plane.run(started=started, refused=manifests.wait_for)


class ManifestsTask:
    """A readiness task whose name says what is wrong: `manifests: web.yaml:36: spec.ports[0].port: ...`."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._name = ""

    def wait_for(self, errors: Sequence[ConfigError]) -> None:
        self.done()
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        self._name = f"manifests: {errors[0]}{more}"
        self._readiness.wait_for(self._name)

    def done(self) -> None:
        self._readiness.done(self._name)


def _details(plane: ControlPlane) -> dict[str, Any]:
    return {
        "clients": msgspec.to_builtins(plane.clients, enc_hook=str),
        "kinds_ignored": list(plane.kinds_ignored),
        "manifest_errors": msgspec.to_builtins(plane.errors, enc_hook=str),
        "last_nacks": msgspec.to_builtins(plane.last_nacks, enc_hook=str),
        "resources": len(plane.resources),
    }


def start() -> None:
    main("control_plane", ControlPlaneSettings, run)
