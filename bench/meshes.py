"""Meshes of any size, resource by resource as istiod writes them (about 380 bytes each)."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterator

from pykmesh.contracts.messages import TYPE_URLS, ResourceType
from pykmesh.kernel.records import SERVICE_KEY, ip_from_wire, port_bytes
from pykmesh.proto import discovery_pb2, workload_pb2

ADDRESS_URL = TYPE_URLS[ResourceType.ADDRESS]
_POD_BASE = int(ipaddress.ip_address("11.0.0.0"))
_VIP_BASE = int(ipaddress.ip_address("10.96.0.0"))
KINDS = ("plain", "policy", "near", "dual")
"""What all pods have: nothing more; the policy of a PeerAuthentication for all; a service that prefers near
endpoints (PreferClose), while the node does not know where it is, so that all are as near; an address of
IPv6 beside, with services of IPv4.
"""


def _resource(name: str, address: workload_pb2.Address) -> discovery_pb2.Resource:
    value = address.SerializeToString()
    version = hashlib.blake2b(value, digest_size=8).hexdigest()
    found = discovery_pb2.Resource(name=name, version=version)
    found.resource.type_url, found.resource.value = ADDRESS_URL, value
    return found


def service_name(number: int) -> str:
    return f"scale-{number % 50}/svc-{number:05}.scale-{number % 50}.svc.cluster.local"


def pod_uid(service: int, pod: int) -> str:
    return f"Kubernetes//Pod/scale-{service % 50}/svc-{service:05}-7d9f8b6c5-{pod:05}"


def service(number: int, kind: str = "plain") -> discovery_pb2.Resource:
    namespace = f"scale-{number % 50}"
    address = workload_pb2.Address()
    found = address.service
    found.name, found.namespace = f"svc-{number:05}", namespace
    found.hostname = f"svc-{number:05}.{namespace}.svc.cluster.local"
    found.addresses.add(address=(_VIP_BASE + number).to_bytes(4, "big"))
    found.ports.add(service_port=80, target_port=8080, app_protocol=1)
    found.ip_families, found.canonical = 1, True
    if kind == "near":
        found.load_balancing.mode = 2
        found.load_balancing.routing_preference.extend([6, 1, 2])
    return _resource(service_name(number), address)


def service_key(number: int) -> bytes:
    """Of its port in the kernel's map."""
    ip = ip_from_wire((_VIP_BASE + number).to_bytes(4, "big"))
    return SERVICE_KEY.pack(ip, 0, port_bytes(80))


def workload(
    service: int, pod: int, address: int, kind: str = "plain", *, healthy: bool = True
) -> discovery_pb2.Resource:
    namespace = f"scale-{service % 50}"
    message = workload_pb2.Address()
    found = message.workload
    found.uid = pod_uid(service, pod)
    found.name, found.namespace = found.uid.rpartition("/")[2], namespace
    found.addresses.append((_POD_BASE + address).to_bytes(4, "big"))
    found.tunnel_protocol, found.service_account = 1, "default"
    found.node, found.cluster_id = f"node-{address % 100}", "Kubernetes"
    found.canonical_name, found.canonical_revision = f"svc-{service:05}", "v1"
    found.workload_type, found.workload_name = 2, f"svc-{service:05}"
    found.services[service_name(service)].ports.add(service_port=80, target_port=8080)
    found.locality.region, found.locality.zone = "eu-central", f"eu-central-{address % 3}"
    found.status = 0 if healthy else 1
    if kind == "policy":
        found.authorization_policies.append("istio-system/istio_converted_static_strict")
    if kind == "dual":
        found.addresses.append(b"\xfd" + bytes(11) + (address + 1).to_bytes(4, "big"))
    return _resource(found.uid, message)


def mesh(services: int, pods: int, kind: str = "plain") -> Iterator[discovery_pb2.Resource]:
    """`pods` pods for each service; the pod's address is its number."""
    for number in range(services):
        yield service(number, kind)
        for pod in range(pods):
            yield workload(number, pod, number * pods + pod, kind)


def response(resources: list[discovery_pb2.Resource], nonce: str, removed: tuple[str, ...] = ()) -> bytes:
    return discovery_pb2.DeltaDiscoveryResponse(
        type_url=ADDRESS_URL, nonce=nonce, resources=resources, removed_resources=removed
    ).SerializeToString()
