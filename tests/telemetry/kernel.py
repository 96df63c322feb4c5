"""An instance's maps on a bpffs of their own, and a program that writes to them as the mesh's would."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import struct
import subprocess
from collections.abc import Iterator
from ctypes import c_int, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Final

from pykmesh.kernel import hooks, libbpf, pins
from pykmesh.kernel.layout import Direction, FlowKind, Reason, map_layout, map_names
from pykmesh.kernel.maps import PinnedMap

ROOT: Final = Path(__file__).parents[2]
RECORDS, OPENS, DISCARDS, SHORT = range(4)
TCP, UDP = 6, 17
LOCAL: Final = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 1])
_REQUEST: Final = struct.Struct("<QIIIIIIIIQQQ")  # struct emit_request
_SIZES: Final = {
    "services": 64,
    "endpoints": 64,
    "addresses": 64,
    "ranges": 64,
    "pods": 64,
    "opens": 1024,
    "datagrams": 64,
}


def remote(number: int) -> bytes:
    return bytes(10) + b"\xff\xff" + bytes([10, 1]) + number.to_bytes(2, "big")


class _TestRunOptions(ctypes.Structure):
    """struct bpf_test_run_opts of libbpf."""

    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


def compile_emitter(directory: Path) -> Path:
    """Compiled as the Makefile compiles the programs."""
    compiled = directory / "emit.o"
    include = f"-I/usr/include/{platform.machine()}-linux-gnu"
    flags = ["-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror", include]
    source = ROOT / "tests/bpf/emit.bpf.c"
    subprocess.run(["clang", *flags, "-c", source, "-o", compiled], check=True, timeout=60)
    return compiled


class Instance:
    """Pinned maps, and the emitter loaded on them."""

    def __init__(self, pin_dir: Path, emitter: libbpf.BpfObject) -> None:
        self.pin_dir = pin_dir
        self.maps_dir = pins.maps_dir(pin_dir)
        self._program = emitter.program_fd("pykmesh_emit")
        self._next = 0

    def emit(
        self,
        count: int,
        *,
        mode: int = RECORDS,
        pairs: int = 1,
        kind: int = FlowKind.CLOSED,
        direction: int = Direction.OUTBOUND,
        protocol: int = TCP,
        established: bool = True,
        reason: int = 0,
        service: int = 0,
        opened_ns: int = 0,
    ) -> int:
        """Writes `count` records (of connections opened now, or at `opened_ns`) or opens.

        Returns how many found room.
        """
        fields = (pairs, kind, direction, protocol, established, reason, service, opened_ns, 0)
        context = ctypes.create_string_buffer(_REQUEST.pack(self._next, count, mode, *fields), _REQUEST.size)
        options = _TestRunOptions(sz=ctypes.sizeof(_TestRunOptions))
        options.ctx_in, options.ctx_size_in = ctypes.addressof(context), _REQUEST.size
        result = libbpf._L.bpf_prog_test_run_opts(self._program, ctypes.byref(options))
        assert result == 0, f"BPF_PROG_TEST_RUN: {result}"
        self._next += count
        written: int = _REQUEST.unpack(context.raw)[-1]
        return written

    def remake(self, name: str) -> None:
        """A map goes and is made anew, as bpf_loader would; the emitter stays on the one that is gone."""
        sizes = {}
        for each in map_names():
            if each != "sockets":
                with PinnedMap(self.maps_dir, each) as pinned:
                    sizes[each] = pinned.max_entries
        (self.maps_dir / map_layout(name).pin).unlink()
        _make(self.maps_dir, sizes)

    def lost(self) -> int:
        with PinnedMap(self.maps_dir, "counters") as counters:
            return counters.counter_sums()[Reason.RECORD_LOST]


@contextlib.contextmanager
def instance(directory: Path, emitter: Path, flows_bytes: int) -> Iterator[Instance]:
    """Mounts a bpffs below `directory` for as long as the block runs."""
    pin_dir = directory / "bpf" / "test"
    pins.prepare(pin_dir)
    try:
        _make(pins.maps_dir(pin_dir), {**_SIZES, "flows": flows_bytes})
        loaded = _load(pins.maps_dir(pin_dir), emitter)
        try:
            yield Instance(pin_dir, loaded)
        finally:
            loaded.close()
    finally:
        subprocess.run(["umount", "--lazy", pin_dir], check=True, timeout=10)


def _make(maps_dir: Path, sizes: dict[str, int]) -> None:
    settings = hooks.ProgramSettings("test", 0, hooks.can_set_retval(), has_telemetry=True)
    hooks.Programs(maps_dir, sizes, settings).close()


def _load(maps_dir: Path, emitter: Path) -> libbpf.BpfObject:
    found = libbpf.BpfObject(str(emitter))
    for name in map_names():
        if name != "sockets":
            with PinnedMap(maps_dir, name) as pinned:
                found.pin_map(name, str(maps_dir / map_layout(name).pin), pinned.max_entries)
    found.load()
    return found
