"""RequestAuthentications as Envoy's JWT filter, and what policies ask of a token. Pure.

A request with a token of no known issuer, without a valid signature or out of date is answered with 401, with
one for another audience with 403. One without goes on, and has no principal: policies say who needs one.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pykmesh.manifests.objects import Gateway, ObjectRef, ref_of
from pykmesh.manifests.request_authentication import JWTRule
from services.waypoint_mgr.attachments import (
    ACCEPTED,
    PARTIALLY_INVALID,
    UNSUPPORTED_VALUE,
    Condition,
    Mesh,
    targeted,
)
from services.waypoint_mgr.envoy import Json, Port, named, typed
from services.waypoint_mgr.header_names import why_not
from services.waypoint_mgr.keys import place_of
from services.waypoint_mgr.source import Authentication

_FILTER: Final = "envoy.filters.http.jwt_authn"
_PAYLOAD: Final = "payload"
_LISTS_IN_A_TEXT: Final = ("permission", "scope")
"""Claims whose words Istio always takes one by one."""
_OF_A_NUMBER: Final = re.compile(r"[-+.eE\d]*")
_CLAIMS: Final = re.compile(r"request\.auth\.claims((?:\[[^\[\]]+\])+)")
_OF_A_TOKEN: Final = {"request.auth.audiences": ("aud",), "request.auth.presenter": ("azp",)}
_KEY_PARTS: Final = {"RSA": ("n", "e"), "EC": ("x", "y"), "OKP": ("x",), "oct": ("k",)}
_LETTERS: Final = re.compile(r"[-_A-Za-z0-9]+={0,2}")


def _nobodys_key() -> str:
    """One that nobody has the other half of: a hash, where a point of a curve is to stand."""
    point = hashlib.blake2b(b"no tokens are signed with this key", digest_size=32).digest()
    text = base64.urlsafe_b64encode(point).rstrip(b"=").decode()
    return json.dumps(
        {"keys": [{"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "kid": "nobody", "x": text}]}
    )


NO_KEYS: Final = _nobodys_key()


class Tokens:
    """The RequestAuthentications of a waypoint, and what their authors are told."""

    def __init__(
        self,
        waypoint: Gateway,
        mesh: Mesh,
        found: Sequence[Authentication],
        key_errors: Mapping[str, str] | None = None,
    ) -> None:
        """`key_errors`: of places whose keys have not come, why."""
        self._waypoint = waypoint
        self._key_errors = key_errors or {}
        self._of_all, self._of_services = targeted(found, waypoint, mesh)
        self._dropped: dict[ObjectRef, dict[str, None]] = {}
        self._asked: set[ObjectRef] = set()

    def filters(self, at: Port) -> list[Json]:
        """Of a port's chain: at most one, which is asked before policies are."""
        own = [*self._of_all, *(one for one in self._of_services if at.service in one.services)]
        self._asked.update(one.ref for one in own)
        rules = [
            (f"{one.ref.namespace}/{one.ref.name}[{index}]", one, rule)
            for one in own
            for index, rule in enumerate(one.spec.jwt_rules)
        ]
        if not rules:
            return []
        providers = {name: self._provider(one.ref, rule) for name, one, rule in rules}
        requirements: list[Json] = [{"providerName": name} for name in providers]
        requires = {"requiresAny": {"requirements": [*requirements, {"allowMissing": {}}]}}
        config = typed("filters.http.jwt_authn.v3.JwtAuthentication") | {
            "providers": providers,
            "rules": [{"match": {"prefix": "/"}, "requires": requires}],
        }
        return [named(_FILTER, config)]

    def conditions(self) -> Iterator[Condition]:
        """After the chains of all ports are made."""
        parent = ref_of(self._waypoint)
        for one in self._of_services:
            if one.ref not in self._asked:
                self._drop(one.ref, "all of it: no port of what it is for carries HTTP")
        for one in (*self._of_all, *self._of_services):
            yield Condition(one.ref, parent, ACCEPTED, True, ACCEPTED)
            if dropped := self._dropped.get(one.ref):
                message = f"not honoured: {'; '.join(dropped)}"
                yield Condition(one.ref, parent, PARTIALLY_INVALID, True, UNSUPPORTED_VALUE, message)

    def _provider(self, of: ObjectRef, rule: JWTRule) -> Json:
        keys = rule.jwks
        if not keys or not _are_keys(keys):
            why = "jwks are no keys"
            if not rule.jwks and (place := place_of(rule)):
                why = f"no keys yet: {self._key_errors.get(place, f'{place} is asked')}"
            self._drop(of, f"issuer {rule.issuer}: {why}, so its tokens are refused")
            keys = NO_KEYS
        provider: Json = {
            "issuer": rule.issuer,
            "localJwks": {"inlineString": keys},
            "payloadInMetadata": _PAYLOAD,
            "forward": rule.forward_original_token,
            "normalizePayloadInMetadata": {
                "spaceDelimitedClaims": sorted({*_LISTS_IN_A_TEXT, *rule.space_delimited_claims})
            },
            "clearRouteCache": True,  # routes may ask for headers that the token fills
        }
        if rule.audiences:
            provider["audiences"] = list(rule.audiences)
        if rule.from_headers:
            provider["fromHeaders"] = [
                {"name": one.name, "valuePrefix": one.prefix} for one in rule.from_headers
            ]
        if rule.from_params:
            provider["fromParams"] = list(rule.from_params)
        if rule.from_cookies:
            provider["fromCookies"] = list(rule.from_cookies)
        payload_header = rule.output_payload_to_header or ""
        if why := why_not(payload_header):
            self._drop(of, f"issuer {rule.issuer}: outputPayloadToHeader {payload_header}, {why}")
        elif payload_header:
            provider["forwardPayloadHeader"] = payload_header
        headers = list[Json]()
        for one in rule.output_claim_to_headers:
            if why := why_not(one.header):
                self._drop(of, f"issuer {rule.issuer}: outputClaimToHeaders {one.header}, {why}")
            else:
                headers.append({"headerName": one.header, "claimName": one.claim})
        if headers:
            provider["claimToHeaders"] = headers
        return provider

    def _drop(self, of: ObjectRef, what: str) -> None:
        self._dropped.setdefault(of, {})[what] = None


def bootstrap_with(keys: str) -> Json:
    """Of an Envoy that has these keys and nothing else: whether it takes them it alone can tell."""
    config = typed("filters.http.jwt_authn.v3.JwtAuthentication") | {
        "providers": {"issuer": {"issuer": "issuer", "localJwks": {"inlineString": keys}}}
    }
    manager = typed("filters.network.http_connection_manager.v3.HttpConnectionManager") | {
        "statPrefix": "keys",
        "routeConfig": {},
        "httpFilters": [
            named(_FILTER, config),
            named("envoy.filters.http.router", typed("filters.http.router.v3.Router")),
        ],
    }
    chain = {"filters": [named("envoy.filters.network.http_connection_manager", manager)]}
    address = {"socketAddress": {"address": "127.0.0.1", "portValue": 0}}
    listener = {"name": "keys", "address": address, "filterChains": [chain]}
    return {"staticResources": {"listeners": [listener]}}


def _are_keys(text: str) -> bool:
    """Whether Envoy finds a key in it: a listener without one is refused as a whole."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    keys: Any = found.get("keys") if isinstance(found, dict) else None
    return isinstance(keys, list) and any(isinstance(key, dict) and _is_key(key) for key in keys)


def _is_key(key: dict[str, Any]) -> bool:
    """By its parts; whether its numbers are a key Envoy alone knows."""
    parts = _KEY_PARTS.get(str(key.get("kty")), ("",))
    return all(_LETTERS.fullmatch(str(key.get(part, ""))) for part in parts)


# -- what policies ask


def text_match(value: str) -> Json | None:
    """Exact, or the beginning (`x*`) or end (`*x`) of a text; None: a pattern that there is not."""
    if value.startswith("*"):
        found = {"suffix": value[1:]}
    else:
        found = {"prefix": value[:-1]} if value.endswith("*") else {"exact": value}
    return None if any("*" in text for text in found.values()) else found


def principal(value: str) -> Json | None:
    """A token's issuer and subject, with a slash between them, which either may have in itself."""
    if value == "*":
        return _claim("iss", {"presentMatch": True})
    if (found := text_match(value)) is None:
        return None
    starts, ends = "prefix" in found, "suffix" in found
    (text,) = found.values()
    splits = [(text[:index], text[index + 1 :]) for index, one in enumerate(text) if one == "/"]
    if starts:
        parts = [_both(_exact("iss", issuer), _begins("sub", subject)) for issuer, subject in splits]
        parts.append(_both(_begins("iss", text), _claim("sub", {"presentMatch": True})))
    elif ends:
        parts = [_both(_ends("iss", issuer), _exact("sub", subject)) for issuer, subject in splits]
        parts.append(_both(_claim("iss", {"presentMatch": True}), _ends("sub", text)))
    else:
        parts = [_both(_exact("iss", issuer), _exact("sub", subject)) for issuer, subject in splits]
    return {"orRules": {"rules": parts}} if parts else {"notRule": {"any": True}}


def claim_of(key: str) -> tuple[str, ...]:
    """The claim that a condition's key asks for; none: it asks for no claim."""
    if (found := _CLAIMS.fullmatch(key)) is not None:
        return tuple(re.findall(r"\[([^\[\]]+)\]", found[1]))
    return _OF_A_TOKEN.get(key, ())


def claim(path: Sequence[str], value: str, *, is_strict: bool) -> Json | None:
    """Of a claim that is a text, or a list of which one matches.

    `is_strict`: also of one that is true, false or a number, and may be written like it.
    """
    if value == "*":
        return _metadata(path, {"presentMatch": True})
    if (text := text_match(value)) is None:
        return None
    said: list[Json] = [{"stringMatch": text}, *(_like(text) if is_strict else ())]
    said += [{"listMatch": {"oneOf": each}} for each in said]
    return _metadata(path, {"orMatch": {"valueMatchers": said}})


def _like(text: Json) -> Iterator[Json]:
    """True, false and numbers that may be written so; how a number is written nobody says."""
    ((how, wanted),) = text.items()
    for word in ("true", "false"):
        said = {"prefix": word[: len(wanted)], "suffix": word[-len(wanted) :]}.get(how, word)
        if wanted.lower() == said:
            yield {"boolMatch": word == "true"}
    if how == "exact":
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(wanted)):
                yield {"doubleMatch": {"exact": number}}
    elif _OF_A_NUMBER.fullmatch(wanted):
        yield {"doubleMatch": {"range": {"start": -sys.float_info.max, "end": sys.float_info.max}}}


def _metadata(path: Sequence[str], value: Json) -> Json:
    keys = [{"key": key} for key in (_PAYLOAD, *path)]
    return {"metadata": {"filter": _FILTER, "path": keys, "value": value}}


def _claim(name: str, value: Json) -> Json:
    return _metadata((name,), value)


def _exact(name: str, text: str) -> Json:
    return _claim(name, {"stringMatch": {"exact": text}})


def _begins(name: str, text: str) -> Json:
    return _claim(name, {"stringMatch": {"prefix": text}} if text else {"presentMatch": True})


def _ends(name: str, text: str) -> Json:
    return _claim(name, {"stringMatch": {"suffix": text}} if text else {"presentMatch": True})


def _both(*parts: Json) -> Json:
    return {"andRules": {"rules": list(parts)}}
