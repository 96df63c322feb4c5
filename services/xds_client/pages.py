"""What `pykmesh get --from xds` reads: the accepted resources, decoded as they were sent.

Accepting checks what decides traffic. A resource whose other parts cannot be read is shown with an `error`.
"""

from __future__ import annotations

from typing import Any, Final

import anyio.to_thread
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

from pykmesh.admin import Admin, Page, Query, as_json
from pykmesh.contracts.address import FieldError, decode_policy
from pykmesh.contracts.bulk import MANY, decode_addresses
from pykmesh.contracts.digest import digest
from pykmesh.contracts.messages import ResourceType
from pykmesh.kernel.records import ip_from_wire, ip_to_text
from pykmesh.proto.workload_pb2 import Address, AddressOutline
from services.xds_client.store import Held, Store

LONG_DEADLINE_S: Final = 120.0


def add_pages(admin: Admin, store: Store) -> None:
    async def digests(_: Query) -> Page:
        held = {kind: dict(found) for kind, found in store.held.items()}
        return await anyio.to_thread.run_sync(_digests, store.synced, held)

    admin.route("/digests", digests, LONG_DEADLINE_S)
    admin.page("/services", lambda: _of_kind(store, "service"))
    admin.page("/workloads", lambda: _of_kind(store, "workload"))


def _digests(synced: bool, held: dict[ResourceType, dict[str, Held]]) -> Page:
    """What `pykmesh diff` compares with what map_writer holds: long, so for a thread."""
    policies = {
        name: digest(decode_policy(name, found.value))
        for name, found in held[ResourceType.AUTHORIZATION].items()
    }
    addresses: dict[str, str] = {}
    of_addresses = list(held[ResourceType.ADDRESS].items())
    for first in range(0, len(of_addresses), MANY):
        part = of_addresses[first : first + MANY]
        values = [found.value for _, found in part]
        for (name, _), value, found in zip(part, values, decode_addresses(values), strict=True):
            addresses[name] = digest(value if isinstance(found, FieldError) else found)
    return as_json(
        {
            "settled": synced,
            "resources": {
                ResourceType.ADDRESS.name: addresses,
                ResourceType.AUTHORIZATION.name: policies,
            },
        }
    )


def _of_kind(store: Store, kind: str) -> list[dict[str, Any]]:
    found = []
    for name, held in sorted(store.held[ResourceType.ADDRESS].items()):
        of_kind, shown = _decoded(held.value)
        if of_kind == kind:
            found.append({"resource": name, "version": held.version, **shown})
    return found


def _decoded(value: bytes) -> tuple[str | None, dict[str, Any]]:
    """The kind of a resource, and what is shown of it."""
    try:
        message = Address.FromString(value)
    except DecodeError as error:
        outline = AddressOutline.FromString(value)
        return outline.WhichOneof("type"), _outlined(outline, f"not an Address message: {error}")
    return message.WhichOneof("type"), _readable(message)


def _readable(message: Address) -> dict[str, Any]:
    """The message as JSON has it, with addresses as people write them."""
    part = message.workload if message.WhichOneof("type") == "workload" else message.service
    return MessageToDict(part, preserving_proto_field_name=True) | {"addresses": _addresses(message)}


def _outlined(outline: AddressOutline, error: str) -> dict[str, Any]:
    """As far as it can be read."""
    part = outline.workload if outline.WhichOneof("type") == "workload" else outline.service
    return {"namespace": part.namespace, "addresses": _addresses(outline), "error": error}


def _addresses(message: Address | AddressOutline) -> list[str]:
    if message.WhichOneof("type") == "workload":
        return [ip_to_text(ip_from_wire(address)) for address in message.workload.addresses]
    return [f"{a.network}/{ip_to_text(ip_from_wire(a.address))}" for a in message.service.addresses]
