"""etcd, kube-apiserver and an unmodified istiod on loopback: no nodes, no controllers, no webhooks.

What a cluster's other parts would write (pods, their addresses and readiness, nodes) the tests write.
"""

from __future__ import annotations

import http.client
import os
import secrets
from pathlib import Path
from typing import Final, Self

import trustme
import yaml

from pykmesh.node.instance import ports_of_no_client
from tests.istio.api_server import ApiServer, Object
from tests.istio.binaries import Binaries
from tests.istio.processes import Process

SERVER_NAME: Final = "istiod.istio-system.svc"
"""In the certificate of istiod's TLS port."""
_SERVICE_ADDRESSES: Final = "10.96.0.0/16,fd00:10:96::/112"
_PORTS: Final = ("etcd", "etcd_peers", "api", "xds", "xds_tls", "http", "monitoring")
_ISTIOD: Final = {
    "PILOT_ENABLE_AMBIENT": "true",
    "POD_NAMESPACE": "istio-system",
    "POD_NAME": "istiod-0",
    "CLUSTER_ID": "Kubernetes",
    "PILOT_CERT_PROVIDER": "istiod",
    "ENABLE_LEADER_ELECTION": "false",  # it is alone: controllers need not wait for an election
    "INJECT_ENABLED": "false",
    "VALIDATION_WEBHOOK_CONFIG_NAME": "",
    "INJECTION_WEBHOOK_CONFIG_NAME": "",
    "UNSAFE_PILOT_ENABLE_RUNTIME_ASSERTIONS": "true",  # it ends where a client misuses the protocol
}


class ControlPlane:
    """Use as a context manager; its processes end with the block, or with this process."""

    def __init__(self, binaries: Binaries, directory: Path) -> None:
        self._binaries = binaries
        self._directory = directory
        self._ports = dict(zip(_PORTS, ports_of_no_client(len(_PORTS)), strict=True))
        self._processes: dict[str, Process] = {}
        self._api_server_words: list[str | Path]
        self.api: ApiServer

    def __enter__(self) -> Self:
        try:
            self._start_etcd()
            self._start_api_server()
            self._install_crds()
            self.start_istiod()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def xds_address(self) -> str:
        return f"127.0.0.1:{self._ports['xds']}"

    @property
    def xds_tls_address(self) -> str:
        return f"127.0.0.1:{self._ports['xds_tls']}"

    @property
    def kubeconfig(self) -> Path:
        """Of the API server."""
        return self._directory / "kubeconfig"

    @property
    def istiod(self) -> Process:
        return self._processes["istiod"]

    def end(self) -> None:
        for process in reversed(self._processes.values()):
            process.end()

    def logs(self) -> str:
        """The end of each process's log."""
        return "\n".join(f"--- {p.log}\n{p.tail()}" for p in self._processes.values())

    def restart_api_server(self) -> None:
        """On its port, with its store, its certificate and its token. It serves when this returns."""
        self._processes["kube-apiserver"].end()
        self._run_api_server()

    def stop_istiod(self) -> None:
        """Fails when it ended by itself before."""
        assert self.istiod.is_running, f"istiod has ended:\n{self.istiod.tail()}"
        self.istiod.end()

    def start_istiod(self, **environment: str) -> None:
        """On the same ports each time; it serves when this returns. `environment` is over the usual one."""
        listen = {
            "grpcAddr": "xds",
            "secureGRPCAddr": "xds_tls",
            "httpAddr": "http",
            "monitoringAddr": "monitoring",
        }
        (self._directory / "mesh.yaml").write_text("rootNamespace: istio-system\n")
        words: list[str | Path] = [
            self._binaries.istiod, "discovery",
            *(f"--{flag}=127.0.0.1:{self._ports[port]}" for flag, port in listen.items()),
            "--httpsAddr=", "--ctrlz_port=0", "--shutdownDuration=1s",
            "--kubeconfig", self.kubeconfig, "--registries=Kubernetes",
            "--clusterID=Kubernetes", "--domain=cluster.local", "--namespace=istio-system",
            "--meshConfig", self._directory / "mesh.yaml",
            "--networksConfig", self._directory / "none.yaml",
        ]  # fmt: skip
        own = {"PATH": os.environ["PATH"], "HOME": str(self._directory)}
        istiod = self._start("istiod", words, {**own, **_ISTIOD, **environment})
        istiod.until(lambda: _is_ok(self._ports["http"], "/ready"), "readiness")

    def write_root_certificate(self, path: Path) -> None:
        """The certificate that signs istiod's TLS port: it appears shortly after istiod is ready."""
        wanted = {"name": "istio-ca-root-cert", "namespace": "istio-system"}
        config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": wanted}
        self.istiod.until(lambda: bool(self.api.get(config_map)), "root certificate")
        path.write_text(self.api.get(config_map)["data"]["root-cert.pem"])

    def _start(
        self, name: str, words: list[str | Path], environment: dict[str, str] | None = None
    ) -> Process:
        self._processes[name] = process = Process(name, words, self._directory, environment)
        return process

    def _start_etcd(self) -> None:
        clients, peers = (f"http://127.0.0.1:{self._ports[name]}" for name in ("etcd", "etcd_peers"))
        etcd = self._start("etcd", [
            self._binaries.etcd, "--data-dir", self._directory / "etcd", "--unsafe-no-fsync",
            f"--listen-client-urls={clients}", f"--advertise-client-urls={clients}",
            f"--listen-peer-urls={peers}", f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}", "--log-level=warn",
        ])  # fmt: skip
        etcd.until(lambda: _is_ok(self._ports["etcd"], "/health"), "health")

    def _start_api_server(self) -> None:
        """Whoever has the token may do everything. Its admission makes no service accounts."""
        authority, token = trustme.CA(), secrets.token_hex(16)
        root, certificate, signer, tokens = (
            self._directory / name for name in ("ca.pem", "api.pem", "signer.pem", "tokens.csv")
        )
        authority.cert_pem.write_to_path(root)
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
        trustme.CA().private_key_pem.write_to_path(signer)
        tokens.write_text(f'{token},admin,admin,"system:masters"\n')
        self._api_server_words = [
            self._binaries.kube_apiserver, f"--etcd-servers=http://127.0.0.1:{self._ports['etcd']}",
            "--bind-address=127.0.0.1", f"--secure-port={self._ports['api']}",
            "--tls-cert-file", certificate, "--tls-private-key-file", certificate,
            "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none",
            f"--service-cluster-ip-range={_SERVICE_ADDRESSES}",
            "--token-auth-file", tokens, "--authorization-mode=AlwaysAllow",
            "--disable-admission-plugins=ServiceAccount", "--enable-priority-and-fairness=false",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--api-audiences=https://kubernetes.default.svc,istio-ca",
            "--service-account-key-file", signer, "--service-account-signing-key-file", signer,
        ]  # fmt: skip
        self.api = ApiServer(self._ports["api"], token, root)
        self._run_api_server()
        self._write_kubeconfig(token, root)

    def _run_api_server(self) -> None:
        api_server = self._start("kube-apiserver", self._api_server_words)
        api_server.until(lambda: self.api.request("GET", "/readyz") == "ok", "readiness")

    def _write_kubeconfig(self, token: str, root: Path) -> None:
        server = {"server": f"https://127.0.0.1:{self._ports['api']}", "certificate-authority": str(root)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": server}],
            "users": [{"name": "admin", "user": {"token": token}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "admin"}}],
            "current-context": "tests",
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def _install_crds(self) -> None:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        found = yaml.load_all(self._binaries.crds.read_text(), loader)
        crds = [crd for crd in found if crd and crd["kind"] == "CustomResourceDefinition"]
        self.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "istio-system"}})
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        for crd in crds:
            self.api.request("POST", path, {**crd, "status": None})
        self._processes["kube-apiserver"].until(
            lambda: all(map(_is_established, self.api.request("GET", path)["items"])), "CRDs"
        )


def _is_established(crd: Object) -> bool:
    conditions = crd.get("status", {}).get("conditions", [])
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


def _is_ok(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except http.client.HTTPException:
        return False
    finally:
        connection.close()
