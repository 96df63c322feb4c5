"""The embedded control plane as a process of its own: settings from the environment, a status page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from pykmesh.contracts.settings import CommonSettings
from pykmesh.controlplane.control_plane import ControlPlane
from pykmesh.controlplane.manifests import ConfigError
from pykmesh.controlplane.settings import ControlPlaneSettings
from pykmesh.process import Runtime, main
from pykmesh.readiness import Readiness


class ControlPlaneProcessSettings(CommonSettings, frozen=True, kw_only=True):
    """`ControlPlaneSettings` says what each means."""

    admin_port: int = 15215
    config_dir: Path = Path("config")
    listen_host: str = "127.0.0.1"
    listen_port: int = 15010
    cluster_id: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    domain: str = "cluster.local"
    service_cidr_v4: str = "10.96.0.0/16"
    service_cidr_v6: str = "fd96::/112"
    pod_cidr_v4: str = "10.244.0.0/16"
    pod_cidr_v6: str = "fd44::/112"
    poll_ms: int = 100
    debounce_ms: int = 20


async def run(runtime: Runtime[ControlPlaneProcessSettings]) -> None:
    """Serves until cancelled; ready when it listens, which a folder that cannot be read puts off."""
    runtime.readiness.wait_for("listening")
    names = {name for name in ControlPlaneSettings.__struct_fields__ if hasattr(runtime.settings, name)}
    plane = ControlPlane(ControlPlaneSettings(**{name: getattr(runtime.settings, name) for name in names}))
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
        "manifest_errors": msgspec.to_builtins(plane.errors, enc_hook=str),
        "last_nacks": msgspec.to_builtins(plane.last_nacks, enc_hook=str),
        "resources": len(plane.resources),
    }


def start() -> None:
    main("control_plane", ControlPlaneProcessSettings, run)
