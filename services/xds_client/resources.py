"""The resources of a response, from their bytes: many at a time, by columns, where they are ordinary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from pykmesh.contracts.bulk import FEWEST
from pykmesh.contracts.wire import Buffer, Spans
from pykmesh.proto.discovery_pb2 import Resource

_ANY_TYPE_URL, _ANY_VALUE = 1, 2


class Unwrapped(NamedTuple):
    """What the control plane wrapped, column by column; `broken` says why the one at an index is none."""

    names: list[str]
    versions: list[str]
    type_urls: list[str]
    values: list[bytes]
    broken: dict[int, str]


def unwrap(resources: Sequence[bytes]) -> Unwrapped:
    """In their order."""
    found = _by_columns(resources) if len(resources) >= FEWEST else None
    return _one_by_one(resources) if found is None else found


def _one_by_one(resources: Sequence[bytes]) -> Unwrapped:
    found = Unwrapped([], [], [], [], {})
    for index, data in enumerate(resources):
        resource = Resource()
        try:
            resource.ParseFromString(data)
        except DecodeError as error:
            found.broken[index] = f"not a Resource message: {error}"
            resource.Clear()
        found.names.append(resource.name)
        found.versions.append(resource.version)
        found.type_urls.append(resource.resource.type_url)
        found.values.append(resource.resource.value)
    return found


def _by_columns(resources: Sequence[bytes]) -> Unwrapped | None:
    """None where any of them is odd, or has a field twice, or a text that is none, or may have one."""
    buffer = Buffer(resources)
    outer = buffer.fields(buffer.spans)
    inner = buffer.fields(outer.spans(Resource.RESOURCE_FIELD_NUMBER))
    if outer.odd.any() or inner.odd.any() or outer.counts(Resource.ALIASES_FIELD_NUMBER).any():
        return None
    once = [(outer, Resource.VERSION_FIELD_NUMBER), (outer, Resource.RESOURCE_FIELD_NUMBER)]
    once += [(outer, Resource.NAME_FIELD_NUMBER), (inner, _ANY_TYPE_URL), (inner, _ANY_VALUE)]
    if any((found.counts(field) > 1).any() for found, field in once):
        return None
    try:
        return Unwrapped(
            list(map(bytes.decode, buffer.parts(outer.spans(Resource.NAME_FIELD_NUMBER)))),
            list(map(bytes.decode, buffer.parts(outer.spans(Resource.VERSION_FIELD_NUMBER)))),
            _texts(buffer, inner.spans(_ANY_TYPE_URL)),
            list(buffer.parts(inner.spans(_ANY_VALUE))),
            {},
        )
    except UnicodeDecodeError:
        return None


def _texts(buffer: Buffer, spans: Spans) -> list[str]:
    """Where all may be the same."""
    found = buffer.distinct(spans)
    if len(found) == 1:
        return [found.pop().decode()] * len(spans.start)
    return list(map(bytes.decode, buffer.parts(spans)))
