"""Reads the types of a BPF object (BTF) and writes the layout that user space shares with it.

Run at build time: ``python -m pykmesh.kernel.btf mesh.bpf.o … layout.json``. The C headers stay the one
place where a structure is written down; Python takes offsets, sizes and enum numbers from here.
Format: Documentation/bpf/btf.rst of the kernel.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

BTF_MAGIC = 0xEB9F
ENUMS = (
    "reason",
    "direction",
    "flow_kind",
    "address_kind",
    "service_flag",
    "dns_limit",
    "switch_index",
    "handoff_prefix",
)
_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF = 1, 2, 3, 4, 5, 6, 8
_QUALIFIERS = {9, 10, 11, 18}
_VAR, _DATASEC = 14, 15
# Map types (include/uapi/linux/bpf.h).
_RING_BUFFER = 27
_SIZED_BY_SETTINGS = {1, 5, 9, _RING_BUFFER}
# Bytes that follow the common 12 of a type, by kind: (fixed, for each of vlen).
_TAIL = {
    _INT: (4, 0), _PTR: (0, 0), _ARRAY: (12, 0), _STRUCT: (0, 12), _UNION: (0, 12), _ENUM: (0, 8),
    7: (0, 0), _TYPEDEF: (0, 0), 9: (0, 0), 10: (0, 0), 11: (0, 0), 12: (0, 0), 13: (0, 8),
    _VAR: (4, 0), _DATASEC: (0, 12), 16: (0, 0), 17: (4, 0), 18: (0, 0), 19: (0, 12),
}  # fmt: skip


class BtfError(Exception):
    """The object has no BTF, or one that cannot be read."""


class BtfType(NamedTuple):
    """One type: `rest` holds the words after the common header, `ref` its size or the type it names."""

    kind: int
    name: str
    ref: int
    rest: tuple[int, ...]


class Btf:
    """The types of one object, by number (1..n, as BTF counts them)."""

    def __init__(self, data: bytes) -> None:
        magic, _, _, header, type_off, type_len, str_off, str_len = struct.unpack_from("<HBBIIIII", data)
        if magic != BTF_MAGIC:
            raise BtfError(f"no BTF: magic is {magic:#x}, not {BTF_MAGIC:#x}")
        self._strings = data[header + str_off : header + str_off + str_len]
        self.types = [BtfType(0, "void", 0, ())]
        at, end = header + type_off, header + type_off + type_len
        while at < end:
            name, info, ref = struct.unpack_from("<III", data, at)
            kind, vlen = (info >> 24) & 0x1F, info & 0xFFFF
            fixed, each = _TAIL[kind]
            words = (fixed + each * vlen) // 4
            rest = struct.unpack_from(f"<{words}I", data, at + 12)
            self.types.append(BtfType(kind, self.string(name), ref, rest))
            at += 12 + words * 4

    def string(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def strip(self, number: int) -> int:
        """The type behind qualifiers and typedefs."""
        while self.types[number].kind in _QUALIFIERS | {_TYPEDEF}:
            number = self.types[number].ref
        return number

    def members(self, number: int) -> list[tuple[str, int, int]]:
        """(name, type, offset in bytes) of a structure."""
        rest = self.types[number].rest
        return [
            (self.string(rest[i]), rest[i + 1], (rest[i + 2] & 0xFFFFFF) // 8) for i in range(0, len(rest), 3)
        ]

    def size(self, number: int) -> int:
        kind = self.types[number := self.strip(number)]
        if kind.kind == _ARRAY:
            return self.size(kind.rest[0]) * kind.rest[2]
        return 8 if kind.kind == _PTR else kind.ref

    def by_name(self, kind: int, name: str) -> int:
        for number, found in enumerate(self.types):
            if found.kind == kind and found.name == name:
                return number
        raise BtfError(f"no type {name}")


def section(elf: bytes, wanted: str) -> bytes:
    """One section of a 64-bit little-endian ELF file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise BtfError("not a 64-bit little-endian ELF object")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry) for i in range(count)]
    names = headers[names_index][4]
    for name, _, _, _, offset, size in headers:
        start = names + name
        if elf[start : elf.index(b"\0", start)].decode() == wanted:
            return elf[offset : offset + size]
    raise BtfError(f"no section {wanted}")


def _field(btf: Btf, name: str, number: int, offset: int) -> dict[str, Any]:
    """A field as the layout writes it; `type` is u8..u64, be16, be32, ip or bytes."""
    size = btf.size(number)
    declared, real = btf.types[number], btf.types[btf.strip(number)]
    if real.kind == _STRUCT:
        kind = real.name
    elif real.kind == _ARRAY:
        kind = "bytes"
    elif declared.name.startswith("__be"):
        kind = f"be{size * 8}"
    else:
        kind = f"u{size * 8}"
    return {"name": name, "type": kind, "offset": offset, "size": size}


def structure_of(btf: Btf, number: int) -> dict[str, Any] | None:
    """Its size and fields, as the layout writes them; None for what is no structure."""
    number = btf.strip(number)
    return _structure(btf, number) if btf.types[number].kind == _STRUCT else None


def _structure(btf: Btf, number: int) -> dict[str, Any]:
    fields = [_field(btf, *member) for member in btf.members(number)]
    return {"size": btf.types[number].ref, "fields": fields}


def _map(btf: Btf, definition: int) -> dict[str, Any]:
    """A map as libbpf reads it: numbers are lengths of arrays behind pointers, types are pointers."""
    found: dict[str, Any] = {"key": None, "value": None, "key_size": 0, "value_size": 0, "map_flags": 0}
    for name, number, _ in btf.members(definition):
        target = btf.types[number].ref
        if name in ("key", "value"):
            real = btf.types[btf.strip(target)]
            found[name] = real.name if real.kind == _STRUCT else None
            found[f"{name}_size"] = btf.size(target)
        else:
            found[name] = btf.types[btf.strip(target)].rest[2]
    found.setdefault("max_entries", 0)
    return found


def _hash(described: dict[str, Any], structures: dict[str, Any]) -> str:
    """Of all that makes two maps of one name incompatible; a hash table may hold more or fewer entries."""
    shape = dict(described)
    if described["type"] in _SIZED_BY_SETTINGS:
        del shape["max_entries"]
    shape["structures"] = [structures.get(described["key"]), structures.get(described["value"])]
    if described["type"] == _RING_BUFFER:
        shape["structures"] = [structures["flow_record"]]
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:8]


def layout(elf: bytes) -> dict[str, Any]:
    """Structures, maps and enums of an object; a map's `hash` covers all but how many entries it holds."""
    btf = Btf(section(elf, ".BTF"))
    section_number = btf.by_name(_DATASEC, ".maps")
    rest = btf.types[section_number].rest
    variables = [btf.types[rest[i]] for i in range(0, len(rest), 3)]
    maps = {variable.name: _map(btf, btf.strip(variable.ref)) for variable in variables}
    names = {m[part] for m in maps.values() for part in ("key", "value") if m[part]} | {"flow_record"}
    structures = {name: _structure(btf, btf.by_name(_STRUCT, name)) for name in sorted(names)}
    for described in maps.values():
        described["hash"] = _hash(described, structures)
    enums = {}
    for name in ENUMS:
        rest = btf.types[btf.by_name(_ENUM, name)].rest
        enums[name] = {btf.string(rest[i]): rest[i + 1] for i in range(0, len(rest), 2)}
    return {"structures": structures, "maps": maps, "enums": enums, "settings": _settings(btf)}


def _settings(btf: Btf) -> dict[str, list[int]]:
    """(offset, size) of each read-only setting of the programs."""
    rest = btf.types[btf.by_name(_DATASEC, ".rodata")].rest
    return {btf.types[rest[i]].name: [rest[i + 1], rest[i + 2]] for i in range(0, len(rest), 3)}


def main(arguments: list[str]) -> None:
    """The objects, of which the first has all maps and is read, and where the layout goes."""
    *sources, target = map(Path, arguments)
    objects = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    found = {"objects": objects, **layout(sources[0].read_bytes())}
    target.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
