"""Our types have every field of the kinds that waypoints are configured by, as their CRDs say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from msgspec import inspect

from pykmesh.manifests.objects import KINDS, Object
from pykmesh.manifests.unknown import WHOLE, spec_of

from .binaries import FOLDER, find

NOT_READ = {
    "RequestAuthentication": {".jwtRules[].jwks_uri"},
    "BackendTLSPolicy": {".options"},
}
"""Who says these is refused, or told."""


def lost(schema: dict[str, Any], of: Any, path: str) -> Iterator[str]:
    """Paths of fields that a CRD has and the type does not."""
    while isinstance(of, inspect.Metadata):
        of = of.type
    match of:
        case inspect.UnionType():
            found = [
                [*lost(schema, each, path)] for each in of.types if not isinstance(each, inspect.NoneType)
            ]
            yield from min(found, key=len)
        case inspect.StructType():
            fields = {field.encode_name: field.type for field in of.fields}
            for name, below in schema.get("properties", {}).items():
                if name in fields:
                    yield from lost(below, fields[name], f"{path}.{name}")
                else:
                    yield f"{path}.{name}"
        case inspect.VarTupleType():
            yield from lost(schema.get("items", {}), of.item_type, f"{path}[]")
        case inspect.DictType() if isinstance(schema.get("additionalProperties"), dict):
            yield from lost(schema["additionalProperties"], of.value_type, f"{path}{{}}")


@pytest.mark.parametrize("kind", WHOLE, ids=[kind.__name__ for kind in WHOLE])
def test_no_field_is_passed_over(kind: type[Object]) -> None:
    binaries = find()
    if binaries is None:
        pytest.skip(f"no CRDs in {FOLDER}: make istio-tools")
    (group,) = (group for group, name in KINDS if name == kind.__name__)
    documents = yaml.load_all(binaries.crds.read_bytes(), yaml.CSafeLoader)
    crds = [each["spec"] for each in documents if each and each.get("kind") == "CustomResourceDefinition"]
    versions = [
        version
        for crd in crds
        if (crd["group"], crd["names"]["kind"]) == (group, kind.__name__)
        for version in crd["versions"]
    ]
    assert versions
    for version in versions:
        schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
        assert {*lost(schema, spec_of(kind), "")} == NOT_READ.get(kind.__name__, set()), version["name"]
