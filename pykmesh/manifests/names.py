"""Texts and numbers that manifests of all kinds are made of."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

PRINTED: Final = r"[^\x00-\x1f\x7f\ud800-\udfff]"
"""A character that may stand in a request's head, for patterns."""
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?\Z", max_length=253)]
PortNumber = Annotated[int, msgspec.Meta(ge=1, le=65535)]
