"""What `make istio-tools` built, in the versions that are locked in tools/istio."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

LOCKED: Final = Path(__file__).parents[2] / "tools" / "istio"
FOLDER: Final = Path(os.environ.get("PYKMESH_ISTIO_TOOLS") or "~/.cache/pykmesh/istio-tools").expanduser()


class Binaries(NamedTuple):
    etcd: Path
    kube_apiserver: Path
    istiod: Path
    istioctl: Path
    crds: Path
    """One file of YAML: Istio's own, and those of the Gateway API."""


def find() -> Binaries | None:
    """None when they are not built. A folder that is there is whole."""
    kubernetes = FOLDER / f"kubernetes-{_locked('kubernetes', 'k8s.io/kubernetes')}"
    istio = FOLDER / f"istio-{_locked('istio', 'istio.io/istio')}"
    if not (kubernetes.is_dir() and istio.is_dir()):
        return None
    return Binaries(
        etcd=kubernetes / "etcd",
        kube_apiserver=kubernetes / "kube-apiserver",
        istiod=istio / "istiod",
        istioctl=istio / "istioctl",
        crds=istio / "crds.yaml",
    )


def _locked(module: str, path: str) -> str:
    found = re.search(rf"{re.escape(path)} (v\S+)", (LOCKED / module / "go.mod").read_text())
    assert found is not None, path
    return found[1]
