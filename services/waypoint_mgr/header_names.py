"""Headers that are nobody's to write: no route's and no token's."""

from __future__ import annotations

from typing import Final

from services.waypoint_mgr.principals import is_identity

_OF_THE_MESSAGE: Final = frozenset(
    {
        "connection",
        "content-length",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110, 7.6.1 and 8.6; RFC 9112, 6. Endpoints' connections are shared by all who come by way of an Envoy:
who says where a request ends could make the rest of it somebody else's."""


def why_not(name: str) -> str:
    """Why a header may not be written; "": it may."""
    if is_identity(name):
        return "which says who asks"
    if name.lower() in _OF_THE_MESSAGE:
        return "which says where a message ends, or how it is carried"
    return ""
