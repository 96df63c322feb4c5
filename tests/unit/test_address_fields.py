"""Field by field: what an Address makes of the maps, as tests/data/address/cases.yaml says."""

from __future__ import annotations

import base64
import ipaddress
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format

from pykmesh.contracts.address import FieldError, Service, decode_address
from pykmesh.kernel.layout import flag_text
from pykmesh.kernel.records import ip_from_text
from pykmesh.proto.workload_pb2 import Address
from services.map_writer.desired import Rules
from services.map_writer.locality import Locality
from services.map_writer.mesh import Mesh, Touched
from services.map_writer.planner import Held, Limits, Planner
from tests.unit.mesh_model import Maps

CASES = yaml.safe_load((Path(__file__).parents[1] / "data" / "address" / "cases.yaml").read_text())["cases"]
HERE = Locality("eu", "eu-1", "eu-1a", "node-a", "Kubernetes")
LIMITS = Limits(1000, 1000, 1000)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_an_address_makes_of_the_maps(case: dict[str, Any]) -> None:
    mesh, touched, rejected = Mesh(HERE), Touched(), {}
    for hostname, addresses in case.get("resolved", {}).items():
        mesh.resolve(hostname, tuple(map(ip_from_text, addresses)), touched)
    for given in case["given"]:
        ((kind, fields),) = given.items()
        try:
            found = decode_address(message(kind, fields))
        except FieldError as error:
            rejected[kind] = str(error)
            continue
        mesh.put(found.name if isinstance(found, Service) else found.uid, found, touched)
    maps = Maps(LIMITS)
    maps.apply(Planner(Held(), LIMITS, Rules()).plan(mesh, touched))
    shown = maps.plain()
    assert rejected == case.get("rejected", {})
    assert {key.strip(): as_said(*found) for key, found in shown["services"].items()} == case["services"]
    if "addresses" in case:
        assert {key.strip(): address_as_said(*found) for key, found in shown["addresses"].items()} == case[
            "addresses"
        ]


def as_said(verdict: Any, flags: Any, _affinity_s: Any, *endpoints: Any) -> list[str]:
    return [" ".join(filter(None, (verdict.label, flag_text(flags)))), *endpoints]


def address_as_said(kind: Any, verdict: Any, view: Any) -> str:
    words = [kind.name.lower(), verdict.label]
    return " ".join([*words, *(["sees", view] if view else [])])


def message(kind: str, fields: dict[str, Any]) -> bytes:
    return json_format.ParseDict({kind: _packed(fields)}, Address()).SerializeToString()


def _packed(value: Any, key: str = "") -> Any:
    """Protobuf's JSON has bytes in base64; the table has them as addresses."""
    if isinstance(value, dict):
        return {name: _packed(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_packed(item, key) for item in value]
    if isinstance(value, str) and key in ("address", "addresses"):
        return base64.b64encode(ipaddress.ip_address(value).packed).decode()
    return value
