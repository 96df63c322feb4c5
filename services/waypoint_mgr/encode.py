"""Proto JSON to the bytes that Envoy reads. Envoy's messages take a second to import: only when needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from services.waypoint_mgr.envoy import LISTENER, Json
from services.waypoint_mgr.routes import Configuration

_PREFIX: Final = "type.googleapis.com/"
CLUSTER_TYPE: Final = f"{_PREFIX}envoy.config.cluster.v3.Cluster"
ENDPOINT_TYPE: Final = f"{_PREFIX}envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER_TYPE: Final = f"{_PREFIX}envoy.config.listener.v3.Listener"
ROUTE_TYPE: Final = f"{_PREFIX}envoy.config.route.v3.RouteConfiguration"

Resources = Mapping[str, Mapping[str, bytes]]
"""By type URL, then by name."""


class EncodeError(ValueError):
    """JSON that is no such message; the text names the field."""


def encode(type_url: str, message: Json) -> bytes:
    """Raises `EncodeError`."""
    for name in _types_in(message):
        _import(name)
    kind = _import(type_url)
    try:
        return bytes(kind(message))
    except (KeyError, TypeError, ValueError) as error:
        raise EncodeError(
            f"{type_url.removeprefix(_PREFIX)}: {error.args[0] if error.args else error}"
        ) from error


def resources(configuration: Configuration, address: str, port: int) -> Resources:
    """All that an instance gets that listens there. Raises `EncodeError`."""
    listener = configuration.listener(address, port)
    return {
        CLUSTER_TYPE: _encode_all(CLUSTER_TYPE, configuration.clusters),
        ENDPOINT_TYPE: _encode_all(ENDPOINT_TYPE, configuration.assignments),
        LISTENER_TYPE: _encode_all(LISTENER_TYPE, {LISTENER: listener}),
        ROUTE_TYPE: _encode_all(ROUTE_TYPE, configuration.routes),
    }


def _encode_all(type_url: str, messages: Mapping[str, Json]) -> dict[str, bytes]:
    return {name: encode(type_url, message) for name, message in messages.items()}


def _types_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "@type" in value:
            yield value["@type"]
        for child in value.values():
            yield from _types_in(child)
    elif isinstance(value, list):
        for child in value:
            yield from _types_in(child)


def _import(type_url: str) -> Callable[[Json], Any]:
    """What reads a message of the type; the import registers it, so that it is found within others too."""
    package, _, name = type_url.removeprefix(_PREFIX).rpartition(".")
    try:
        module = importlib.import_module(f"envoy_data_plane.{package}")
        found: Callable[[Json], Any] = getattr(module, name).from_dict
    except (ImportError, AttributeError) as error:
        raise EncodeError(f"{type_url}: Envoy has no such message") from error
    return found
