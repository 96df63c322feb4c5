"""Delta ADS as a client must speak it. Pure: messages in, messages out.

Rules: one ACK or NACK for each response, with its nonce and nothing else; subscriptions in requests
of their own; the versions of all that is held on a new stream; a type's first response counts even
when it is empty (envoy xds_protocol, and what istiod insists on).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from pykmesh.contracts.address import FieldError, decode_address, decode_policy
from pykmesh.contracts.messages import TYPE_URLS, ResourceType
from pykmesh.proto import discovery_pb2
from services.xds_client.store import Held, Store

INVALID_ARGUMENT: Final = 3
DETAIL_CHARACTERS: Final = 4000
RESOURCE_BYTES_MAX: Final = 4 * 1024 * 1024
_TYPES: Final = {url: kind for kind, url in TYPE_URLS.items()}
_DECODERS: Final = {
    ResourceType.ADDRESS: lambda _, value: decode_address(value),
    ResourceType.AUTHORIZATION: decode_policy,
}

Request = discovery_pb2.DeltaDiscoveryRequest
Response = discovery_pb2.DeltaDiscoveryResponse


class Accepted(NamedTuple):
    """What is good in a response, and what is not (by name)."""

    type: ResourceType
    nonce: str
    removed: list[str]
    upserts: list[tuple[str, Held]]
    rejected: dict[str, str]


class UnknownTypeError(Exception):
    """A response of a type that was not asked for."""


def first_requests(node: discovery_pb2.Node, store: Store) -> Iterator[Request]:
    """What opens a stream: each type, with the versions of what is held; the node is in the first."""
    for kind, url in TYPE_URLS.items():
        request = Request(type_url=url, initial_resource_versions=store.versions(kind))
        if kind is ResourceType.ADDRESS:
            request.node.CopyFrom(node)
        yield request


def read(response: Response) -> Accepted:
    """Checks every resource by itself: a bad one leaves its neighbours alone.

    Raises UnknownTypeError; the response is then to be answered with a NACK for its own type.
    """
    kind = _TYPES.get(response.type_url)
    if kind is None:
        raise UnknownTypeError(f"type {response.type_url!r} was not asked for")
    url, decoder = response.type_url, _DECODERS[kind]
    upserts: dict[str, Held] = {}
    rejected: dict[str, str] = {}
    for resource in response.resources:
        name, value = resource.name, resource.resource.value
        try:
            _check(name, resource.resource.type_url, url, len(value), duplicate=name in upserts)
            decoder(name, value)
        except FieldError as error:
            rejected[name or "(no name)"] = str(error)
            continue
        upserts[name] = Held(resource.version, value)
    removed = list(response.removed_resources)
    return Accepted(kind, response.nonce, removed, list(upserts.items()), rejected)


def _check(name: str, found: str, expected: str, size: int, *, duplicate: bool) -> None:
    if not name:
        raise FieldError("name", "empty")
    if found != expected:
        raise FieldError("resource.type_url", f"{found!r} in a response of {expected!r}")
    if duplicate:
        raise FieldError("name", "twice in one response")
    if size > RESOURCE_BYTES_MAX:
        raise FieldError("resource", f"{size} bytes, more than {RESOURCE_BYTES_MAX}")


def answer(type_url: str, nonce: str, rejected: dict[str, str]) -> Request:
    """ACK, or NACK naming each resource and why."""
    request = Request(type_url=type_url, response_nonce=nonce)
    if rejected:
        detail = "; ".join(f"{name}: {why}" for name, why in rejected.items())
        request.error_detail.code = INVALID_ARGUMENT
        request.error_detail.message = detail[:DETAIL_CHARACTERS]
    return request


def parse(data: bytes) -> Response:
    """Raises DecodeError with what is wrong."""
    try:
        return Response.FromString(data)
    except DecodeError as error:
        raise DecodeError(f"a response that is no DeltaDiscoveryResponse: {error}") from error
