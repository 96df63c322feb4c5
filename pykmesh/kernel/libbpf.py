"""A thin edge on libbpf.so.1: the calls that this project makes, with errors as exceptions.

libbpf 1.x returns -errno from functions that give an int, and NULL with errno set from those that
give a pointer. Every function here raises KernelError naming what was tried on what.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from ctypes import POINTER, Structure, byref, c_char_p, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Final

ANY: Final = 0
NOEXIST: Final = 1
_BPF_F_QUERY_EFFECTIVE: Final = 1
_NETNS_LINK: Final = 5  # BPF_LINK_TYPE_NETNS
_BPF_F_REPLACE: Final = 4


class KernelError(OSError):
    """A call into the kernel failed; `errno` says how, the text says what was tried."""


class _OpenOptions(Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("object_name", c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", c_char_p),
        ("_stub", c_uint32),
        ("kconfig", c_char_p),
        ("btf_custom_path", c_char_p),
        ("kernel_log_buf", c_void_p),
        ("kernel_log_size", c_size_t),
        ("kernel_log_level", c_uint32),
    )


class _BatchOptions(Structure):
    _fields_ = (("sz", c_size_t), ("elem_flags", c_uint64), ("flags", c_uint64))


class _LinkUpdateOptions(Structure):
    _fields_ = (("sz", c_size_t), ("flags", c_uint32), ("old_prog_fd", c_uint32))


_L = ctypes.CDLL("libbpf.so.1", use_errno=True)
for _name in ("bpf_object__open_file", "bpf_object__find_map_by_name", "bpf_object__find_program_by_name",
              "bpf_map__initial_value", "bpf_object__next_map", "bpf_map__name"):  # fmt: skip
    getattr(_L, _name).restype = c_void_p
_L.bpf_map__name.restype = c_char_p
_L.bpf_map__initial_value.argtypes = [c_void_p, POINTER(c_size_t)]
for _name in ("bpf_object__load", "bpf_object__close", "bpf_map__fd", "bpf_program__fd", "bpf_map__name"):
    getattr(_L, _name).argtypes = [c_void_p]
_L.bpf_object__find_map_by_name.argtypes = [c_void_p, c_char_p]
_L.bpf_object__find_program_by_name.argtypes = [c_void_p, c_char_p]
_L.bpf_object__next_map.argtypes = [c_void_p, c_void_p]
_L.bpf_map__set_pin_path.argtypes = [c_void_p, c_char_p]
_L.bpf_map__set_max_entries.argtypes = [c_void_p, c_uint32]
_L.bpf_map__max_entries.argtypes = [c_void_p]
_L.bpf_map__max_entries.restype = c_uint32
_L.libbpf_set_print(None)


def _text(number: int) -> str:
    """Libbpf has numbers of its own, for objects that are none."""
    found = ctypes.create_string_buffer(128)
    _L.libbpf_strerror(number, found, len(found))
    return found.value.decode(errors="replace")


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise KernelError(-result, f"{what}: {_text(-result)}")
    return result


def _pointer(result: int | None, what: str) -> int:
    if not result:
        number = ctypes.get_errno()
        raise KernelError(number, f"{what}: {_text(number)}")
    return result


class BpfObject:
    """An object file, opened; `load()` creates its maps and programs. Close it when done."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._log = ctypes.create_string_buffer(1 << 20)
        options = _OpenOptions(
            sz=ctypes.sizeof(_OpenOptions),
            kernel_log_buf=ctypes.addressof(self._log),
            kernel_log_size=len(self._log),
        )
        self._handle = _pointer(_L.bpf_object__open_file(path.encode(), byref(options)), f"open {path}")

    def _map(self, name: str) -> int:
        return _pointer(
            _L.bpf_object__find_map_by_name(self._handle, name.encode()), f"map {name} in {self.path}"
        )

    def pin_map(self, name: str, path: str, max_entries: int) -> int:
        """Before load: use the map pinned at `path`, or pin the new one there.

        Returns the size that a new one would have: a ring's is rounded up.
        """
        handle = self._map(name)
        _checked(_L.bpf_map__set_pin_path(handle, path.encode()), f"pin path of {name}")
        if max_entries:
            _checked(_L.bpf_map__set_max_entries(handle, max_entries), f"size of map {name}")
        return int(_L.bpf_map__max_entries(handle))

    def write_rodata(self, data: bytes, offset: int) -> None:
        """Before load: overwrite bytes of the read-only settings."""
        handle, size = self._rodata(), c_size_t()
        start = _pointer(_L.bpf_map__initial_value(handle, byref(size)), "settings of the programs")
        if offset + len(data) > size.value:
            raise KernelError(22, f"settings of the programs: {offset}+{len(data)} of {size.value} bytes")
        ctypes.memmove(start + offset, data, len(data))

    def _rodata(self) -> int:
        handle = None
        while handle := _L.bpf_object__next_map(self._handle, handle):
            if _L.bpf_map__name(handle).endswith(b".rodata"):
                found: int = handle
                return found
        raise KernelError(2, f"{self.path} has no read-only settings")

    def load(self) -> None:
        result = _L.bpf_object__load(self._handle)
        if result < 0:
            log = self._log.value.decode(errors="replace").strip().splitlines()
            detail = f"; the verifier's last words: {' | '.join(log[-3:])}" if log else ""
            if not log and -result in (errno.E2BIG, errno.ENOMEM):
                detail = "; a map is larger than can be made here: see the settings that end in _max"
            raise KernelError(-result, f"load {self.path}: {_text(-result)}{detail}")

    def program_fd(self, name: str) -> int:
        handle = _L.bpf_object__find_program_by_name(self._handle, name.encode())
        return _checked(
            _L.bpf_program__fd(_pointer(handle, f"program {name} in {self.path}")), f"program {name}"
        )

    def map_fd(self, name: str) -> int:
        """After load; the object's own."""
        return _checked(_L.bpf_map__fd(self._map(name)), f"map {name}")

    def close(self) -> None:
        _L.bpf_object__close(self._handle)


def obj_get(path: str) -> int:
    """A descriptor of what is pinned at `path`."""
    return _checked(_L.bpf_obj_get(path.encode()), f"open the pin {path}")


def obj_pin(fd: int, path: str) -> None:
    _checked(_L.bpf_obj_pin(fd, path.encode()), f"pin at {path}")


def link_create(program_fd: int, target_fd: int, attach_type: int) -> int:
    return _checked(
        _L.bpf_link_create(program_fd, target_fd, attach_type, None), f"attach as type {attach_type}"
    )


def link_update(link_fd: int, program_fd: int) -> None:
    """Replaces a link's program in one step: what connects meanwhile meets the old one or the new one."""
    options = _LinkUpdateOptions(sz=ctypes.sizeof(_LinkUpdateOptions))
    _checked(_L.bpf_link_update(link_fd, program_fd, byref(options)), "update a link")


def link_detach(link_fd: int) -> None:
    _checked(_L.bpf_link_detach(link_fd), "detach a link")


def _info(fd: int, size: int, what: str) -> bytes:
    buffer, length = ctypes.create_string_buffer(size), c_uint32(size)
    _checked(_L.bpf_obj_get_info_by_fd(fd, buffer, byref(length)), f"information on {what}")
    return buffer.raw


def link_info(fd: int) -> tuple[int, int, int]:
    """(program id, target, attach type) of a link to a cgroup or a network namespace.

    The target is the cgroup's id or the namespace's inode number; 0 when it is gone.
    """
    data = _info(fd, 64, "a link")
    kind, program_id = struct.unpack_from("<I4xI", data)
    target, attach_type = struct.unpack_from("<II" if kind == _NETNS_LINK else "<QI", data, 16)
    return program_id, target, attach_type


def map_info(fd: int) -> tuple[int, int, int, int]:
    """(type, key size, value size, max_entries)."""
    data = _info(fd, 96, "a map")
    kind, _, key, value, entries = (int.from_bytes(data[i : i + 4], "little") for i in range(0, 20, 4))
    return kind, key, value, entries


def map_types(fd: int) -> tuple[bytes, int, int] | None:
    """The types (BTF) that a map was made with, and the numbers of its key's and value's; None: without."""
    number, key, value = struct.unpack_from("<III", _info(fd, 96, "a map"), 64)
    if not number or not value:
        return None
    with closing(_checked(_L.bpf_btf_get_fd_by_id(number), f"types {number}")) as types:
        size = struct.unpack_from("<QI", _info(types, 64, "types"))[1]
        data, information = ctypes.create_string_buffer(size), ctypes.create_string_buffer(64)
        struct.pack_into("<QI", information, 0, ctypes.addressof(data), size)
        length = c_uint32(64)
        _checked(
            _L.bpf_obj_get_info_by_fd(types, information, byref(length)), f"information on types {number}"
        )
        return data.raw, key, value


def map_id(fd: int) -> int:
    return int.from_bytes(_info(fd, 96, "a map")[4:8], "little")


def program_fd_by_id(program_id: int) -> int:
    return _checked(_L.bpf_prog_get_fd_by_id(program_id), f"program {program_id}")


def program_name_and_maps(program_id: int) -> tuple[str, list[int]]:
    """The name of a program that is loaded, and the ids of its maps."""
    fd = program_fd_by_id(program_id)
    try:
        ids = (c_uint32 * 64)()
        buffer = ctypes.create_string_buffer(232)
        ctypes.memmove(ctypes.addressof(buffer) + 52, (64).to_bytes(4, "little"), 4)
        ctypes.memmove(ctypes.addressof(buffer) + 56, ctypes.addressof(ids).to_bytes(8, "little"), 8)
        length = c_uint32(232)
        _checked(_L.bpf_obj_get_info_by_fd(fd, buffer, byref(length)), f"information on program {program_id}")
        found = int.from_bytes(buffer.raw[52:56], "little")
        return buffer.raw[64:80].rstrip(b"\0").decode(errors="replace"), list(ids[:found])
    finally:
        os.close(fd)


def bind_map(program_fd: int, map_fd: int) -> None:
    """The map lives as long as the program, though that does not read it."""
    _checked(_L.bpf_prog_bind_map(program_fd, map_fd, None), "bind a map to a program")


def map_fd_by_id(map_id: int) -> int:
    return _checked(_L.bpf_map_get_fd_by_id(map_id), f"map {map_id}")


def map_name(fd: int) -> str:
    return _info(fd, 96, "a map")[24:40].rstrip(b"\0").decode(errors="replace")


def query_programs(cgroup_fd: int, attach_type: int, *, effective: bool) -> list[int]:
    """Ids of the programs attached to a cgroup, or (effective) that run for it, its ancestors' included."""
    ids, count = (c_uint32 * 64)(), c_uint32(64)
    flags = _BPF_F_QUERY_EFFECTIVE if effective else 0
    result = _L.bpf_prog_query(cgroup_fd, attach_type, flags, None, ids, byref(count))
    _checked(result, f"programs of attach type {attach_type}")
    return list(ids[: count.value])


def probe_helper(program_type: int, helper: int) -> bool:
    return bool(_L.libbpf_probe_bpf_helper(program_type, helper, None) == 1)


def probe_program_type(number: int) -> bool:
    return bool(_L.libbpf_probe_bpf_prog_type(number, None) == 1)


def probe_map_type(number: int) -> bool:
    return bool(_L.libbpf_probe_bpf_map_type(number, None) == 1)


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    buffer = ctypes.create_string_buffer(value_size)
    result = _L.bpf_map_lookup_elem(fd, key, buffer)
    if result == -2:
        return None
    _checked(result, "look a key up")
    return buffer.raw


def update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    _checked(_L.bpf_map_update_elem(fd, key, value, c_uint64(flags)), "write an entry")


def delete(fd: int, key: bytes) -> bool:
    """True when there was such a key."""
    result = _L.bpf_map_delete_elem(fd, key)
    if result == -2:
        return False
    _checked(result, "delete an entry")
    return True


def lookup_and_delete(fd: int, key: bytes, value_size: int) -> bytes | None:
    """An element and its removal, in one step (hash maps: kernel 5.14)."""
    buffer = ctypes.create_string_buffer(value_size)
    result = _L.bpf_map_lookup_and_delete_elem(fd, key, buffer)
    if result == -2:
        return None
    _checked(result, "take an entry out")
    return buffer.raw


def next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after `key`, the first one after None; None at the end."""
    buffer = ctypes.create_string_buffer(key_size)
    result = _L.bpf_map_get_next_key(fd, key, buffer)
    if result == -2:
        return None
    _checked(result, "read the next key")
    return buffer.raw


def update_batch(fd: int, keys: int, values: int, count: int) -> tuple[int, int]:
    """(0 or -errno, how many went in) for `count` entries at two addresses."""
    done, options = c_uint32(count), _BatchOptions(sz=ctypes.sizeof(_BatchOptions))
    result = _L.bpf_map_update_batch(fd, c_void_p(keys), c_void_p(values), byref(done), byref(options))
    return result, done.value


def delete_batch(fd: int, keys: int, count: int) -> tuple[int, int]:
    done, options = c_uint32(count), _BatchOptions(sz=ctypes.sizeof(_BatchOptions))
    result = _L.bpf_map_delete_batch(fd, c_void_p(keys), byref(done), byref(options))
    return result, done.value


def lookup_batch(
    fd: int, cursor: int | None, cursor_out: int, keys: int, values: int, count: int
) -> tuple[int, int]:
    """(0, -ENOENT at the end, or -errno; how many were read)."""
    read, options = c_uint32(count), _BatchOptions(sz=ctypes.sizeof(_BatchOptions))
    result = _L.bpf_map_lookup_batch(
        fd,
        c_void_p(cursor),
        c_void_p(cursor_out),
        c_void_p(keys),
        c_void_p(values),
        byref(read),
        byref(options),
    )
    return result, read.value


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
