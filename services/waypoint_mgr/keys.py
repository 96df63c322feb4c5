"""The keys of tokens that RequestAuthentications name by a place (`jwksUri`), or by their issuer alone.

An issuer says where they are as OpenID Connect Discovery has it. What was fetched stays good until something
else is: a server that is away takes no key back. It is asked again after a while, for keys change.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from http.client import HTTPException
from typing import Final
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import structlog

from pykmesh.manifests.request_authentication import JWTRule

log = structlog.get_logger(__name__)

REFRESH_S: Final = 1200.0
"""As often as istiod does."""
RETRY_FIRST_S: Final = 1.0
RETRY_MAX_S: Final = 60.0
LOOK_S: Final = 0.5
TIMEOUT_S: Final = 5.0
TIMEOUT_MAX_S: Final = 30.0
BYTES_MAX: Final = 1 << 20
AT_ONCE: Final = 4
_DISCOVERY: Final = "/.well-known/openid-configuration"
_SCHEMES: Final = ("http", "https")

Fetch = Callable[[str, float], str]


class KeysError(Exception):
    """Keys that cannot be had; the text says why."""


def place_of(rule: JWTRule) -> str:
    """Where a rule's keys are to be fetched; "" where it has them, or nobody can tell."""
    if rule.jwks or rule.jwks_uri:
        return rule.jwks_uri
    issuer = rule.issuer.rstrip("/")
    return issuer + _DISCOVERY if urlsplit(issuer).scheme in _SCHEMES else ""


class Keys:
    """`found` has the keys of each place that was ever reached, as the text of a JSON Web Key Set."""

    def __init__(self, changed: Callable[[], None], fetch: Fetch | None = None) -> None:
        self.found: Mapping[str, str] = {}
        self.errors: dict[str, str] = {}
        """Of places that could not be reached the last time."""
        self._changed = changed
        self._fetch = fetch or fetched
        self._due: dict[str, float] = {}
        """Of each place that is wanted, when it is asked next."""
        self._timeouts: dict[str, float] = {}
        self._retry_s: dict[str, float] = {}
        self._limit = anyio.CapacityLimiter(AT_ONCE)

    def want(self, rules: Iterable[JWTRule]) -> None:
        """Those of all rules, and no others."""
        self._timeouts = {
            place: min(rule.timeout.seconds, TIMEOUT_MAX_S) if rule.timeout else TIMEOUT_S
            for rule in rules
            if (place := place_of(rule))
        }
        now = time.monotonic()
        self._due = {place: self._due.get(place, now) for place in self._timeouts}
        self.found = {place: keys for place, keys in self.found.items() if place in self._due}
        for known in (self.errors, self._retry_s):
            for place in known.keys() - self._due.keys():
                del known[place]

    async def run(self) -> None:
        """Until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                now = time.monotonic()
                for place in [place for place, due in self._due.items() if due <= now]:
                    self._due[place] = now + REFRESH_S
                    tasks.start_soon(self._ask, place)
                await anyio.sleep(LOOK_S)

    async def _ask(self, place: str) -> None:
        timeout_s = self._timeouts.get(place, TIMEOUT_S)
        try:
            keys = await anyio.to_thread.run_sync(self._fetch, place, timeout_s, limiter=self._limit)
        except KeysError as error:
            retry_s = self._retry_s.get(place, RETRY_FIRST_S)
            if place in self._due:
                self._due[place] = time.monotonic() + retry_s
                self._retry_s[place] = min(2 * retry_s, RETRY_MAX_S)
                if self.errors.get(place) != str(error):
                    self.errors[place] = str(error)
                    log.warning("keys_not_fetched", place=place, error=str(error))
                    self._changed()
            return
        self._retry_s.pop(place, None)
        is_news = self.errors.pop(place, None) is not None or self.found.get(place) != keys
        if is_news and place in self._due:
            self.found = {**self.found, place: keys}
            log.info("keys_fetched", place=place)
            self._changed()


def fetched(place: str, timeout_s: float) -> str:
    """The key set at a place, or where what is there says that it is. Raises `KeysError`."""
    text = _read(place, timeout_s)
    found = _json(place, text)
    if "keys" not in found and isinstance(elsewhere := found.get("jwks_uri"), str):
        place, text = elsewhere, _read(elsewhere, timeout_s)
        found = _json(place, text)
    if not isinstance(found.get("keys"), list):
        raise KeysError(f"{place}: no key set: it has no list of keys")
    return text


def _json(place: str, text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KeysError(f"{place}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise KeysError(f"{place}: no JSON object")
    return found


def _read(place: str, timeout_s: float) -> str:
    if urlsplit(place).scheme not in _SCHEMES:
        raise KeysError(f"{place}: neither http nor https")
    end, data = time.monotonic() + timeout_s, b""
    try:
        with _OPENER.open(place, timeout=timeout_s) as response:
            while len(data) <= BYTES_MAX and (part := response.read1(BYTES_MAX)):
                data += part
                if time.monotonic() > end:
                    raise TimeoutError(f"not whole after {timeout_s:g} s")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is a response, too
        why = error.reason if type(error) is urllib.error.URLError else error
        raise KeysError(f"{place}: {why or type(error).__name__}") from error
    if len(data) > BYTES_MAX:
        raise KeysError(f"{place}: more than {BYTES_MAX} bytes")
    try:
        return str(data.decode())
    except UnicodeDecodeError as error:
        raise KeysError(f"{place}: no text: {error}") from error


# Redirections are followed to http and https alone. What the environment says of proxies holds.
_OPENER: Final = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
):
    _OPENER.add_handler(_handler())
