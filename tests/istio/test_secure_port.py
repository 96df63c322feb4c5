"""istiod's TLS port: its root certificate, its name, and a token that is checked, wrong or exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anyio.to_thread
import pytest
import trustme

from pykmesh.demo.pods import Pod
from pykmesh.node.mesh import Options
from tests.control.mesh_node import CLIENT, running
from tests.istio.control_plane import SERVER_NAME, ControlPlane
from tests.istio.namespace import NODE, Namespace
from tests.istio.traffic import answers, at, workload
from tests.mesh.manifests import Object, pod, service
from tests.mesh.node import Node, finish, probe, serve, until

ACCOUNT: Object = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}


class Secured(NamedTuple):
    """A mesh that has a token, as a pod of `namespace`; a service `web` of one server."""

    node: Node
    client: Pod
    namespace: Namespace
    token_file: Path


def exchange(file: Path, token: str) -> None:
    """As a kubelet does it: the new token is there at once and whole."""
    fresh = file.with_suffix(".new")
    fresh.write_text(token)
    fresh.rename(file)


def client_status(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = node.status()["processes"]["xds_client"]
    return found


def issue(namespace: Namespace, name: str) -> str:
    """The token of a pod that is made for it."""
    namespace.apply(ACCOUNT, pod(name, "10.200.2.1", app="mesh"))
    return namespace.api.token(namespace.get("Pod", name))


@pytest.fixture
def root_certificate(control_plane: ControlPlane, tmp_path: Path) -> Path:
    control_plane.write_root_certificate(tmp_path / "root-cert.pem")
    return tmp_path / "root-cert.pem"


@pytest.fixture
def secured(
    control_plane: ControlPlane, namespace: Namespace, root_certificate: Path, tmp_path: Path
) -> Iterator[Secured]:
    token_file = tmp_path / "istio-token"
    token_file.write_text(issue(namespace, "mesh-1"))
    node = Node(
        tmp_path,
        "--xds-address", control_plane.xds_tls_address, "--xds-server-name", SERVER_NAME,
        "--xds-root-cert", str(root_certificate), "--xds-token-file", str(token_file),
        "--namespace", namespace.name, "--node-name", NODE, subnet=10,
    )  # fmt: skip
    try:
        with node.network as network:
            client, server = network.add("client", 10), network.add("web-1", 20)
            serve(server, "--http", "8080")
            namespace.apply(service("web", app="web", ports={80: 8080}), workload(server))
            node.start()
            node.enroll(client)
            node.until_endpoints(namespace.host("web"), at(8080, server))
            yield Secured(node, client, namespace, token_file)
    finally:
        node.end()


@pytest.mark.kernel
def test_a_token_is_read_for_each_connection_and_a_wrong_one_is_named_while_traffic_goes_on(
    control_plane: ControlPlane, secured: Secured
) -> None:
    node, client, namespace, token_file = secured
    address = namespace.vips("web")[0]
    assert answers(client, address) == {"web-1"}
    prober = probe(client, address, 80)

    exchange(token_file, "not-a-token")
    control_plane.stop_istiod()
    control_plane.start_istiod()
    told = until(lambda: _refusal(node), "the refusal")
    assert (told["event"], told["address"]) == ("stream_failed", control_plane.xds_tls_address)
    assert "authentication failure" in told["detail"]
    assert "stream_failed" in node.cli("status", check=False).stdout
    assert "UNAUTHENTICATED" in (node.run_dir / "logs" / "xds_client.log").read_text()
    assert not client_status(node)["connected"]

    exchange(token_file, issue(namespace, "mesh-2"))
    until(lambda: client_status(node)["connected"], "connected by the next token")
    found = finish(prober)
    assert found["failed"] == 0, found["errors"]
    namespace.delete("Pod", "web-1")
    node.until_endpoints(namespace.host("web"), set())
    assert client_status(node)["nacks"] == 0


def _refusal(node: Node) -> dict[str, Any] | None:
    """The last time that istiod did not let the client in."""
    errors = [error for error in client_status(node)["errors"] if error.get("code") == "UNAUTHENTICATED"]
    return errors[-1] if errors else None


WRONG = {
    "no token": ({"xds_token_file": None}, "UNAUTHENTICATED"),
    "not a token": ({"xds_token_file": "garbage"}, "UNAUTHENTICATED"),
    "a token for others": ({"xds_token_file": "other-audience"}, "UNAUTHENTICATED"),
    "another root": ({"xds_root_cert": "other-root"}, "CERTIFICATE_VERIFY_FAILED"),
    "another name": ({"xds_server_name": "istiod.elsewhere.svc"}, "Hostname Verification Check failed"),
    "a missing file": ({"xds_token_file": "missing"}, "No such file"),
}


@pytest.mark.anyio
@pytest.mark.usefixtures("one_event_loop")
@pytest.mark.parametrize("what", WRONG)
async def test_what_is_wrong_with_the_way_to_istiod_is_named(
    control_plane: ControlPlane, namespace: Namespace, root_certificate: Path, tmp_path: Path, what: str
) -> None:
    changed, told = WRONG[what]
    token = await anyio.to_thread.run_sync(issue, namespace, "mesh-1")
    (tmp_path / "istio-token").write_text(token)
    (tmp_path / "garbage").write_text("garbage")
    audience = namespace.api.token(namespace.get("Pod", "mesh-1"), audience="vault")
    (tmp_path / "other-audience").write_text(audience)
    trustme.CA().cert_pem.write_to_path(tmp_path / "other-root")
    files = {
        name: tmp_path / value if value and name != "xds_server_name" else value
        for name, value in changed.items()
    }
    right = {
        "xds_address": control_plane.xds_tls_address, "xds_server_name": SERVER_NAME,
        "xds_root_cert": root_certificate, "xds_token_file": tmp_path / "istio-token",
    }  # fmt: skip
    options = Options(**{**right, **files}, namespace=namespace.name, node_name=NODE)
    async with running(tmp_path, options, CLIENT, ready=False) as node:
        said = await node.until_page("xds_client", lambda said: said["errors"], "told what is wrong")
    assert told in str(said["errors"][-1]), said["errors"]
    assert not said["connected"]
