"""What `pykmesh get --from xds` reads: the accepted resources, decoded as they were sent."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict

from pykmesh.admin import Admin
from pykmesh.contracts.messages import ResourceType
from pykmesh.kernel.records import ip_from_wire, ip_to_text
from pykmesh.proto.workload_pb2 import Address
from services.xds_client.store import Store


def add_pages(admin: Admin, store: Store) -> None:
    admin.page("/services", lambda: _of_kind(store, "service"))
    admin.page("/workloads", lambda: _of_kind(store, "workload"))


def _of_kind(store: Store, kind: str) -> list[dict[str, Any]]:
    found = []
    for name, held in sorted(store.held[ResourceType.ADDRESS].items()):
        message = Address.FromString(held.value)
        if message.WhichOneof("type") == kind:
            found.append({"resource": name, "version": held.version, **_readable(message)})
    return found


def _readable(message: Address) -> dict[str, Any]:
    """The message as JSON has it, with addresses as people write them."""
    if message.WhichOneof("type") == "workload":
        found = MessageToDict(message.workload, preserving_proto_field_name=True)
        found["addresses"] = [ip_to_text(ip_from_wire(a)) for a in message.workload.addresses]
        return found
    found = MessageToDict(message.service, preserving_proto_field_name=True)
    found["addresses"] = [
        f"{a.network}/{ip_to_text(ip_from_wire(a.address))}" for a in message.service.addresses
    ]
    return found
