"""Python's view of the shared structures is the object's, as another reader of BTF (bpftool) sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pykmesh.kernel import btf, layout, records
from pykmesh.kernel.btf import Btf, BtfError, section
from pykmesh.kernel.layout import AddressKind, Direction, FlowKind, LayoutError, Reason, ServiceFlag

Types = dict[int, dict[str, Any]]
pytestmark = pytest.mark.skipif(
    not shutil.which("bpftool"), reason="needs bpftool, which reads BTF by itself"
)


@pytest.fixture(scope="module")
def types() -> Types:
    """The object's types by number, as bpftool has them."""
    result = subprocess.run(
        ["bpftool", "--json", "btf", "dump", "file", str(layout.OBJECT)],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return {found["id"]: found for found in json.loads(result.stdout)["types"]}


def test_the_object_for_old_kernels_has_the_same_layout() -> None:
    found, older = (btf.layout(path.read_bytes()) for path in (layout.OBJECT, layout.OBJECT_BEFORE_5_13))
    assert older == found


def test_an_object_of_another_build_than_the_layout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = tmp_path / "objects"
    shutil.copytree(layout.OBJECT.parent, objects)  # type: ignore[arg-type, attr-defined]  (a Path here)
    monkeypatch.setattr(layout, "_OBJECTS", objects)
    layout.check_objects()
    for name in ("mesh.bpf.o", "mesh_before_5_13.bpf.o"):
        path, before = objects / name, (objects / name).read_bytes()
        path.write_bytes(before + b"\0")
        with pytest.raises(LayoutError, match=rf"{name} is not of the build that layout\.json is of"):
            layout.check_objects()
        path.write_bytes(before)
    path.unlink()
    with pytest.raises(LayoutError, match="No such file"):
        layout.check_objects()


def named(types: Types, kind: str, name: str) -> dict[str, Any]:
    return next(found for found in types.values() if found["kind"] == kind and found["name"] == name)


def size(types: Types, number: int) -> int:
    found = types[number]
    if found["kind"] == "ARRAY":
        return size(types, found["type_id"]) * int(found["nr_elems"])
    return int(found["size"]) if "size" in found else size(types, found["type_id"])


COUNTING = bytes(range(16)).hex()
STRUCTURES = sorted(layout._document()["structures"])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_field_is_where_the_object_has_it(types: Types, structure: str) -> None:
    there = named(types, "STRUCT", structure)
    here_size, here = layout.fields_of(structure)
    assert here_size == there["size"]
    assert [(f["name"], f["offset"], f["size"]) for f in here] == [
        (m["name"], m["bits_offset"] // 8, size(types, m["type_id"])) for m in there["members"]
    ]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_structure_has_a_gap_that_is_not_named(structure: str) -> None:
    """Keys are compared byte by byte: what nobody writes would be whatever the stack held."""
    total, fields = layout.fields_of(structure)
    at = 0
    for field in fields:
        assert field["offset"] == at
        at += field["size"]
    assert at == total


@pytest.mark.parametrize("structure", STRUCTURES)
def test_arrays_of_a_structure_have_its_offsets(structure: str) -> None:
    total, fields = layout.fields_of(structure)
    found = layout.dtype(structure)
    assert found.itemsize == total
    offsets = {name: offset for name, (_, offset, *_) in (found.fields or {}).items()}
    assert offsets.items() <= {field["name"]: field["offset"] for field in fields}.items()


@pytest.mark.parametrize(
    ("codec", "values", "encoded"),
    [
        ("SERVICE_KEY", (bytes(range(16)), 0x01020304, b"\x1f\x90"), COUNTING + "04030201 1f90 0000"),
        (
            "SERVICE_VALUE",
            (1, 2, 3, 4, 5),
            "00" * 24 + "0100000000000000 02000000 0300 0400 05000000 00000000",
        ),
        ("ENDPOINT_KEY", (1, 2), "0100000000000000 02000000 00000000"),
        (
            "ENDPOINT_VALUE",
            (1, bytes(range(16)), b"\x00\x50"),
            "0100000000000000" + COUNTING + "0050 0000 00000000" + "00" * 16,
        ),
        ("ADDRESS_KEY", (bytes(range(16)), 5), COUNTING + "05000000 00000000"),
        ("ADDRESS_VALUE", (1, 4, 5), "00" * 24 + "0100 0400 05000000" + "00" * 8),
    ],
)
def test_keys_and_values_have_these_bytes(codec: str, values: tuple[Any, ...], encoded: str) -> None:
    assert getattr(records, codec).pack(*values) == bytes.fromhex(encoded)


@pytest.mark.parametrize(
    ("enum", "members", "prefix"),
    [
        ("reason", Reason, "REASON_"),
        ("direction", Direction, "DIRECTION_"),
        ("flow_kind", FlowKind, "FLOW_"),
        ("address_kind", AddressKind, "ADDRESS_"),
        ("service_flag", ServiceFlag, "SERVICE_"),
    ],
)
def test_enums_have_the_same_words_and_numbers(types: Types, enum: str, members: Any, prefix: str) -> None:
    there = {v["name"].removeprefix(prefix): v["val"] for v in named(types, "ENUM", enum)["values"]}
    there.pop("COUNT", None)
    assert there == {member.name: member.value for member in members}
    layout.check_enums()


def test_settings_of_the_programs_are_where_the_object_has_them(types: Types) -> None:
    there = {
        types[v["type_id"]]["name"]: (v["offset"], v["size"])
        for v in named(types, "DATASEC", ".rodata")["vars"]
    }
    assert {name: tuple(place) for name, place in layout._document()["settings"].items()} == there
    with pytest.raises(LayoutError, match="has 32 bytes, not 31"):
        layout.setting_offset("instance_name", 31)


def test_a_pins_name_changes_with_the_layout_and_not_with_the_size() -> None:
    for name in layout.map_names():
        found = layout.map_layout(name)
        assert found.pin == f"{name}@{found.hash}"
        assert len(found.hash) == 8
    assert layout.map_layout("services").hash != layout.map_layout("addresses").hash


def test_a_field_or_map_that_is_not_there_is_named() -> None:
    with pytest.raises(LayoutError, match=r"address_key has .*, not .*'nothing'"):
        layout.codec("address_key", "address", "nothing")
    with pytest.raises(LayoutError, match="in this order"):
        layout.codec("address_key", "network", "address")
    with pytest.raises(LayoutError, match="no map nothing"):
        layout.map_layout("nothing")


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(BtfError, match="not a 64-bit"):
        section(b"\x7fELF\x01\x01" + bytes(100), ".BTF")
    with pytest.raises(BtfError, match=r"no section \.nothing"):
        section(layout.OBJECT.read_bytes(), ".nothing")
    with pytest.raises(BtfError, match="no BTF"):
        Btf(bytes(64))
