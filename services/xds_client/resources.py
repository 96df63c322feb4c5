"""The resources of a response, from their bytes: many at a time, by columns, where they are ordinary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from pykmesh.contracts.bulk import FEWEST
from pykmesh.contracts.wire import Buffer
from pykmesh.proto.discovery_pb2 import Resource

_ANY_TYPE_URL, _ANY_VALUE = 1, 2


class Received(NamedTuple):
    """A resource as the control plane wrapped it; `broken` says why it cannot be unwrapped."""

    name: str
    version: str
    type_url: str
    value: bytes
    broken: str = ""


def unwrap(resources: Sequence[bytes]) -> list[Received]:
    """In their order."""
    found = _by_columns(resources) if len(resources) >= FEWEST else None
    return [_unwrap(data) for data in resources] if found is None else found


def _unwrap(data: bytes) -> Received:
    try:
        resource = Resource.FromString(data)
    except DecodeError as error:
        return Received("", "", "", b"", f"not a Resource message: {error}")
    return Received(resource.name, resource.version, resource.resource.type_url, resource.resource.value)


def _by_columns(resources: Sequence[bytes]) -> list[Received] | None:
    """None where any of them is odd, or has a field twice, or a text that is none, or may have one."""
    buffer = Buffer(resources)
    outer = buffer.fields(buffer.spans)
    wrapped = outer.spans(Resource.RESOURCE_FIELD_NUMBER)
    inner = buffer.fields(wrapped)
    wrappings, _ = outer.repeated(Resource.RESOURCE_FIELD_NUMBER)
    aliases, _ = outer.repeated(Resource.ALIASES_FIELD_NUMBER)
    if outer.odd.any() or inner.odd.any() or (wrappings > 1).any() or aliases.any():
        return None
    columns: tuple[Iterable[bytes], ...] = (
        buffer.parts(outer.spans(Resource.NAME_FIELD_NUMBER)),
        buffer.parts(outer.spans(Resource.VERSION_FIELD_NUMBER)),
        buffer.parts(inner.spans(_ANY_TYPE_URL)),
    )
    try:
        names, versions, urls = (map(bytes.decode, column) for column in columns)
        return list(map(Received, names, versions, urls, buffer.parts(inner.spans(_ANY_VALUE))))
    except UnicodeDecodeError:
        return None
