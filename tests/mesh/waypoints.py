"""A mesh whose service `shop` goes by way of a waypoint to v1 and v2, and what clients of it ask."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pykmesh.demo.pods import Pod
from tests.mesh.manifests import Object, host, pod, service, text
from tests.mesh.node import Node, python, serve, until

SHOP4, SHOP6 = "10.96.0.40", "fd96::40"
ASK = """
import json, socket
answers = []
for _ in range({count}):
    with socket.create_connection(({address!r}, {port}), 5, ("", {own_port})) as s:
        s.sendall(b"GET /{path} HTTP/1.1\\r\\nhost: shop\\r\\nconnection: close\\r\\n{header}\\r\\n")
        f, head = s.makefile("rb"), []  # to the end of the answer: Envoy keeps what it ends open for a second
        while line := f.readline().strip():
            head.append(line)
        sizes = [int(line.split()[1]) for line in head if line.lower().startswith(b"content-length:")]
        answers.append([int(head[0].split()[1]) if head else 0, f.read(*sizes).decode().strip()])
print(json.dumps(answers))
"""


class Mesh(NamedTuple):
    node: Node
    client: Pod
    waypoint: Pod


def gateway(name: str = "wp", **annotations: str) -> Object:
    """`annotations` by what follows pykmesh.io/, with _ for -."""
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {
            "name": name,
            "namespace": "shop",
            "annotations": {
                f"pykmesh.io/{key.replace('_', '-')}": value for key, value in annotations.items()
            },
        },
        "spec": {"gatewayClassName": "pykmesh-waypoint"},
    }


def shop(*, waypoint: str | None = "wp") -> Object:
    found = service("shop", SHOP4, SHOP6, app="web", ports={80: 8080, 90: 8080})
    found["spec"]["ports"][0]["name"] = "http"
    found["spec"]["ports"][1]["name"] = "tcp"
    found["metadata"]["labels"] = {"istio.io/use-waypoint": waypoint} if waypoint else {}
    return found


def version(name: str, address: str) -> Object:
    found = service(name, address, app="web", ports={80: 8080})
    found["spec"]["selector"] = {"app": "web", "version": name}
    found["spec"]["ports"][0]["name"] = "http"
    return found


def route(*rules: Object) -> Object:
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "shop", "namespace": "shop"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "shop"}], "rules": list(rules)},
    }


CANARY: Object = {
    "matches": [{"headers": [{"name": "x-canary", "value": "yes"}]}],
    "backendRefs": [{"name": "v2", "port": 80}],
}
SPLIT: Object = {
    "backendRefs": [{"name": "v1", "port": 80, "weight": 3}, {"name": "v2", "port": 80, "weight": 1}]
}


@contextlib.contextmanager
def waypoint_mesh(directory: Path, subnet: int, *options: str, **annotations: str) -> Iterator[Mesh]:
    """`directory` is short: sockets lie in it. `options` of `up`."""
    node = Node(directory, subnet=subnet)
    try:
        with node.network as network:
            client, waypoint = network.add("client", 10), network.add("waypoint", 11)
            web = [network.add(name, 20 + n) for n, name in enumerate(("v1", "v2"))]
            known = [pod("client", str(client.address4), str(client.address6), app="client")]
            for each in web:
                serve(each, "--http", "8080")
                found = pod(each.name, str(each.address4), str(each.address6), app="web")
                found["metadata"]["labels"]["version"] = each.name
                known.append(found)
            node.write("pods", text(*known))
            node.write("versions", text(version("v1", "10.96.0.41"), version("v2", "10.96.0.42")))
            node.write("gateway", text(gateway(**annotations)))
            node.write("shop", text(shop()))
            node.write("route", text(route(CANARY, SPLIT)))
            address = ("--waypoint-address", str(waypoint.address4), "--waypoint-netns", str(waypoint.netns))
            node.start(*address, *options)
            node.enroll(client)
            found_mesh = Mesh(node, client, waypoint)
            until_handed_over(found_mesh)
            yield found_mesh
    finally:
        node.end()


def until_handed_over(mesh: Mesh) -> None:
    until(
        lambda: any(e.startswith(f"{mesh.waypoint.address4}:") for e in mesh.node.endpoints(host("shop"))),
        "the waypoint to be the service's way",
    )


def ask(
    mesh: Mesh, count: int = 1, header: str = "", *, address: str = SHOP4, port: int = 80, own_port: int = 0
) -> Counter[Any]:
    """Answers, by status and body, each over a connection of its own."""
    code = ASK.format(
        count=count,
        address=address,
        port=port,
        own_port=own_port,
        path="",
        header=f"{header}\\r\\n" if header else "",
    )
    return Counter(map(tuple, json.loads(python(mesh.client, code, timeout_s=60))))


def status(mesh: Mesh) -> Any:
    """Of the waypoint."""
    return next(w for w in mesh.node.status()["processes"]["waypoint_mgr"]["waypoints"])
