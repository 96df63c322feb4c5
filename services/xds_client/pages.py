"""What `pykmesh get --from xds` reads: the accepted resources, decoded as they were sent.

Accepting checks what decides traffic. A resource whose other parts cannot be read is shown with an `error`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import anyio.to_thread
from google.protobuf.json_format import Error, MessageToDict
from google.protobuf.message import DecodeError

from pykmesh.admin import Admin, Page, Query, as_json
from pykmesh.contracts.address import FieldError, decode_policy
from pykmesh.contracts.bulk import MANY, decode_addresses
from pykmesh.contracts.digest import digest
from pykmesh.contracts.messages import ResourceType
from pykmesh.kernel.records import ip_from_wire, ip_to_text
from pykmesh.proto.authorization_pb2 import Authorization
from pykmesh.proto.workload_pb2 import Address, AddressOutline, Extension
from services.xds_client.config_dump import config_dump
from services.xds_client.store import Held, Store

LONG_DEADLINE_S: Final = 120.0
_Held = dict[ResourceType, dict[str, Held]]


def add_pages(admin: Admin, store: Store, refused: Callable[[], Mapping[str, str]]) -> None:
    """What is long is made in a thread, of what is held when it is asked for. `refused`: for want of room."""

    async def of_now(look: Callable[[_Held], Any], _: Query) -> Page:
        held = {kind: found.copy() for kind, found in store.held.items()}
        return await anyio.to_thread.run_sync(_shown, look, held)

    def digests(held: _Held) -> dict[str, Any]:
        return {"settled": store.synced, "resources": _digests(held)}

    for path, look in (
        ("/services", partial(_of_kind, "service")),
        ("/workloads", partial(_of_kind, "workload")),
        ("/policies", _policies),
        ("/digests", digests),
        ("/config_dump", config_dump),
    ):
        admin.route(path, partial(of_now, look), LONG_DEADLINE_S)
    admin.page("/rejected", lambda: _rejected(store, refused()))


def _shown(look: Callable[[_Held], Any], held: _Held) -> Page:
    return as_json(look(held))


def _rejected(store: Store, refused: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Why a name is not as the control plane said it last, by type: it was no good, or does not fit."""
    found = {kind.name: found.copy() for kind, found in store.rejected.items()}
    found[ResourceType.ADDRESS.name] = {**refused, **found[ResourceType.ADDRESS.name]}
    return found


def _digests(held: _Held) -> dict[str, dict[str, str]]:
    """What `pykmesh diff` compares with what map_writer holds."""
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
    return {ResourceType.ADDRESS.name: addresses, ResourceType.AUTHORIZATION.name: policies}


def _of_kind(kind: str, held: _Held) -> list[dict[str, Any]]:
    found = []
    for name, resource in sorted(held[ResourceType.ADDRESS].items()):
        of_kind, shown = _decoded(resource.value)
        if of_kind == kind:
            found.append({"resource": name, "version": resource.version, **shown})
    return found


def _policies(held: _Held) -> list[dict[str, Any]]:
    """With their rules, which nobody enforces yet."""
    return [
        {"resource": name, "version": resource.version, **_policy(Authorization.FromString(resource.value))}
        for name, resource in sorted(held[ResourceType.AUTHORIZATION].items())
    ]


def _policy(message: Authorization) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


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
    addresses = {"addresses": _addresses(message)}
    extensions = {"extensions": [_extension(each) for each in part.extensions]} if part.extensions else {}
    del part.extensions[:]
    return MessageToDict(part, preserving_proto_field_name=True) | addresses | extensions


def _extension(found: Extension) -> dict[str, Any]:
    """One of a type that is not known here, or that JSON cannot say, by its bytes."""
    try:
        return MessageToDict(found, preserving_proto_field_name=True)
    except (TypeError, ValueError, DecodeError, Error):
        value = base64.b64encode(found.config.value).decode()
        return {"name": found.name, "config": {"@type": found.config.type_url, "value": value}}


def _outlined(outline: AddressOutline, error: str) -> dict[str, Any]:
    """As far as it can be read."""
    part = outline.workload if outline.WhichOneof("type") == "workload" else outline.service
    return {"namespace": part.namespace, "addresses": _addresses(outline), "error": error}


def _addresses(message: Address | AddressOutline) -> list[str]:
    if message.WhichOneof("type") == "workload":
        return [ip_to_text(ip_from_wire(address)) for address in message.workload.addresses]
    return [
        f"{a.network}/{ip_to_text(ip_from_wire(a.address))}"
        + (f"/{a.length}" if a.HasField("length") else "")
        for a in message.service.addresses
    ]
