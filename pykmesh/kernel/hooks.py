"""Which program is attached where: the one table of hooks, and loading the object that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final, NamedTuple

from pykmesh.kernel import libbpf
from pykmesh.kernel.layout import OBJECT, OBJECT_BEFORE_5_13, map_layout, map_names, setting_offset

PROGRAM_PREFIX: Final = "pykmesh_"
_SOCK_ADDR, _SET_RETVAL = 18, 187  # BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_FUNC_set_retval


class Hook(NamedTuple):
    """A program and the cgroup attach type (include/uapi/linux/bpf.h) that it is for."""

    program: str
    attach_type: int


# In the order of attaching: what undoes a rewrite stands before what rewrites.
HOOKS: Final = (
    Hook("pykmesh_peer4", 29),
    Hook("pykmesh_peer6", 30),
    Hook("pykmesh_recv4", 19),
    Hook("pykmesh_recv6", 20),
    Hook("pykmesh_sockops", 3),
    Hook("pykmesh_release", 34),
    Hook("pykmesh_send4", 14),
    Hook("pykmesh_send6", 15),
    Hook("pykmesh_conn4", 10),
    Hook("pykmesh_conn6", 11),
)

READING_HOOK: Final = Hook("pykmesh_origdst", 21)
"""It reads, once, what a connection is for: noted before it came to the waypoint."""

# Of a waypoint's cgroup.
WAYPOINT_HOOKS: Final = (READING_HOOK, Hook("pykmesh_arrived", 3))

# Of the network namespace that waypoints' instances listen in.
FRONT_HOOK: Final = Hook("pykmesh_front", 36)


class ProgramSettings(NamedTuple):
    """What is fixed in the programs when they are loaded (bpf/mesh_helpers.h)."""

    instance_name: str
    node_network: int
    has_set_retval: bool
    has_telemetry: bool
    shun_ns: int = 0


def can_set_retval() -> bool:
    """connect() can be refused with an errno of choice (kernel 5.18); without it the errno is EPERM."""
    return libbpf.probe_helper(_SOCK_ADDR, _SET_RETVAL)


class KeptSize(NamedTuple):
    """A pinned map of another size than the one that is wanted: it is fixed when the map is made."""

    map: str
    pinned: int
    wanted: int


class Programs:
    """The loaded programs. Their maps are the pinned ones; made and pinned where there are none."""

    def __init__(
        self,
        map_dir: Path,
        sizes: Mapping[str, int],
        settings: ProgramSettings,
        elsewhere: Mapping[str, Path] | None = None,
        room: Mapping[str, int] | None = None,
    ) -> None:
        """`elsewhere`: where maps are pinned that are not to be among the others yet.

        `room`: how many entries some must have room for, at least.
        """
        self._elsewhere, self._room = elsewhere or {}, room or {}
        self.kept_sizes: list[KeptSize] = []
        """Pinned maps whose size is not the one in `sizes`."""
        self.object, self.why_not_the_first = _either(lambda path: self._load(path, map_dir, sizes, settings))
        self.fds = {
            hook: self._object.program_fd(hook.program) for hook in (*HOOKS, *WAYPOINT_HOOKS, FRONT_HOOK)
        }
        for hook in (HOOKS[-1], WAYPOINT_HOOKS[0]):
            for name in map_names():  # also those that no program reads: whose pin goes is found by these
                libbpf.bind_map(self.fds[hook], self._object.map_fd(name))

    def _load(
        self, path: Traversable, map_dir: Path, sizes: Mapping[str, int], settings: ProgramSettings
    ) -> None:
        self.kept_sizes.clear()
        self._object = libbpf.BpfObject(str(path))
        try:
            for name in map_names():
                wanted = sizes.get(name, 0)
                if room := self._room.get(name, 0):
                    wanted = max(wanted or map_layout(name).max_entries, room)
                self._pin(map_dir, name, wanted)
            _write_settings(self._object, settings)
            self._object.load()
        except BaseException:
            self._object.close()
            raise

    def _pin(self, map_dir: Path, name: str, wanted: int) -> None:
        path = self._elsewhere.get(name, map_dir / map_layout(name).pin)
        size = self._object.pin_map(name, str(path), wanted)
        if not path.exists():
            return
        with libbpf.closing(libbpf.obj_get(str(path))) as fd:
            pinned = libbpf.map_info(fd)[3]
        self._object.pin_map(name, str(path), pinned)
        if wanted and size != pinned:
            self.kept_sizes.append(KeptSize(name, pinned, wanted))

    def pin_again(self, map_dir: Path) -> list[str]:
        """Maps whose pin somebody removed: pinned as they were. Returns their names."""
        gone = [name for name in map_names() if not (map_dir / map_layout(name).pin).exists()]
        for name in gone:
            libbpf.obj_pin(self._object.map_fd(name), str(map_dir / map_layout(name).pin))
        return gone

    def close(self) -> None:
        """The programs that are attached stay: their links hold them."""
        self._object.close()


def _either(load: Callable[[Traversable], None]) -> tuple[str, str]:
    """Loads the object, or the one for kernels before 5.13 where this kernel does not take it.

    Returns the name of the one, and what the kernel said of the other. KernelError of both.
    """
    try:
        load(OBJECT)
    except libbpf.KernelError as error:
        try:
            load(OBJECT_BEFORE_5_13)
        except libbpf.KernelError as second:
            raise libbpf.KernelError(second.errno or 0, f"{error.strerror}; {second.strerror}") from error
        return OBJECT_BEFORE_5_13.name, str(error.strerror)
    return OBJECT.name, ""


def _write_settings(opened: libbpf.BpfObject, settings: ProgramSettings) -> None:
    values = {
        "instance_name": settings.instance_name.encode()[:31].ljust(32, b"\0"),
        "node_network": settings.node_network.to_bytes(4, "little"),
        "has_set_retval": bytes([settings.has_set_retval]),
        "has_telemetry": bytes([settings.has_telemetry]),
        "shun_ns": settings.shun_ns.to_bytes(8, "little"),
    }
    for name, data in values.items():
        opened.write_rodata(data, setting_offset(name, len(data)))


def _try(path: Traversable) -> None:
    """With all that is asked of the kernel where it can do it, as bpf_loader asks."""
    tried = libbpf.BpfObject(str(path))
    try:
        _write_settings(tried, ProgramSettings("tried", 0, can_set_retval(), has_telemetry=True, shun_ns=1))
        tried.load()
    finally:
        tried.close()


def check_loads() -> None:
    """Loads the programs with maps of their own, which go again. KernelError: this kernel refuses them."""
    _either(_try)


def count_pinned(links: Path) -> int:
    """How many of the hooks have their link in a cgroup's directory of links."""
    return sum((links / hook.program).exists() for hook in HOOKS)


def instance_of(program_id: int) -> str | None:
    """The name of the instance that loaded a program; None when it is not one of this project's."""
    name, map_ids = libbpf.program_name_and_maps(program_id)
    if not name.startswith(PROGRAM_PREFIX):
        return None
    for map_id in map_ids:
        with libbpf.closing(libbpf.map_fd_by_id(map_id)) as fd:
            if libbpf.map_name(fd).endswith(".rodata"):
                size = libbpf.map_info(fd)[2]
                data = libbpf.lookup(fd, bytes(4), size) or b""
                offset = setting_offset("instance_name", 32)
                return data[offset : offset + 32].rstrip(b"\0").decode(errors="replace")
    return "unknown"
