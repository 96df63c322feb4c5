"""The demo's configuration folder: two versions of a web service, an echo service, a client."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from pykmesh.demo.pods import Pod

NAMESPACE: Final = "shop"
WEB4, WEB6 = "10.96.0.10", "fd96::10"
ECHO4, ECHO6 = "10.96.0.20", "fd96::20"
EMPTY4: Final = "10.96.0.30"
HTTP_PORT, UDP_PORT = 8080, 9090


def write(folder: Path, name: str, objects: list[dict[str, Any]]) -> None:
    """One file, there at once and whole."""
    temporary = folder / f".{name}.new"
    temporary.write_text(yaml.safe_dump_all(objects, sort_keys=False))
    temporary.rename(folder / f"{name}.yaml")


def service(
    name: str, address4: str, address6: str | None, port: int, target: int, protocol: str
) -> dict[str, Any]:
    addresses = [address for address in (address4, address6) if address]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "selector": {"app": name},
            "clusterIP": address4,
            "clusterIPs": addresses,
            "ipFamilies": ["IPv4", "IPv6"][: len(addresses)],
            "ipFamilyPolicy": "RequireDualStack" if address6 else "SingleStack",
            "ports": [{"name": protocol.lower(), "port": port, "targetPort": target, "protocol": protocol}],
        },
    }


def pod(found: Pod, app: str, version: str) -> dict[str, Any]:
    addresses = [{"ip": address} for address in (found.address4, found.address6) if address]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": found.name, "namespace": NAMESPACE, "labels": {"app": app, "version": version}},
        "spec": {"serviceAccountName": app},
        "status": {"podIP": found.address4, "podIPs": addresses},
    }


def write_services(folder: Path) -> None:
    write(
        folder,
        "services",
        [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
            service("web", WEB4, WEB6, 80, HTTP_PORT, "TCP"),
            service("echo", ECHO4, ECHO6, 7, UDP_PORT, "UDP"),
            service("empty", EMPTY4, None, 80, HTTP_PORT, "TCP"),
        ],
    )
