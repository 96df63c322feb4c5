"""Keys from where their issuer has them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import anyio.abc
import pytest

from pykmesh.manifests.request_authentication import JWTRule
from services.waypoint_mgr import keys
from services.waypoint_mgr.instances import refusal
from services.waypoint_mgr.keys import Keys, KeysError, fetched, place_of
from services.waypoint_mgr.tokens import bootstrap_with

from .test_tokens import jwks

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

KEY_SET = json.dumps({"keys": [{"kty": "oct", "k": "AQAB"}]})


class Issuer(ThreadingHTTPServer):
    """Answers by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.pages: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Issuer)
        page = self.server.pages.get(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", page.decode() if page else "")
        else:
            self.send_response(404 if page is None else 200)
        self.end_headers()
        self.wfile.write(page or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("rule", "place"),
    [
        ({"jwks": "{}"}, ""),
        ({"jwks_uri": "http://here/keys"}, "http://here/keys"),
        ({}, "https://issuer.test/realm/.well-known/openid-configuration"),
        ({"issuer": "somebody@example.com"}, ""),
        ({"issuer": "http://[x"}, "http://[x/.well-known/openid-configuration"),
    ],
)
def test_where_keys_are(rule: dict[str, str], place: str) -> None:
    assert place_of(JWTRule(**{"issuer": "https://issuer.test/realm/", **rule})) == place


async def test_an_issuer_says_where_its_keys_are(issuer: Issuer) -> None:
    issuer.pages = {
        "/.well-known/openid-configuration": json.dumps({"jwks_uri": f"{issuer.url}/moved"}).encode(),
        "/moved": f"{issuer.url}/keys".encode(),
        "/keys": KEY_SET.encode(),
    }
    assert await fetched(place_of(JWTRule(issuer=issuer.url)), 5) == KEY_SET


@pytest.mark.parametrize(
    ("path", "page", "why"),
    [
        ("/none", b"", "404"),
        ("/text", b"keys", "no JSON"),
        ("/bytes", b"\xff", "no text"),
        ("/list", b"[]", "no JSON object"),
        ("/empty", b"{}", "no key set"),
        ("/large", b" " * (keys.BYTES_MAX + 1), f"more than {keys.BYTES_MAX} bytes"),
        ("/elsewhere", b'{"jwks_uri": "file:///etc/passwd"}', "protocol"),
        ("/elsewhere", b'{"jwks_uri": "http://[x"}', "not known|resol|failure"),
        ("/elsewhere", b'{"jwks_uri": ""}', "http"),
        ("/moved", b"file:///etc/passwd", "protocol"),
        ("/moved", b"http://[x", "not known|resol|failure"),
    ],
)
async def test_what_is_no_key_set_is_told(issuer: Issuer, path: str, page: bytes, why: str) -> None:
    if path != "/none":
        issuer.pages[path] = page
    with pytest.raises(KeysError, match=why):
        await fetched(issuer.url + path, 5)


@pytest.mark.parametrize(
    "place", ["http://127.0.0.1:1/keys", "http://[x", "ftp://here/keys", "keys", "http://"]
)
async def test_nobody_there_is_told(place: str) -> None:
    with pytest.raises(KeysError, match=r"."):
        await fetched(place, 5)


async def test_who_answers_without_end_is_waited_for_no_longer_than_was_said() -> None:
    """A header line after another, each in time."""

    async def drip(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.send(b"HTTP/1.1 200 OK\r\n")
            while True:
                await anyio.sleep(0.1)
                await stream.send(b"x: y\r\n")

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)  # noqa: S610  (no database)
        tasks.start_soon(listener.serve, drip)
        began = time.monotonic()
        with pytest.raises(KeysError, match=r"no answer within 0\.5 s"):
            await fetched(f"http://127.0.0.1:{port}/", 0.5)
        assert time.monotonic() - began < 10
        tasks.cancel_scope.cancel()


def test_what_strangers_say_is_cut() -> None:
    assert keys.printable("a\n\x1b[1mb" + "c" * 60_000) == "a  [1mb" + "c" * (keys.ERROR_MAX - 7) + "..."


@pytest.mark.parametrize(
    "wrong",
    [
        {"kty": "oct", "k": "A"},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
        {"kty": "EC", "crv": "P-256", "alg": "ES256", "x": "AQAB", "y": "AQAB"},
    ],
)
async def test_an_envoy_is_asked_which_keys_it_takes(wrong: dict[str, str]) -> None:
    assert await refusal(bootstrap_with(jwks())) == ""
    assert await refusal(bootstrap_with(json.dumps({"keys": [wrong]}))) != ""


@pytest.mark.usefixtures("quickly")
async def test_what_no_envoy_would_take_takes_the_place_of_nothing() -> None:
    async def check(found: str) -> None:
        if found == "wrong":
            raise KeysError("Envoy refuses them")

    rule = JWTRule(issuer="i", jwks_uri="http://here/keys")
    changes: list[int] = []
    found = Keys(lambda: changes.append(1), Places(["right", *["wrong"] * 10_000]), check)
    found.want([("shop", rule)])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.run)
        await until_changed(changes, 2)
        tasks.cancel_scope.cancel()
    assert found.found == {rule.jwks_uri: "right"}
    assert found.errors == {rule.jwks_uri: "http://here/keys: Envoy refuses them"}


class Places:
    """Says what is next for each question, and who asked."""

    def __init__(self, answers: Iterable[str | None]) -> None:
        self._answers = iter(answers)
        self.asked: list[tuple[str, float]] = []

    async def __call__(self, place: str, timeout_s: float) -> str:
        self.asked.append((place, timeout_s))
        answer = next(self._answers)
        if answer is None:
            raise KeysError("away")
        return answer


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REFRESH_S", "RETRY_FIRST_S", "LOOK_S"):
        monkeypatch.setattr(keys, name, 0.01)


async def until_changed(changes: list[int], count: int) -> None:
    with anyio.fail_after(10):
        while len(changes) < count:  # noqa: ASYNC110  (the loop is the test's own)
            await anyio.sleep(0.005)


@pytest.mark.usefixtures("quickly")
async def test_what_was_fetched_stays_good_until_something_else_is() -> None:
    rule = JWTRule(issuer="i", jwks_uri="http://here/keys")
    changes: list[int] = []
    places = Places([None, None, "first", "first", None, None, "second", *["second"] * 10_000])
    found = Keys(lambda: changes.append(1), places)
    found.want([("shop", rule)])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.run)
        seen = []
        for count in range(1, 5):
            await until_changed(changes, count)
            seen.append((dict(found.found), dict(found.errors)))
        tasks.cancel_scope.cancel()
    here, away = rule.jwks_uri, {rule.jwks_uri: "http://here/keys: away"}
    assert seen == [({}, away), ({here: "first"}, {}), ({here: "first"}, away), ({here: "second"}, {})]


@pytest.mark.usefixtures("quickly")
async def test_what_is_wanted_no_more_is_forgotten() -> None:
    changes: list[int] = []
    places = Places(["one", "two", *["two"] * 10_000])
    found = Keys(lambda: changes.append(1), places)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.run)
        found.want([("shop", JWTRule(issuer="i", jwks_uri="http://one/", timeout=None))])
        await until_changed(changes, 1)
        found.want([("shop", JWTRule(issuer="i", jwks_uri="http://two/"))])
        assert found.found == {}
        with anyio.fail_after(10):
            while not found.found:  # noqa: ASYNC110  (one that was under way may be told first)
                await anyio.sleep(0.005)
        tasks.cancel_scope.cancel()
    assert found.found == {"http://two/": "two"}
    assert places.asked[0] == ("http://one/", keys.TIMEOUT_S)


async def test_of_too_many_places_each_namespace_has_its_share_and_the_rest_is_told() -> None:
    found = Keys(lambda: None, Places([]))
    many = [("many", JWTRule(issuer="i", jwks_uri=f"http://here/{n}")) for n in range(keys.PLACES_MAX + 2)]
    few = [("few", JWTRule(issuer="i", jwks_uri=f"http://there/{n}")) for n in range(2)]
    found.want(many)
    assert found.errors.keys() == {rule.jwks_uri for _, rule in many[-2:]}
    found.want([*many[1:], *few])
    assert found.errors.keys() == {rule.jwks_uri for _, rule in many[-3:]}


async def test_nobody_waits_for_places_of_another_namespace_that_are_slow() -> None:
    async def fetch(place: str, _: float) -> str:
        if place.startswith("http://slow/"):
            await anyio.sleep_forever()
        return "keys"

    found = Keys(lambda: None, fetch)
    slow = [("many", JWTRule(issuer="i", jwks_uri=f"http://slow/{n}")) for n in range(keys.AT_ONCE * 10)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.run)
        found.want(slow)
        await anyio.sleep(0.1)
        found.want([*slow, ("few", JWTRule(issuer="i", jwks_uri="http://quick/"))])
        with anyio.fail_after(10):
            while not found.found:  # noqa: ASYNC110  (the loop is the test's own)
                await anyio.sleep(0.005)
        tasks.cancel_scope.cancel()
    assert found.found == {"http://quick/": "keys"}
