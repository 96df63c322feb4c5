"""The spec of Istio's RequestAuthentication (security.istio.io/v1), with the rules that Istio checks."""

from __future__ import annotations

from typing import Annotated

import msgspec

from pykmesh.manifests.authorization_policy import TargetedSpec
from pykmesh.manifests.durations import GoDuration
from pykmesh.manifests.http_route import HeaderName
from pykmesh.manifests.names import PRINTED

_Text = Annotated[str, msgspec.Meta(pattern=rf"^{PRINTED}+\Z", max_length=4096)]


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False, forbid_unknown_fields=True):
    """How all parts are read."""


class JWTHeader(_Part, frozen=True, kw_only=True):
    name: HeaderName
    prefix: Annotated[str, msgspec.Meta(pattern=rf"^{PRINTED}*\Z", max_length=256)] = ""


class ClaimToHeader(_Part, frozen=True, kw_only=True):
    header: HeaderName
    claim: _Text


class JWTRule(_Part, frozen=True, kw_only=True):
    issuer: _Text
    audiences: tuple[_Text, ...] = ()
    jwks_uri: str = ""
    jwks: str = ""
    from_headers: tuple[JWTHeader, ...] = ()
    from_params: tuple[_Text, ...] = ()
    from_cookies: tuple[_Text, ...] = ()
    output_payload_to_header: HeaderName | None = None
    output_claim_to_headers: tuple[ClaimToHeader, ...] = ()
    forward_original_token: bool = False
    timeout: GoDuration | None = None
    space_delimited_claims: tuple[_Text, ...] = ()

    def __post_init__(self) -> None:
        if self.jwks and self.jwks_uri:
            raise ValueError("only one of jwks and jwksUri may be given")


class RequestAuthenticationSpec(TargetedSpec, frozen=True, kw_only=True):
    jwt_rules: tuple[JWTRule, ...] = ()
