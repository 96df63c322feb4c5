"""Delta ADS as a client must speak it. Pure: messages in, messages out.

Rules: one ACK or NACK for each response, with its nonce and nothing else; subscriptions in requests
of their own; the versions of all that is held on a new stream, where they fit a request; a type's first
response counts even when it is empty (envoy xds_protocol, and what istiod insists on).
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from google.protobuf.message import DecodeError

from pykmesh.contracts.address import FieldError, decode_policy
from pykmesh.contracts.bulk import names_of
from pykmesh.contracts.messages import NO_NAME, TYPE_URLS, ResourceType
from pykmesh.proto import discovery_pb2
from services.xds_client.resources import Unwrapped, unwrap
from services.xds_client.store import Held, Store

INVALID_ARGUMENT: Final = 3
DETAIL_CHARACTERS: Final = 4000
RESOURCE_BYTES_MAX: Final = 4 * 1024 * 1024
PART_RESOURCES: Final = 4096
FEW, FEW_BYTES = 512, 256 * 1024
SLICE_BYTES: Final = 64 * 1024 * 1024
_LENGTH_DELIMITED: Final = 2
_VARINT_BITS: Final = 64
_TYPES: Final = {url: kind for kind, url in TYPE_URLS.items()}
Request = discovery_pb2.DeltaDiscoveryRequest
Response = discovery_pb2.DeltaDiscoveryResponseOutline


def _check(kind: ResourceType, names: list[str], values: list[bytes]) -> list[FieldError | None]:
    """What is wrong with each: also a message of another name, which its removal would never find."""
    if kind is ResourceType.AUTHORIZATION:
        return list(map(_check_policy, names, values))
    owners = names_of(values)
    if owners == names:
        return [None] * len(names)
    return [None if own == name else _misnamed(own) for name, own in zip(names, owners, strict=True)]


def _misnamed(own: str | FieldError) -> FieldError:
    return own if isinstance(own, FieldError) else FieldError("name", f"the message is of {own}")


def _check_policy(name: str, value: bytes) -> FieldError | None:
    try:
        decode_policy(name, value)
    except FieldError as error:
        return error
    return None


class Reading:
    """A response while it is read: a part at a time, each resource checked by itself.

    A bad resource is rejected by name and leaves its neighbours alone.
    """

    def __init__(self, response: Response, *, is_whole: bool = False, is_first: bool = False) -> None:
        """`is_whole`: the response is all that there is of its type, and names nothing that is gone.

        `is_first`: of its type on the stream: all that differs from what is held is in it.
        Raises UnknownTypeError; the response is then to be answered with a NACK for its own type.
        """
        kind = _TYPES.get(response.type_url)
        if kind is None:
            raise UnknownTypeError(response.type_url)
        self.type = kind
        self.type_url = response.type_url
        self.nonce = response.nonce
        self.is_whole = is_whole
        self._is_first = is_first or is_whole
        self.removed = list(response.removed_resources)
        self.names: dict[str, None] = {}
        self.rejected: dict[str, str] = {}
        self._resources: Sequence[bytes] = response.resources
        self.is_large = len(self._resources) > FEW or sum(map(len, self._resources)) > FEW_BYTES
        """Reading it takes long enough to be left to a thread."""

    def parts(self) -> Iterator[list[tuple[str, Held]]]:
        """What is good, `PART_RESOURCES` at a time, so that other work has its turn in between."""
        resources, self._resources = self._resources, []
        for first in range(0, len(resources), PART_RESOURCES):
            yield self._part(resources[first : first + PART_RESOURCES])

    def absent(self, held: Iterable[str]) -> list[str]:
        """What is held, and not in a whole response, which has been read to its end.

        What was rejected is not gone. Nothing is while a resource has no name: it may be any of them.
        """
        if not self.is_whole or "" in self.names:
            return []
        return [name for name in held if name not in self.names]

    @property
    def says_all(self) -> bool:
        """That differs from what is held, of a response that was read to its end."""
        return self._is_first and "" not in self.names

    def unspoken(self, rejected: Iterable[str], held: Container[str]) -> list[str]:
        """What was rejected and is not held, and is no more: its removal is told to nobody."""
        if not self.says_all:
            return []
        return [name for name in rejected if name not in self.names and name not in held]

    def _part(self, resources: Sequence[bytes]) -> list[tuple[str, Held]]:
        found = unwrap(resources)
        names, values = found.names, found.values
        faults = self._faults(found)
        errors = _check(self.type, names, values)
        upserts = list(zip(names, map(Held, found.versions, values), strict=True))
        if not faults and not any(errors):
            return upserts
        good = []
        for index, (upsert, error) in enumerate(zip(upserts, errors, strict=True)):
            fault = faults.get(index) or error
            if fault is None:
                good.append(upsert)
            else:
                self.rejected[upsert[0] or NO_NAME] = sys.intern(str(fault))  # often the same of many
        return good

    def _faults(self, found: Unwrapped) -> dict[int, FieldError]:
        """What is wrong with the wrapping, by index. Takes the names."""
        names, urls, values = found.names, found.type_urls, found.values
        before = len(self.names)
        self.names.update(dict.fromkeys(names))
        if (
            not found.broken
            and "" not in self.names
            and len(self.names) == before + len(names)
            and set(urls) <= {self.type_url}
            and max(map(len, values), default=0) <= RESOURCE_BYTES_MAX
        ):
            return {}
        faults: dict[int, FieldError] = {}
        seen = set(islice(self.names, before))
        for index, (name, url, value) in enumerate(zip(names, urls, values, strict=True)):
            if index in found.broken:
                faults[index] = FieldError("", found.broken[index])
            elif not name:
                faults[index] = FieldError("name", "empty")
            elif name in seen:
                faults[index] = FieldError("name", "twice in one response")
            elif url != self.type_url:
                faults[index] = FieldError("resource.type_url", f"{url!r} in a response of {self.type_url!r}")
            elif len(value) > RESOURCE_BYTES_MAX:
                faults[index] = FieldError("resource", f"{len(value)} bytes, more than {RESOURCE_BYTES_MAX}")
            seen.add(name)
        return faults


class UnknownTypeError(Exception):
    """A response of a type that was not asked for; the argument is the type."""


def first_requests(node: discovery_pb2.Node, store: Store, bytes_max: int) -> Iterator[Request]:
    """What opens a stream: each type, with the versions of what is held; the node is in the first.

    A request that would be larger than `bytes_max` names no versions. The control plane then sends the
    type's whole state, but not what is gone of it.
    """
    for kind, url in TYPE_URLS.items():
        request = Request(type_url=url, initial_resource_versions=store.versions(kind))
        if kind is ResourceType.ADDRESS:
            request.node.CopyFrom(node)
        if request.ByteSize() > bytes_max:
            request.initial_resource_versions.clear()
        yield request


def types_unnamed(requests: Iterable[Request], store: Store) -> set[str]:
    """Types of which something is held that their first request does not name."""
    return {
        request.type_url
        for request in requests
        if store.held[_TYPES[request.type_url]] and not request.initial_resource_versions
    }


def answer(type_url: str, nonce: str, rejected: dict[str, str]) -> Request:
    """ACK, or NACK naming each resource and why."""
    request = Request(type_url=type_url, response_nonce=nonce)
    if rejected:
        detail = "; ".join(f"{name}: {why}" for name, why in rejected.items())
        request.error_detail.code = INVALID_ARGUMENT
        request.error_detail.message = detail[:DETAIL_CHARACTERS]
    return request


def parse(data: bytes, slice_bytes: int = SLICE_BYTES) -> Response:
    """Raises DecodeError with what is wrong. In slices, between which other threads have their turn."""
    found = Response()
    try:
        for part in _slices(data, slice_bytes):
            found.MergeFromString(part)  # type: ignore[arg-type]  # a memoryview will do
    except DecodeError as error:
        raise DecodeError(f"a response that is no DeltaDiscoveryResponse: {error}") from error
    return found


def _slices(data: bytes, slice_bytes: int) -> Iterator[memoryview | bytes]:
    """Whole fields, about so many bytes at a time: merged, they are the message.

    What does not look like strings and messages is left to the parser, with all that follows.
    """
    if len(data) <= slice_bytes:
        yield data
        return
    view = memoryview(data)
    first = at = 0
    while at < len(data):
        if at - first >= slice_bytes:
            yield view[first:at]
            first = at
        if data[at] & 0x87 != _LENGTH_DELIMITED:  # the tag of another kind, or of a field above 15
            break
        at += 1
        length = shift = 0
        while at < len(data) and data[at] > 0x7F and shift < _VARINT_BITS:
            length |= (data[at] & 0x7F) << shift
            shift += 7
            at += 1
        if at < len(data):
            at += 1 + (length | data[at] << shift)
    yield view[first:]
