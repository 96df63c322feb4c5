"""The demo's configuration folder: two versions of a web service, an echo service, a client."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from pykmesh.demo.pods import Pod
from pykmesh.files import write_whole

NAMESPACE: Final = "shop"
WEB4, WEB6 = "10.96.0.10", "fd96::10"
ECHO4, ECHO6 = "10.96.0.20", "fd96::20"
EMPTY4: Final = "10.96.0.30"
SHOP4, SHOP6 = "10.96.0.40", "fd96::40"
WAYPOINT: Final = "waypoint"
CANARY_HEADER: Final = "x-canary"
STABLE_WEIGHT, CANARY_WEIGHT = 80, 20
HTTP_PORT, UDP_PORT = 8080, 9090


def write(folder: Path, name: str, objects: list[dict[str, Any]]) -> None:
    """One file, there at once and whole."""
    write_whole(folder / f"{name}.yaml", yaml.safe_dump_all(objects, sort_keys=False))


def service(
    name: str,
    address4: str,
    address6: str | None,
    port: int,
    target: int,
    protocol: str,
    selector: dict[str, str] | None = None,
) -> dict[str, Any]:
    addresses = [address for address in (address4, address6) if address]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "selector": selector or {"app": name},
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


def by_waypoint() -> list[dict[str, Any]]:
    """A service by way of a waypoint, which splits it between the two versions of another one."""
    versions = {
        name: service(name, address, None, 80, HTTP_PORT, "TCP", {"app": "web", "version": name})
        for name, address in (("v1", "10.96.0.41"), ("v2", "10.96.0.42"))
    }
    shop = service("shop", SHOP4, SHOP6, 80, HTTP_PORT, "TCP", {"app": "web"})
    shop["metadata"]["labels"] = {"istio.io/use-waypoint": WAYPOINT}
    shop["spec"]["ports"][0]["name"] = "http"
    gateway = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": WAYPOINT, "namespace": NAMESPACE},
        "spec": {
            "gatewayClassName": "pykmesh-waypoint",
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    }
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "canary", "namespace": NAMESPACE},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "shop"}],
            "rules": [
                {
                    "matches": [{"headers": [{"name": CANARY_HEADER, "value": "yes"}]}],
                    "backendRefs": [{"name": "v2", "port": 80}],
                },
                {
                    "backendRefs": [
                        {"name": "v1", "port": 80, "weight": STABLE_WEIGHT},
                        {"name": "v2", "port": 80, "weight": CANARY_WEIGHT},
                    ]
                },
            ],
        },
    }
    return [gateway, shop, *versions.values(), route]


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
