"""A folder of 1,000 services and 10,000 pods is in the kernel's maps, entry by entry as its YAML says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
import yaml

from pykmesh.cli import diff
from pykmesh.node.mesh import Options
from tests.control import kernel_view
from tests.control.kernel_view import Address, Entry, View
from tests.control.mesh_node import ALL, MeshNode, running, until

pytestmark = [pytest.mark.anyio, pytest.mark.kernel, pytest.mark.usefixtures("one_event_loop")]

SERVICES, PODS = 1000, 10
Object = dict[str, Any]


def manifests(draw: random.Random) -> Iterator[list[Object]]:
    """A service and its pods at a time; every tenth has two families, two ports and a named target port."""
    for number in range(SERVICES):
        special = number % 10 == 0
        block, low = divmod(number, 250)
        vips = [f"10.96.{block}.{low + 1}"] + ([f"fd96::{number + 1:x}"] if special else [])
        ports: list[Object] = [{"name": "http", "port": 80, "targetPort": 8080}]
        if special:
            ports.append({"name": "admin", "port": 443, "targetPort": "admin"})
        yield [
            _service(f"svc-{number}", vips, ports),
            *(_pod(draw, number, pod, special) for pod in range(PODS)),
        ]


def _service(name: str, vips: list[str], ports: list[Object]) -> Object:
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "big"},
        "spec": {
            "clusterIP": vips[0], "clusterIPs": vips, "selector": {"app": name}, "ports": ports,
            "ipFamilies": ["IPv6" if ":" in vip else "IPv4" for vip in vips],
            "ipFamilyPolicy": "RequireDualStack" if len(vips) > 1 else "SingleStack",
        },
    }  # fmt: skip


def _pod(draw: random.Random, service: int, pod: int, special: bool) -> Object:
    number = service * PODS + pod
    addresses = [f"10.{100 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"]
    addresses += [f"fd01::{number + 1:x}"] if special else []
    container: Object = {
        "name": "main",
        "ports": [{"name": "admin", "containerPort": draw.choice([9001, 9002])}],
    }
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": f"svc-{service}-{pod}", "namespace": "big", "labels": {"app": f"svc-{service}"}},
        "spec": {"containers": [container if draw.random() < 0.9 else {"name": "main"}]},
        "status": {
            "phase": "Running", "podIP": addresses[0], "podIPs": [{"ip": address} for address in addresses],
            "conditions": [{"type": "Ready", "status": str(draw.random() < 0.9)}],
        },
    }  # fmt: skip


def expected(folder: Path) -> View:
    """From the files alone, by what Kubernetes says of services and pods."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    objects = [o for file in folder.iterdir() for o in yaml.load_all(file.read_text(), loader)]
    pods: dict[str, list[Object]] = {}
    view = View({}, {})
    for found in objects:
        if found["kind"] == "Pod":
            pods.setdefault(found["metadata"]["labels"]["app"], []).append(found)
            for entry in found["status"]["podIPs"]:
                view.addresses[entry["ip"]] = Address("workload", "routed")
    for found in objects:
        if found["kind"] == "Service":
            _add_service(view, found["spec"], pods.get(found["spec"]["selector"]["app"], []))
    return view


def _add_service(view: View, spec: Object, pods: list[Object]) -> None:
    for vip in spec["clusterIPs"]:
        view.addresses[vip] = Address("service", "routed")
        for port in spec["ports"]:
            endpoints = {
                f"{entry['ip']} {target}"
                for pod in pods
                if pod["status"]["conditions"][0]["status"] == "True"
                and (target := _target(port["targetPort"], pod))
                for entry in pod["status"]["podIPs"]
                if (":" in entry["ip"]) == (":" in vip)
            }
            view.services[f"{vip} {port['port']}"] = Entry("routed", frozenset(endpoints))


def _target(named: int | str, pod: Object) -> int | None:
    if isinstance(named, int):
        return named
    ports = pod["spec"]["containers"][0].get("ports", [])
    return next((port["containerPort"] for port in ports if port["name"] == named), None)


async def test_every_entry_is_as_the_yaml_says_at_first_and_after_a_change(tmp_path: Path) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    batches = list(manifests(random.Random(7)))
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    for first in range(0, SERVICES, 100):
        objects = [found for batch in batches[first : first + 100] for found in batch]
        (folder / f"{first:04}.yaml").write_text(yaml.dump_all(objects, Dumper=dumper))
    async with running(tmp_path, Options(config_dir=folder), (*ALL, "control_plane")) as node:
        wanted = expected(folder)
        assert len(wanted.services) == 1300
        assert len(wanted.addresses) == 1100 + 11_000
        await until("maps full", lambda: len(kernel_view.read_raw(node.maps_dir)["services"]) == 1300, 60)
        said = kernel_view.read(node.maps_dir)
        assert said.services == wanted.services
        assert said.addresses == wanted.addresses
        found = await _compared(node)
        assert found[diff.SAID] == ([], {"resources": 11_000}, 0)
        endpoints = {"endpoints": len(kernel_view.read_raw(node.maps_dir)["endpoints"])}
        assert found[diff.HELD] == ([], {"services": 1000, "addresses": 12_100, **endpoints}, 0)

        temporary = tmp_path / "new"
        changed = [found for batch in manifests(random.Random(8)) for found in batch[:-2]][: 100 * (PODS - 1)]
        temporary.write_text(yaml.dump_all(changed, Dumper=dumper))
        temporary.rename(folder / "0000.yaml")
        wanted = expected(folder)
        while_it_changes = await _compared(node)
        assert [found.differences for found in while_it_changes.values()] == [[], []]
        await until("the change", lambda: _read(node.maps_dir) == wanted, 60)


async def _compared(node: MeshNode) -> dict[str, diff.Compared]:
    """What `pykmesh diff` finds."""
    looks = {diff.SAID: diff.said, diff.HELD: diff.held}
    return {
        name: await anyio.to_thread.run_sync(diff.compare, partial(look, node.instance))
        for name, look in looks.items()
    }


def _read(maps_dir: Path) -> View | None:
    """None while a write is under way, in which an entry may be seen before what it counts."""
    try:
        return kernel_view.read(maps_dir)
    except (AssertionError, KeyError):
        return None
