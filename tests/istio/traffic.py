"""Pods that stand for servers, and what a client sees of a service's address."""

from __future__ import annotations

import ast
from typing import Any

from pykmesh.demo.pods import Pod
from tests.mesh import manifests
from tests.mesh.manifests import Object
from tests.mesh.node import python
from tests.mesh.test_traffic import ERRNO, MANY


def workload(server: Pod, app: str = "web", *, name: str = "", **options: Any) -> Object:
    """The pod of a server, as a kubelet reports it."""
    addresses = (str(server.address4), str(server.address6))
    return manifests.pod(name or server.name, *addresses, app=app, **options)


def at(port: int, *servers: Pod) -> set[str]:
    """Both addresses of each, as `Node.endpoints` says them."""
    return {f"{address}:{port}" for server in servers for address in (server.address4, server.address6)}


def answers(client: Pod, address: str, port: int = 80, count: int = 30) -> set[str]:
    """Who answers on the address of a service."""
    return set(ast.literal_eval(python(client, MANY.format(address=address, port=port, count=count))))


def refusal(client: Pod, address: str, port: int = 80) -> int:
    """The errno of a connect; 0 when it succeeds."""
    family = "AF_INET6" if ":" in address else "AF_INET"
    return int(python(client, ERRNO.format(family=family, address=address, port=port)))
