"""Settings of every process: a TOML file, then the environment (`PYKMESH_<FIELD>`) over it."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec

ENVIRONMENT_PREFIX: Final = "PYKMESH_"
SETTINGS_FILE_VARIABLE: Final = "PYKMESH_SETTINGS"
AFFINITY_S_MAX: Final = 86_400
"""Of `session_affinity`, as in Kubernetes."""
EXIT_SETTINGS: Final = os.EX_CONFIG
"""Of a process whose settings are wrong: to start it again would change nothing. Not 2: so a Go program ends
that has run out of memory."""


_Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=3_600_000)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Interval = Annotated[float, msgspec.Meta(ge=1e-4, le=1e6)]
_HostPort = Annotated[str, msgspec.Meta(pattern=r"^\S+:[0-9]{1,5}$")]


class SettingsError(Exception):
    """A setting that is wrong; the text names it, its value and where it came from."""


class CommonSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every process needs."""

    instance: str = "default"
    pin_dir: Path = Path("/sys/fs/bpf/pykmesh/default")
    nats_url: str = "nats://127.0.0.1:15222"
    nats_password_file: Path | None = None
    admin_host: str = "127.0.0.1"
    admin_port: _Port = 0
    log_level: str = "info"
    log_format: str = "auto"
    """auto: coloured on a terminal, JSON elsewhere; console; json."""
    otlp_endpoint: str = ""
    """Where traces go, such as http://127.0.0.1:4318; empty: none are made."""
    network: str = ""
    """The network of this node, as the control plane names it."""


class XdsClientSettings(CommonSettings, frozen=True, kw_only=True):
    admin_port: _Port = 15210
    xds_address: _HostPort = "127.0.0.1:15010"
    xds_root_cert: Path | None = None
    """Root certificate: the connection is TLS. None: plaintext."""
    xds_token_file: Path | None = None
    """Bearer token, read again for each connection."""
    xds_server_name: str = ""
    """The name in the server's certificate, when it is not the address's."""
    node_name: str = ""
    """The Kubernetes node; empty: the host's name."""
    node_ip: str = "127.0.0.1"
    namespace: str = "istio-system"
    pod_name: str = ""
    service_account: str = ""
    cluster_id: str = "Kubernetes"
    max_message_bytes: _Count = 1 << 30
    max_request_bytes: _Count = 7 << 19
    """A request that would be larger does not name what is held: istiod takes 4 MiB."""
    report_deadline_s: _Seconds = 5.0
    """How long the answer to the control plane waits for map_writer's report."""
    map_writer_grace_s: _Seconds = 3.0
    """How long after its own start it takes map_writer, not heard yet, to be starting too."""
    in_flight_batches: _Count = 64
    """Batches published and not yet reported on, at most, while map_writer reports."""


class MapWriterSettings(CommonSettings, frozen=True, kw_only=True):
    admin_port: _Port = 15211
    node_name: str = ""
    """The Kubernetes node; empty: the host's name."""
    cluster_id: str = "Kubernetes"
    locality: str = ""
    """Where this node is, region/zone/subzone; empty: as the control plane says of the node's workloads."""
    refuse_unenforced_policy: bool = False
    """Refuse connections to workloads with policies until those are enforced."""
    session_affinity: str = ""
    """Services whose clients keep their endpoint, `namespace/hostname=seconds`, separated by commas."""
    least_connections: str = ""
    """Services whose endpoints are drawn by open connections, `namespace/hostname`, separated by commas."""
    cluster_domain: str = "cluster.local"
    """The domain of Kubernetes services' names, which answers to questions about names go by."""
    mesh_key_file: Path | None = None
    """The mesh's key, the same on all its nodes, for waypoints that serve pods of other nodes."""
    hostname_refresh_s: _Interval = 30.0
    """How often the host names of workloads are looked up again."""


class LoaderSettings(CommonSettings, frozen=True, kw_only=True):
    admin_port: _Port = 15212
    enroll_socket: Path = Path("/run/pykmesh/default/enroll.sock")
    cgroup_root: Path | None = None
    """Where cgroup v2 is mounted; None: found in /proc/mounts."""
    services_max: _Count = 131_072
    endpoints_max: _Count = 524_288
    addresses_max: _Count = 524_288
    ranges_max: _Count = 16_384
    pods_max: _Count = 4_096
    opens_max: _Count = 131_072
    datagrams_max: _Count = 65_536
    affinities_max: _Count = 65_536
    loads_max: _Count = 16_384
    shunned_max: _Count = 4_096
    handoffs_max: _Count = 65_536
    flows_bytes: _Count = 16 * 1024 * 1024
    telemetry: bool = True
    passive_health_s: _Seconds = 0.0
    """How long an endpoint that refused a connection is not drawn, where there are others; 0: it is."""


class TelemetrySettings(CommonSettings, frozen=True, kw_only=True):
    admin_port: _Port = 15213
    metrics_host: str = "127.0.0.1"
    metrics_port: _Port = 15020
    drain_interval_s: _Interval = 0.01
    observe_buffer: _Count = 4096


class DnsProxySettings(CommonSettings, frozen=True, kw_only=True):
    admin_port: _Port = 15214
    enroll_socket: Path = Path("/run/pykmesh/default/enroll.sock")
    answer_deadline_s: _Interval = 0.25
    """How long map_writer is waited for; then the server that the pod asked is asked."""
    upstream_timeout_s: _Interval = 5.0
    """How long a server's answer is waited for."""
    slot_rest_s: _Interval = 60.0
    """Where a pod asks more servers than there is room for, one that was not asked for so long gives way."""


IN_CLUSTER: Final = "in-cluster"


class WaypointMgrSettings(CommonSettings, frozen=True, kw_only=True):
    admin_port: _Port = 15216
    enroll_socket: Path = Path("/run/pykmesh/default/enroll.sock")
    config_dir: Path = Path("config")
    """Gateways, routes, policies and services, as YAML."""
    kubeconfig: str = ""
    """Of an API server that has them instead: a file, or IN_CLUSTER: by this pod's service account."""
    node_name: str = ""
    """This node's among those whose waypoints the API server is told of; empty: the host's name."""
    waypoints_dir: Path = Path("/run/pykmesh/default/waypoints")
    """Where the control plane is told which instances waypoints have."""
    envoys_dir: Path = Path("/run/pykmesh/default/envoys")
    """What instances keep: one directory each."""
    waypoint_cgroup: Path = Path("/sys/fs/cgroup/pykmesh-default-waypoints")
    """The cgroup v2 directory below which instances run."""
    waypoint_address: str = ""
    """Where instances listen, for pods of this node; empty: the address of the host's default route."""
    waypoint_netns: Path | None = None
    """The network namespace in which instances run; None: this process's own."""
    waypoint_port: _Count = 15400
    """Instances listen on this port and those after it."""
    cluster_domain: str = "cluster.local"
    poll_ms: _Count = 100


class ControlPlaneSettings(CommonSettings, frozen=True, kw_only=True):
    """Of the embedded one. `listen_port` 0 takes any free port."""

    admin_port: _Port = 15215
    config_dir: Path = Path("config")
    waypoints_dir: Path | None = None
    """Where waypoint_mgr says which instances waypoints have."""
    listen_host: str = "127.0.0.1"
    listen_port: _Port = 15010
    cluster_id: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    domain: str = "cluster.local"
    service_cidr_v4: str = "10.96.0.0/16"
    service_cidr_v6: str = "fd96::/112"
    pod_cidr_v4: str = "10.244.0.0/16"
    pod_cidr_v6: str = "fd44::/112"
    poll_ms: _Count = 100
    """How often the folder is looked at."""
    debounce_ms: _Milliseconds = 20
    """How long the folder must have been quiet before a change is read."""
    dialect: str = "1.31"
    """The release of istiod to speak like: 1.25 or 1.31."""


PROCESSES: Final = (
    XdsClientSettings,
    MapWriterSettings,
    LoaderSettings,
    TelemetrySettings,
    DnsProxySettings,
    WaypointMgrSettings,
    ControlPlaneSettings,
)
_OF_THE_COMMAND_LINE: Final = frozenset({"settings", "ready_deadline_s"})
NAMES: Final = frozenset(name for kind in PROCESSES for name in kind.__struct_fields__)

_S = TypeVar("_S", bound=CommonSettings)


def load(kind: type[_S], environment: Mapping[str, str] = os.environ) -> _S:
    """Raises SettingsError for a file that cannot be read, a key of it that no process has, a wrong value.

    Keys of other processes are passed over: one file may be for all.
    """
    path = environment.get(SETTINGS_FILE_VARIABLE)
    in_file = _from_file(Path(path)) if path else {}
    _check_names(in_file, f"settings file {path}")
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        variable = ENVIRONMENT_PREFIX + field.name.upper()
        text = environment.get(variable)
        if text is not None:
            value = None if field.default is None and not text else text
            values[field.name] = _convert(value, field.type, f"{variable} in the environment")
        elif field.name in in_file:
            values[field.name] = _convert(in_file[field.name], field.type, f"{field.name} in {path}")
    return kind(**values)


def _convert(value: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False, dec_hook=_to_path)
    except msgspec.ValidationError as error:
        why = "not HOST:PORT" if "matching regex" in str(error) else error
        raise SettingsError(f"{where} is {value!r}: {why}") from error


def to_environment(settings: CommonSettings) -> dict[str, str]:
    """The environment that gives a process these settings."""
    pairs = ((name, getattr(settings, name)) for name in settings.__struct_fields__)
    return {ENVIRONMENT_PREFIX + name.upper(): "" if value is None else str(value) for name, value in pairs}


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"settings file {path}: {error}") from error


def _check_names(found: Iterable[str], where: str) -> None:
    unknown = [f"{name}{_nearest(name)}" for name in found if name not in NAMES]
    if unknown:
        raise SettingsError(f"{where}: there is no setting {', '.join(unknown)}")


def misspelt(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Variables much like a setting's that are none's: told, and no more, for others make some too."""
    names = (
        variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        for variable in environment
        if variable.startswith(ENVIRONMENT_PREFIX)
    )
    return [
        f"{ENVIRONMENT_PREFIX}{name.upper()} (perhaps {ENVIRONMENT_PREFIX}{near[0].upper()})"
        for name in sorted(names)
        if name not in NAMES
        and name not in _OF_THE_COMMAND_LINE
        and (near := difflib.get_close_matches(name, sorted(NAMES), n=1, cutoff=0.8))
    ]


def _nearest(name: str) -> str:
    matches = difflib.get_close_matches(name.lower(), sorted(NAMES), n=1)
    return f" (perhaps {matches[0]})" if matches else ""


def _to_path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)
