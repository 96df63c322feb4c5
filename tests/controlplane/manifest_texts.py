"""Manifests in the short, as a person would write them into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def pod(name: str, *, app: str = "web", namespace: str = "shop", **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": app}},
        "status": status,
    }


def service(name: str, *, app: str = "web", namespace: str = "shop", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"app": app}, "ports": [{"port": 80, "targetPort": 8080}], **spec},
    }


def service_entry(name: str, host: str, *, namespace: str = "shop", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"hosts": [host], "ports": [{"number": 80, "name": "http"}], "resolution": "DNS", **spec},
    }


def write(path: Path, *manifests: dict[str, Any]) -> None:
    """Writes a file of documents (JSON is YAML) as a careful tool does: whole, or not at all."""
    text = "\n---\n".join(json.dumps(manifest, indent=1) for manifest in manifests)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.rename(path)
