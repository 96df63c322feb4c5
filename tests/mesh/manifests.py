"""Manifests as a user writes them, from a few words."""

from __future__ import annotations

from typing import Any

import yaml

Object = dict[str, Any]


def text(*objects: Object) -> str:
    return yaml.safe_dump_all(objects, sort_keys=False)


def pod(
    name: str, *addresses: str, app: str, ready: bool = True, ports: dict[str, int] | None = None
) -> Object:
    status: Object = {"phase": "Running", "podIPs": [{"ip": address} for address in addresses]}
    status["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}]
    named = [{"name": n, "containerPort": p} for n, p in (ports or {}).items()]
    container = {"name": "main", "image": "none", "ports": named}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": app}},
        "spec": {"containers": [container], "serviceAccountName": "default"},
        "status": {**status, "podIP": addresses[0]},
    }


def service(name: str, *addresses: str, app: str, ports: dict[int, int | str]) -> Object:
    """Without addresses: of both families, chosen by who serves it."""
    families = ["IPv6" if ":" in address else "IPv4" for address in addresses if address != "None"]
    spec: Object = {
        "selector": {"app": app},
        "ports": [{"name": f"p{port}", "port": port, "targetPort": target} for port, target in ports.items()],
    }
    if addresses:
        spec |= {"clusterIP": addresses[0], "clusterIPs": list(addresses)}
    if families:
        spec["ipFamilies"] = families
    if "None" not in addresses:
        spec["ipFamilyPolicy"] = "SingleStack" if len(families) == 1 else "RequireDualStack"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": spec,
    }


def host(name: str) -> str:
    """The resource name of a service."""
    return f"shop/{name}.shop.svc.cluster.local"
