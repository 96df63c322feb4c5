"""A connection to the control plane: address, TLS and token, node identity."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from pykmesh import __version__
from pykmesh.contracts.settings import XdsClientSettings
from pykmesh.proto import discovery_pb2

METHOD: Final = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
Stream = grpc.aio.StreamStreamCall[discovery_pb2.DeltaDiscoveryRequest, bytes]


class CredentialsError(Exception):
    """A root certificate or token that cannot be read; the text names the file."""


def node_name(settings: XdsClientSettings) -> str:
    return settings.node_name or socket.gethostname()


def node(settings: XdsClientSettings) -> discovery_pb2.Node:
    """The identity that istiod wants: a ztunnel, four parts, metadata in strings (xds.md 2.3)."""
    pod = settings.pod_name or f"pykmesh-{node_name(settings)}"
    domain = f"{settings.namespace}.svc.cluster.local"
    found = discovery_pb2.Node(
        id=f"ztunnel~{settings.node_ip}~{pod}.{settings.namespace}~{domain}",
        user_agent_name=f"pykmesh/{__version__}",
    )
    metadata = {
        "NAME": pod,
        "NAMESPACE": settings.namespace,
        "INSTANCE_IPS": settings.node_ip,
        "NODE_NAME": node_name(settings),
        "CLUSTER_ID": settings.cluster_id,
        "NETWORK": settings.network,
        "SERVICE_ACCOUNT": settings.service_account,
    }
    found.metadata.update({name: value for name, value in metadata.items() if value})
    return found


def open_channel(settings: XdsClientSettings) -> grpc.aio.Channel:
    """Raises CredentialsError. Connects when it is used."""
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if settings.xds_root_cert is None:
        return grpc.aio.insecure_channel(settings.xds_address, options)
    if settings.xds_server_name:
        options.append(("grpc.ssl_target_name_override", settings.xds_server_name))
    roots = _read(settings.xds_root_cert, "root certificate")
    if b"-----BEGIN CERTIFICATE-----" not in roots:
        raise CredentialsError(f"root certificate {settings.xds_root_cert}: no certificate in PEM")
    return grpc.aio.secure_channel(settings.xds_address, grpc.ssl_channel_credentials(roots), options)


def open_stream(channel: grpc.aio.Channel, settings: XdsClientSettings) -> Stream:
    """Reads the token anew: it rotates. Responses come as bytes."""
    method: Any = channel.stream_stream(
        METHOD,
        request_serializer=discovery_pb2.DeltaDiscoveryRequest.SerializeToString,
        response_deserializer=None,
    )
    metadata = [("clusterid", settings.cluster_id)]
    if settings.xds_token_file is not None:
        _check_secrecy(settings)
        token = _read(settings.xds_token_file, "token").decode("ascii", errors="replace").strip()
        if not (token and token.isascii() and token.isprintable()):
            raise CredentialsError(f"token {settings.xds_token_file}: not one line of ASCII")
        metadata.append(("authorization", f"Bearer {token}"))
    stream: Stream = method(metadata=metadata)
    return stream


def _check_secrecy(settings: XdsClientSettings) -> None:
    """CredentialsError when the token would leave the node in plaintext."""
    if settings.xds_root_cert is None and not _is_this_host(settings.xds_address):
        raise CredentialsError(
            f"the token of {settings.xds_token_file} would go to {settings.xds_address} in plaintext: "
            f"give the root certificate (--xds-root-cert)"
        )


def _is_this_host(address: str) -> bool:
    """Whether what is sent to `host:port` stays here. A name says so only by being localhost."""
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"{what} {path}: {error.strerror}") from error
