"""Which processes an instance consists of, and with which settings: the one place that wires them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pykmesh.contracts.settings import (
    CommonSettings,
    ControlPlaneSettings,
    DnsProxySettings,
    LoaderSettings,
    MapWriterSettings,
    SettingsError,
    TelemetrySettings,
    WaypointMgrSettings,
    XdsClientSettings,
    load,
    to_environment,
)
from pykmesh.kernel.cgroups import find_root
from pykmesh.node import broker, waypoints
from pykmesh.node.fork_server import python
from pykmesh.node.instance import Instance
from pykmesh.node.supervisor import Spec

SERVICES = ("bpf_loader", "map_writer", "xds_client", "telemetry")
DNS = "dns_proxy"
WAYPOINTS = "waypoint_mgr"
PROCESSES = ("nats", "control_plane", *SERVICES, DNS, WAYPOINTS)
MODULES = ("pykmesh.controlplane", *(f"services.{name}" for name in (*SERVICES, DNS, WAYPOINTS)))
"""Of those that are Python's."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `pykmesh up` is told. Either a folder for the embedded control plane, or an address of another."""

    config_dir: Path | None = None
    xds_address: str = ""
    xds_root_cert: Path | None = None
    xds_token_file: Path | None = None
    xds_server_name: str = ""
    node_name: str = ""
    namespace: str = "istio-system"
    network: str = ""
    cluster_id: str = "Kubernetes"
    cgroup_root: Path | None = None
    otlp_endpoint: str = ""
    log_level: str = "info"
    refuse_unenforced_policy: bool = False
    dns: bool = False
    """Answer enrolled pods' questions about names of services."""
    waypoint_address: str = ""
    """Where waypoints listen, for this node's pods."""
    waypoint_netns: Path | None = None
    mesh_key_file: Path | None = None
    """For waypoints that serve pods of other nodes: the same key on all."""
    kubeconfig: str = ""
    """Of the API server whose Gateways are run here, beside an istiod."""
    settings: dict[str, str] = {}
    """Further settings by their environment names, over all others."""


def service_names(options: Options) -> list[str]:
    """The services that run with these options."""
    names = [*SERVICES, DNS] if options.dns else list(SERVICES)
    return [*names, WAYPOINTS] if options.config_dir or options.kubeconfig else names


def port_names(options: Options) -> list[str]:
    """The ports that are listened on with these options."""
    names = ["nats", "metrics", *service_names(options)]
    return [*names, "xds", "control_plane"] if options.config_dir else names


def specs(instance: Instance, options: Options) -> list[Spec]:
    """The processes, in the order of starting; none needs another to be there first."""
    found = [
        Spec(
            "nats",
            [str(broker.find_server()), "-c", str(broker.write_configuration(instance))],
            {},
            instance.log("nats"),
        )
    ]
    if options.config_dir is not None:
        found.append(
            _spec(
                instance, options, "control_plane", "pykmesh.controlplane", _control_plane(instance, options)
            )
        )
    services = ((name, _service(instance, options, name)) for name in service_names(options))
    found += [_spec(instance, options, name, f"services.{name}", settings) for name, settings in services]
    return found


def check_settings(instance: Instance, options: Options) -> None:
    """SettingsError, naming the process, for what it would end by at once."""
    found = {name: _service(instance, options, name) for name in service_names(options)}
    if options.config_dir is not None:
        found["control_plane"] = _control_plane(instance, options)
    for name, settings in found.items():
        try:
            load(type(settings), {**to_environment(settings), **options.settings})
        except SettingsError as error:
            raise SettingsError(f"{name}: {error}") from error


def _spec(instance: Instance, options: Options, name: str, module: str, settings: CommonSettings) -> Spec:
    environment = {**to_environment(settings), **options.settings}
    return Spec(name, python(module), environment, instance.log(name), settings.admin_port)


def _common(instance: Instance, options: Options, name: str) -> dict[str, object]:
    return {
        "instance": instance.name,
        "pin_dir": instance.pin_dir,
        "nats_url": f"nats://127.0.0.1:{instance.ports.nats}",
        "nats_password_file": instance.secret(name) if name in broker.PERMISSIONS else None,
        "admin_port": getattr(instance.ports, name),
        "log_level": options.log_level,
        "otlp_endpoint": options.otlp_endpoint,
        "network": options.network,
    }


def _service(instance: Instance, options: Options, name: str) -> CommonSettings:
    common = _common(instance, options, name)
    if name == "xds_client":
        return XdsClientSettings(
            **common,  # type: ignore[arg-type]  # names and kinds are those of CommonSettings
            xds_address=options.xds_address or f"127.0.0.1:{instance.ports.xds}",
            xds_root_cert=options.xds_root_cert,
            xds_token_file=options.xds_token_file,
            xds_server_name=options.xds_server_name,
            node_name=options.node_name,
            namespace=options.namespace,
            cluster_id=options.cluster_id,
        )
    if name == "map_writer":
        return MapWriterSettings(
            **common,  # type: ignore[arg-type]
            node_name=options.node_name,
            cluster_id=options.cluster_id,
            refuse_unenforced_policy=options.refuse_unenforced_policy,
            mesh_key_file=options.mesh_key_file,
        )
    if name == "telemetry":
        return TelemetrySettings(**common, metrics_port=instance.ports.metrics)  # type: ignore[arg-type]
    if name == DNS:
        return DnsProxySettings(**common, enroll_socket=instance.enroll_socket)  # type: ignore[arg-type]
    if name == WAYPOINTS:
        return WaypointMgrSettings(
            **common,  # type: ignore[arg-type]
            enroll_socket=instance.enroll_socket,
            config_dir=options.config_dir or Path(),
            waypoints_dir=instance.waypoints_dir,
            envoys_dir=instance.envoys_dir,
            waypoint_cgroup=waypoints.cgroup(instance, options.cgroup_root or find_root()),
            waypoint_address=options.waypoint_address,
            waypoint_netns=options.waypoint_netns,
            kubeconfig=options.kubeconfig,
            node_name=options.node_name,
        )
    return LoaderSettings(
        **common,  # type: ignore[arg-type]
        enroll_socket=instance.enroll_socket,
        cgroup_root=options.cgroup_root,
    )


def _control_plane(instance: Instance, options: Options) -> CommonSettings:
    return ControlPlaneSettings(
        **_common(instance, options, "control_plane"),  # type: ignore[arg-type]
        config_dir=options.config_dir or Path(),
        waypoints_dir=instance.waypoints_dir,
        listen_port=instance.ports.xds,
        cluster_id=options.cluster_id,
    )
