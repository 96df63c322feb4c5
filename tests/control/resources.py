"""Resources as a control plane sends them, from a few words."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

from pykmesh.proto import authorization_pb2, discovery_pb2, workload_pb2
from tests.control.scripted_ads import AUTHORIZATION, resource

Resource = discovery_pb2.Resource


def host(name: str, namespace: str = "shop") -> str:
    """The resource name of a service."""
    return f"{namespace}/{name}.{namespace}.svc.cluster.local"


def uid(name: str, namespace: str = "shop") -> str:
    """The resource name of a pod."""
    return f"Kubernetes//Pod/{namespace}/{name}"


def service_message(
    name: str, *vips: str, ports: Mapping[int, int] | None = None, namespace: str = "shop"
) -> workload_pb2.Address:
    message = workload_pb2.Address()
    found = message.service
    found.name, found.namespace = name, namespace
    found.hostname = f"{name}.{namespace}.svc.cluster.local"
    for vip in vips:
        found.addresses.add(address=ipaddress.ip_address(vip).packed)
    for port, target in (ports or {80: 8080}).items():
        found.ports.add(service_port=port, target_port=target)
    return message


def pod_message(
    name: str,
    *addresses: str,
    services: Sequence[str] = (),
    policies: Sequence[str] = (),
    namespace: str = "shop",
    healthy: bool = True,
) -> workload_pb2.Address:
    message = workload_pb2.Address()
    found = message.workload
    found.uid, found.name, found.namespace = uid(name, namespace), name, namespace
    found.addresses.extend(ipaddress.ip_address(address).packed for address in addresses)
    found.authorization_policies.extend(policies)
    found.status = workload_pb2.HEALTHY if healthy else workload_pb2.UNHEALTHY
    for service in services:
        found.services[host(service, namespace)].ports.add(service_port=80, target_port=8080)
    return message


def service(name: str, *vips: str, ports: Mapping[int, int] | None = None) -> Resource:
    return resource(host(name), service_message(name, *vips, ports=ports).SerializeToString())


def pod(
    name: str,
    *addresses: str,
    services: Sequence[str] = (),
    policies: Sequence[str] = (),
    healthy: bool = True,
) -> Resource:
    message = pod_message(name, *addresses, services=services, policies=policies, healthy=healthy)
    return resource(uid(name), message.SerializeToString(deterministic=True))


def broken_locality(name: str, *addresses: str) -> Resource:
    """A pod with a locality that is none, which decides no traffic."""
    value = pod_message(name, *addresses).workload.SerializeToString() + b"\xc2\x01\x01\xff"
    return resource(uid(name), b"\x0a" + _varint(len(value)) + value)


def policy(name: str, namespace: str = "shop", padding: int = 0) -> Resource:
    message = authorization_pb2.Authorization(
        name=name, namespace=namespace, scope=authorization_pb2.WORKLOAD_SELECTOR
    )
    value = message.SerializeToString() + unknown_field(padding)
    return resource(f"{namespace}/{name}", value, AUTHORIZATION)


def unknown_field(size: int) -> bytes:
    """A field that nobody knows (number 1000), which a reader passes over, of about `size` bytes."""
    if not size:
        return b""
    return b"\xc2\x3e" + _varint(size) + bytes(size)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
