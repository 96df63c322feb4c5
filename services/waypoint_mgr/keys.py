"""The keys of tokens that RequestAuthentications name by a place (`jwksUri`), or by their issuer alone.

An issuer says where they are as OpenID Connect Discovery has it. What was fetched stays good until something
else is: a server that is away, or says what no Envoy would take, takes no key back. It is asked again after a
while, for keys change. Whatever it does is an error of that place, and of no other.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING, Final

import anyio
import structlog

from pykmesh.manifests.request_authentication import JWTRule

if TYPE_CHECKING:
    import httpx2

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
"""Of one namespace: those of others do not wait for places that are slow."""
PLACES_MAX: Final = 1024
"""Everybody who may write a RequestAuthentication may have this process ask somewhere."""
CHECK_S: Final = 30.0
ERROR_MAX: Final = 300
_DISCOVERY: Final = "/.well-known/openid-configuration"
_SCHEMES: Final = ("http://", "https://")

Fetch = Callable[[str, float], Awaitable[str]]
"""From a place and a time in seconds to a key set. Raises `KeysError`, and nothing else."""
Check = Callable[[str], Awaitable[None]]
"""Raises `KeysError` for a key set that an Envoy would not take."""


class KeysError(Exception):
    """Keys that cannot be had; the text says why."""


def place_of(rule: JWTRule) -> str:
    """Where a rule's keys are to be fetched; "" where it has them, or nobody can tell."""
    if rule.jwks or rule.jwks_uri:
        return rule.jwks_uri
    issuer = rule.issuer.rstrip("/")
    return issuer + _DISCOVERY if issuer.startswith(_SCHEMES) else ""


async def unchecked(_: str) -> None:
    """Takes every key set."""


class Keys:
    """`found` has the keys of each place that was ever reached, as the text of a JSON Web Key Set."""

    def __init__(
        self, changed: Callable[[], None], fetch: Fetch | None = None, check: Check = unchecked
    ) -> None:
        self.found: Mapping[str, str] = {}
        self.errors: dict[str, str] = {}
        """Of places that could not be reached the last time."""
        self._changed = changed
        self._fetch = fetch or fetched
        self._check = check
        self._due: dict[str, float] = {}
        """Of each place that is wanted, when it is asked next."""
        self._timeouts: dict[str, float] = {}
        self._retry_s: dict[str, float] = {}
        self._namespaces: dict[str, str] = {}
        self._limits: defaultdict[str, anyio.Semaphore] = defaultdict(lambda: anyio.Semaphore(AT_ONCE))

    def want(self, rules: Iterable[tuple[str, JWTRule]]) -> None:
        """Those of all rules, each with the namespace of who says it, and no others.

        Of too many the first of each namespace, then the second of each, and so on.
        """
        timeouts: dict[str, float] = {}
        of: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for namespace, rule in rules:
            if place := place_of(rule):
                timeout_s = min(rule.timeout.seconds if rule.timeout else 0, TIMEOUT_MAX_S) or TIMEOUT_S
                timeouts[place] = max(timeout_s, timeouts.get(place, 0.0))
                of[namespace][place] = None
        in_turn = chain.from_iterable(zip_longest(*([(p, n) for p in places] for n, places in of.items())))
        by_place: dict[str, list[str]] = {}
        for place, namespace in filter(None, in_turn):
            by_place.setdefault(place, []).append(namespace)
        # Of several that name it who names the fewest: so nobody draws another's into his own crowd.
        self._namespaces = {
            place: min(some, key=lambda each: (len(of[each]), each))
            for place, some in islice(by_place.items(), PLACES_MAX)
        }
        self._timeouts = {place: timeouts[place] for place in self._namespaces}
        for namespace in self._limits.keys() - {*self._namespaces.values()}:
            del self._limits[namespace]
        now = time.monotonic()
        self._due = {place: self._due.get(place, now) for place in self._timeouts}
        self.found = {place: keys for place, keys in self.found.items() if place in self._due}
        for known in (self.errors, self._retry_s):
            for place in known.keys() - self._due.keys():
                del known[place]
        too_many = f"keys of {PLACES_MAX} places are asked for already"
        self.errors = {place: why for place, why in self.errors.items() if why != too_many}
        self.errors |= dict.fromkeys(timeouts.keys() - self._timeouts.keys(), too_many)

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
        try:
            async with self._limits[self._namespaces.get(place, "")]:
                keys = await self._fetch(place, self._timeouts.get(place, TIMEOUT_S))
                if keys != self.found.get(place):
                    with anyio.fail_after(CHECK_S):
                        await self._check(keys)
        except TimeoutError:
            self._failed(place, f"{place}: nobody said within {CHECK_S:g} s whether an Envoy takes them")
            return
        except KeysError as error:
            self._failed(place, printable(f"{place}: {error}"))
            return
        self._retry_s.pop(place, None)
        if place not in self._due:
            return
        if self.errors.pop(place, None) is not None or self.found.get(place) != keys:
            self.found = {**self.found, place: keys}
            log.info("keys_fetched", place=place)
            self._changed()

    def _failed(self, place: str, why: str) -> None:
        if place not in self._due:
            return
        retry_s = self._retry_s.get(place, RETRY_FIRST_S)
        self._due[place] = time.monotonic() + retry_s
        self._retry_s[place] = min(2 * retry_s, RETRY_MAX_S)
        if self.errors.get(place) != why:
            self.errors[place] = why
            log.warning("keys_not_fetched", place=place, error=why)
            self._changed()


def printable(text: str) -> str:
    """What others wrote, as it may stand in a log and a status."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text[: ERROR_MAX + 1])
    return kept if len(kept) <= ERROR_MAX else f"{kept[:ERROR_MAX]}..."


async def fetched(place: str, timeout_s: float) -> str:
    """The key set at a place, or where what is there says that it is: all within the time. `KeysError`."""
    import httpx2  # noqa: PLC0415  (half a second that those alone have whose keys are elsewhere)

    try:
        with anyio.fail_after(timeout_s):
            async with httpx2.AsyncClient(follow_redirects=True, timeout=None) as client:
                text, found = await _read(client, place)
                if "keys" not in found and isinstance(elsewhere := found.get("jwks_uri"), str):
                    text, found = await _read(client, elsewhere)
    except TimeoutError as error:
        raise KeysError(f"no answer within {timeout_s:g} s") from error
    except KeysError:
        raise
    except Exception as error:  # whatever a stranger's server makes of the library
        raise KeysError(str(error) or type(error).__name__) from error
    if not isinstance(found.get("keys"), list):
        raise KeysError("no key set: it has no list of keys")
    return text


async def _read(client: httpx2.AsyncClient, place: str) -> tuple[str, dict[str, object]]:
    """A JSON object, as it is and as it is read."""
    data = b""
    async with client.stream("GET", place) as response:
        response.raise_for_status()
        async for part in response.aiter_bytes():
            data += part
            if len(data) > BYTES_MAX:
                raise KeysError(f"more than {BYTES_MAX} bytes")
    try:
        text = data.decode()
        found = json.loads(text)
    except UnicodeDecodeError as error:
        raise KeysError(f"no text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise KeysError(f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise KeysError("no JSON object")
    return text, found
