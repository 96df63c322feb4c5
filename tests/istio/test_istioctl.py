"""What `pykmesh config-dump` says, read by a real istioctl."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pykmesh.demo.pods import Pod
from tests.istio import binaries
from tests.istio.conftest import Mesh
from tests.istio.namespace import NODE, Namespace
from tests.istio.traffic import at, workload
from tests.mesh.manifests import service


class Istioctl:
    def __init__(self, mesh: Mesh, file: Path) -> None:
        found = binaries.find()
        assert found is not None
        self._path, self._file = found.istioctl, file
        file.write_text(mesh.node.cli("config-dump").stdout)

    def says(self, what: str, *words: str) -> str:
        """Of `ztunnel-config WHAT`. istioctl says nothing of a dump that it cannot read, and fails."""
        command = [self._path, "ztunnel-config", what, "--file", self._file, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def rows(self, what: str, namespace: str) -> list[list[str]]:
        lines = self.says(what).splitlines()
        return [line.split() for line in lines[1:] if line.split()[0] == namespace]

    def json(self, what: str) -> Any:
        return json.loads(self.says(what, "-o", "json"))


@pytest.fixture
def dumped(mesh: Mesh, namespace: Namespace, tmp_path: Path) -> Istioctl:
    first, second, _ = mesh.web
    namespace.apply(
        service("web", app="web", ports={80: 8080}), workload(first), workload(second, ready=False)
    )
    mesh.node.until_endpoints(namespace.host("web"), at(8080, first))
    return Istioctl(mesh, tmp_path / "dump.json")


def both(pod: Pod) -> str:
    return f"{pod.address4},{pod.address6}"


def test_its_tables_show_services_and_workloads(mesh: Mesh, namespace: Namespace, dumped: Istioctl) -> None:
    first, second, _ = mesh.web
    vips = ",".join(namespace.vips("web"))
    assert dumped.rows("service", namespace.name) == [[namespace.name, "web", vips, "None", "1/1"]]
    assert dumped.rows("workload", namespace.name) == [
        [namespace.name, each.name, both(each), NODE, "None", "TCP"] for each in (first, second)
    ]
    assert {"web-1", "web-2", "kubernetes"} <= set(dumped.says("all").split())


def test_its_json_says_of_each_workload_what_istiod_said(
    mesh: Mesh, namespace: Namespace, dumped: Istioctl
) -> None:
    found = [each for each in dumped.json("workload") if each["namespace"] == namespace.name]
    assert {each["name"]: each["status"] for each in found} == {
        mesh.web[0].name: "Healthy",
        mesh.web[1].name: "Unhealthy",
    }
    for each in found:
        assert (each["serviceAccount"], each["clusterId"]) == ("default", "Kubernetes")
        assert each["locality"]["zone"] == "a"
