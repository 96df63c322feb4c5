"""RequestAuthentications, and policies that ask of tokens, through a real Envoy."""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from pykmesh.contracts.waypoints import Endpoint
from pykmesh.manifests.objects import AuthorizationPolicy, RequestAuthentication, from_plain
from services.waypoint_mgr.attachments import Condition
from services.waypoint_mgr.source import Authentication, Policy, Route

from .backends import Answer, Backend, ask
from .world import DOMAIN, World, ads_server, at, http_route, kubernetes_service, mesh_service, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

ADDRESS = "127.0.11.1"
ISSUER = "https://issuer.test/realm"
TO_WEB = {"targetRefs": [{"kind": "Service", "name": "web"}]}
KEY, OTHER_KEY = (rsa.generate_private_key(65537, 2048) for _ in range(2))


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return encoded(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def jwks() -> str:
    public = KEY.public_key().public_numbers()
    key = {"kty": "RSA", "kid": "k", "alg": "RS256", "n": number(public.n), "e": number(public.e)}
    return json.dumps({"keys": [key]})


def token(key: rsa.RSAPrivateKey = KEY, *, lives_s: float = 600, **claims: Any) -> str:
    said = {"iss": ISSUER, "sub": "alice", "exp": int(time.time() + lives_s), **claims}
    head = {"alg": "RS256", "kid": "k"}
    text = ".".join(encoded(json.dumps(part).encode()) for part in (head, said))
    return f"{text}.{encoded(key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def authentication(*rules: dict[str, Any], **spec: Any) -> Authentication:
    plain = {
        "metadata": {"name": "jwt", "namespace": "shop"},
        "spec": {**(spec or TO_WEB), "jwtRules": list(rules)},
    }
    made = from_plain(plain, RequestAuthentication)
    assert isinstance(made, RequestAuthentication)
    return Authentication.of(made, DOMAIN, {})


def policy(action: str = "ALLOW", **rule: Any) -> Policy:
    plain = {
        "metadata": {"name": "p", "namespace": "shop"},
        "spec": {**TO_WEB, "action": action, "rules": [rule]},
    }
    made = from_plain(plain, AuthorizationPolicy)
    assert isinstance(made, AuthorizationPolicy)
    return Policy.of(made, DOMAIN, {})


def rule(**fields: Any) -> dict[str, Any]:
    return {"issuer": ISSUER, "jwks": jwks(), **fields}


Ask = Callable[..., Any]


@asynccontextmanager
async def served(
    folder: Path,
    backends: dict[str, Backend],
    *authentications: Authentication,
    policies: tuple[Policy, ...] = (),
    routes: tuple[Route, ...] = (),
    is_reduced: bool = False,
    is_blamed: bool = False,
) -> AsyncIterator[tuple[Ask, tuple[Condition, ...]]]:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        world = World()
        own = mesh_service("shop", "web", {envoy.port: [backends["own"].endpoint]}, [ADDRESS])
        world.add_user(own, kubernetes_service("shop", "web", {"port": envoy.port, "name": "http"}))
        world.authentications, world.policies = list(authentications), list(policies)
        world.is_reduced, world.routes = is_reduced, list(routes)
        world.blamed = {each.ref: "why" for each in authentications if is_blamed}
        for name in ("v1", "v2"):
            world.add_backend(mesh_service("shop", name, {80: [backends[name].endpoint]}))
        made = world.configuration()
        assert not (await envoy.apply(made)).refusals
        await envoy.ready()

        async def asked(bearer: str = "", path: str = "/", **headers: str) -> Answer:
            said = headers | ({"authorization": f"Bearer {bearer}"} if bearer else {})
            return await anyio.to_thread.run_sync(ask, at(ADDRESS), envoy.port, path, "GET", said)

        yield asked, made.authentications


async def test_a_good_token_or_none_goes_on_and_a_bad_one_does_not(
    folder: Path, backends: dict[str, Backend]
) -> None:
    async with served(folder, backends, authentication(rule(audiences=["web", "shop"]))) as (asked, told):
        good = {"aud": "shop"}
        assert (await asked()).status == 200
        answer = await asked(token(**good))
        assert answer.status == 200
        assert "authorization" not in answer.told["headers"], "it is not handed on"
        for status, bad in (
            (401, token(OTHER_KEY, **good)),
            (401, token(lives_s=-600, **good)),
            (401, token(iss="https://other.test", **good)),
            (401, token(**good)[:-4]),
            (401, "nonsense"),
            (403, token(aud="other")),
            (403, token()),
        ):
            assert (await asked(bad)).status == status
        assert [(one.type, one.status) for one in told] == [("Accepted", True)]


async def test_where_it_comes_from_and_what_is_handed_on(folder: Path, backends: dict[str, Backend]) -> None:
    found = rule(
        fromHeaders=[{"name": "x-token", "prefix": "Token "}],
        fromParams=["t"],
        fromCookies=["session"],
        forwardOriginalToken=True,
        outputPayloadToHeader="x-payload",
        outputClaimToHeaders=[{"header": "x-who", "claim": "sub"}],
    )
    async with served(folder, backends, authentication(found)) as (asked, _):
        for words in (
            {"x-token": f"Token {token()}"},
            {"cookie": f"session={token()}"},
        ):
            seen = (await asked(**words)).told["headers"]
            assert seen["x-who"] == "alice"
            assert json.loads(base64.urlsafe_b64decode(seen["x-payload"] + "=="))["iss"] == ISSUER
        assert (await asked(path=f"/?t={token()}")).told["headers"]["x-who"] == "alice"
        assert "x-who" not in (await asked(token())).told["headers"], "not looked for there"
        assert "x-who" not in (await asked(**{"x-who": "mallory"})).told["headers"]


async def test_no_token_says_who_asks(folder: Path, backends: dict[str, Backend]) -> None:
    own = "x-forwarded-client-cert"
    claims = [{"header": own, "claim": "sub"}, {"header": "x-who", "claim": "sub"}]
    found = rule(outputPayloadToHeader="X_Forwarded_Client_Cert", outputClaimToHeaders=claims)
    async with served(folder, backends, authentication(found)) as (asked, told):
        seen = (await asked(token())).told["headers"]
        assert seen["x-who"] == "alice"
        assert not [name for name in seen if name.replace("_", "-").lower() == own]
        (message,) = [one.message for one in told if one.type == "PartiallyInvalid"]
        assert f"outputClaimToHeaders {own}" in message
        assert "outputPayloadToHeader X_Forwarded_Client_Cert" in message


@pytest.mark.parametrize("name", ["Content-Length", "transfer-encoding", "connection"])
async def test_no_token_says_where_a_request_ends(
    folder: Path, backends: dict[str, Backend], name: str
) -> None:
    found = rule(outputPayloadToHeader=name, outputClaimToHeaders=[{"header": name, "claim": "sub"}])
    async with served(folder, backends, authentication(found)) as (asked, told):
        assert (await asked(token(sub="0"))).told["headers"].get(name.lower()) != "0"
        (message,) = [one.message for one in told if one.type == "PartiallyInvalid"]
        for field in ("outputClaimToHeaders", "outputPayloadToHeader"):
            assert f"{field} {name}, which says where a message ends" in message


async def test_a_claim_is_one_header(folder: Path, backends: dict[str, Backend]) -> None:
    found = rule(outputClaimToHeaders=[{"header": "x-who", "claim": "sub"}])
    async with served(folder, backends, authentication(found)) as (asked, _):
        answer = await asked(token(sub="alice\r\nx-role: admin"))
        assert (answer.status, answer.told) == (503, {})


ALICE = f"{ISSUER}/alice"


@pytest.mark.parametrize(
    ("asks", "claims", "status"),
    [
        ({"source": {"requestPrincipals": ["*"]}}, {}, 200),
        ({"source": {"requestPrincipals": ["*"]}}, None, 403),
        ({"source": {"requestPrincipals": [ALICE]}}, {}, 200),
        ({"source": {"requestPrincipals": [ALICE]}}, {"sub": "bob"}, 403),
        ({"source": {"requestPrincipals": [ALICE]}}, None, 403),
        ({"source": {"requestPrincipals": [f"{ISSUER}/*"]}}, {}, 200),
        ({"source": {"requestPrincipals": [f"{ISSUER}/al*"]}}, {}, 200),
        ({"source": {"requestPrincipals": ["https://*"]}}, {}, 200),
        ({"source": {"requestPrincipals": ["http://*"]}}, {}, 403),
        ({"source": {"requestPrincipals": ["*/alice"]}}, {}, 200),
        ({"source": {"requestPrincipals": ["*realm/alice"]}}, {}, 200),
        ({"source": {"requestPrincipals": ["*/bob"]}}, {}, 403),
        ({"source": {"requestPrincipals": ["nobody"]}}, {}, 403),
        ({"source": {"notRequestPrincipals": ["*"]}}, {}, 403),
        ({"source": {"notRequestPrincipals": ["*"]}}, None, 200),
        ({"when": {"request.auth.principal": [ALICE]}}, {}, 200),
        ({"when": {"request.auth.claims[group]": ["admin"]}}, {"group": "admin"}, 200),
        ({"when": {"request.auth.claims[group]": ["admin"]}}, {"group": ["user", "admin"]}, 200),
        ({"when": {"request.auth.claims[group]": ["admin"]}}, {"group": ["user"]}, 403),
        ({"when": {"request.auth.claims[group]": ["admin"]}}, {}, 403),
        ({"when": {"request.auth.claims[group]": ["adm*"]}}, {"group": "admin"}, 200),
        ({"when": {"request.auth.claims[a][b]": ["*c"]}}, {"a": {"b": "xyc"}}, 200),
        ({"when": {"request.auth.claims[group]": ["*"]}}, {"group": "any"}, 200),
        ({"when": {"request.auth.claims[scope]": ["admin"]}}, {"scope": "read admin"}, 200),
        ({"when": {"request.auth.claims[scope]": ["adm"]}}, {"scope": "read admin"}, 403),
        ({"when": {"request.auth.claims[roles]": ["admin"]}}, {"roles": "read admin"}, 200),
        ({"when": {"request.auth.claims[name]": ["admin"]}}, {"name": "read admin"}, 403),
        ({"when": {"request.auth.audiences": ["web"]}}, {"aud": ["web"]}, 200),
        ({"when": {"request.auth.audiences": ["web"]}}, {"aud": "shop"}, 403),
        ({"when": {"request.auth.presenter": ["app"]}}, {"azp": "app"}, 200),
    ],
)
async def test_a_policy_asks_of_the_token(
    folder: Path,
    backends: dict[str, Backend],
    asks: dict[str, Any],
    claims: dict[str, Any] | None,
    status: int,
) -> None:
    """By an ALLOW policy; a DENY policy of the same refuses whom that lets in."""
    asked_of: dict[str, Any] = {}
    if "source" in asks:
        asked_of["from"] = [{"source": asks["source"]}]
    else:
        asked_of["when"] = [{"key": key, "values": values} for key, values in asks["when"].items()]
    bearer = token(**claims) if claims is not None else ""
    for action, expected in (("ALLOW", status), ("DENY", 200 if status == 403 else 403)):
        async with served(
            folder,
            backends,
            authentication(rule(spaceDelimitedClaims=["roles"])),
            policies=(policy(action, **asked_of),),
        ) as (asked, _):
            assert (await asked(bearer)).status == expected, action


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("true", True), ("false", False), ("True", True), ("tr*", True), ("*se", False), ("true", [1, True]),
        ("5", 5), ("-1.5", -1.5), ("7", ["a", 7.0]), ("5*", 57), ("*7", 57), ("1e3", 1000),
        ("1234567890123456", 1234567890123456),
    ],
)  # fmt: skip
async def test_a_claim_that_is_written_like_a_value_is_denied_and_not_let_in(
    folder: Path, backends: dict[str, Backend], value: str, said: Any
) -> None:
    """Claims are texts: one that is not is told by nobody, so it is what makes the policy stricter."""
    for action, field in itertools.product(("ALLOW", "DENY"), ("values", "notValues")):
        asked_of = {"when": [{"key": "request.auth.claims[vip]", field: [value]}]}
        policies = (policy(action, **asked_of),)
        async with served(folder, backends, authentication(rule()), policies=policies) as (asked, _):
            assert (await asked(token(vip=said))).status == 403, (action, field)
            if action == "DENY" and field == "values":
                assert (await asked(token(vip="another"))).status == 200


async def test_a_route_by_a_header_that_a_token_fills_is_chosen_by_the_token(
    folder: Path, backends: dict[str, Backend]
) -> None:
    to = [{"name": name, "port": 80} for name in ("v1", "v2")]
    admins = {"matches": [{"headers": [{"name": "x-role", "value": "admin"}]}], "backendRefs": to[:1]}
    route = http_route("shop", "r", {"rules": [admins, {"backendRefs": to[1:]}]})
    found = rule(outputClaimToHeaders=[{"header": "x-role", "claim": "role"}])
    async with served(folder, backends, authentication(found), routes=(route,)) as (asked, _):
        for said, role, backend in (("admin", "user", "v2"), ("", "admin", "v1"), ("user", "admin", "v1")):
            answer = await asked(token(role=role), **({"x-role": said} if said else {}))
            assert answer.told["backend"] == backend


async def test_without_a_request_authentication_a_token_says_nothing(
    folder: Path, backends: dict[str, Backend]
) -> None:
    asks = policy(**{"from": [{"source": {"requestPrincipals": ["*"]}}]})
    async with served(folder, backends, policies=(asks,)) as (asked, _):
        assert (await asked(token())).status == 403


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"jwks": "{}"}, "jwks are no keys"),
        ({"jwks": "no json"}, "jwks are no keys"),
        ({"jwks": '{"keys": []}'}, "jwks are no keys"),
        ({"jwks": '{"keys": [{"kty": "RSA"}]}'}, "jwks are no keys"),
        ({"jwks": '{"keys": [{"kty": "RSA", "n": "?", "e": "?"}, {"kty": "EC"}, 7]}'}, "jwks are no keys"),
        ({"jwksUri": "https://lost.test/keys"}, "no keys yet: https://lost.test/keys is asked"),
        ({}, "no keys yet: https://lost.test/.well-known/openid-configuration is asked"),
    ],
)
async def test_tokens_whose_keys_are_not_known_are_refused_and_others_served(
    folder: Path, backends: dict[str, Backend], keys: dict[str, str], why: str
) -> None:
    lost = {"issuer": "https://lost.test", **keys}
    async with served(folder, backends, authentication(lost, rule())) as (asked, told):
        assert (await asked(token(iss="https://lost.test"))).status == 401
        assert (await asked(token())).status == 200
        assert (await asked()).status == 200
        assert f"issuer https://lost.test: {why}, so its tokens are refused" in told[-1].message


async def test_what_is_reduced_or_to_blame_lets_nobody_in_who_writes_what_a_token_would_say(
    folder: Path, backends: dict[str, Backend]
) -> None:
    found = rule(
        fromHeaders=[{"name": "x-jwt"}], outputClaimToHeaders=[{"header": "x-group", "claim": "group"}]
    )
    asks = policy(when=[{"key": "request.headers[x-group]", "values": ["admin"]}])
    for how, good in (("", 200), ("is_reduced", 401), ("is_blamed", 401)):
        also = {how: True} if how else {}
        async with served(folder, backends, authentication(found), policies=(asks,), **also) as (asked, _):
            assert (await asked(**{"x-jwt": token(group="admin")})).status == good
            assert (await asked(**{"x-group": "admin"})).status == 403
            assert (await asked(**{"x-jwt": "a.b.c", "x-group": "admin"})).status == 401


async def test_keys_that_were_fetched_count_as_if_they_stood_in_it(
    folder: Path, backends: dict[str, Backend]
) -> None:
    place = "https://issuer.test/keys"
    found = authentication({"issuer": ISSUER, "jwksUri": place}).with_keys({place: jwks()})
    async with served(folder, backends, found) as (asked, _):
        assert (await asked(token())).status == 200
        assert (await asked(token(OTHER_KEY))).status == 401


def test_one_without_targets_is_nobodys() -> None:
    assert authentication(rule(), selector={"matchLabels": {"app": "web"}}).services == frozenset()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"jwks": "{}"}, "issuer"),
        ({"issuer": "i", "jwks": "{}", "jwksUri": "u"}, "only one of jwks"),
        ({"issuer": "i", "unknown": 1}, "unknown"),
    ],
)
def test_a_spec_that_is_wrong_is_refused(said: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        authentication(said)


@pytest.mark.parametrize("name", ["http", "tcp"])
def test_one_for_ports_that_carry_no_http_is_told_to_look_at_nothing(name: str) -> None:
    world = World()
    world.add_user(
        mesh_service("shop", "web", {80: [Endpoint("127.0.0.1", 9)]}, [ADDRESS]),
        kubernetes_service("shop", "web", {"port": 80, "name": name}),
    )
    world.authentications = [authentication(rule())]
    told = [one.message for one in world.configuration().authentications if one.message]
    nothing = "not honoured: all of it: no port of what it is for carries HTTP"
    assert told == ([] if name == "http" else [nothing])
