"""Manifests drawn from the types that they are read as: what is valid in itself, said of a service web.

Texts are such as have a meaning somewhere, and such as have none.
"""

from __future__ import annotations

from random import Random
from typing import Any, Final

import msgspec
from msgspec import inspect

from pykmesh.manifests.objects import KINDS, Object, from_plain
from pykmesh.manifests.unknown import spec_of

SERVICES: Final = ("web", "v1", "v2")
NAMESPACE: Final = "shop"
PORT: Final = 80
GROUPS: Final = {kind: group for group, kind in KINDS}
TEXTS: Final = (
    *SERVICES, "web.shop.svc.cluster.local", "*.example.com", "example.com", "a.b", "*", "**", "*a", "a*",
    "a*b", "", "/", "/a", "/a/", "/a/b", "//", "/%2f", "x-a", "X-B", "host", "Host", ":path", ":authority",
    "content-length", "transfer-encoding", "x-request-id", "x-forwarded-client-cert", "%REQ(X)%", "%",
    "%%", "{a}", "{", "}", "{*}", "{**}", "/{a=*}/b", "/{a}/{a}", "b c", "é", "日本", ".*", "(?i)a.*", "^a$",
    "(a|b)+", "[a-z]{1,5}", r"\d+", "(?P<n>x)", r"\1", r"\0", "(a)", "a" * 200, "5xx,reset", "503",
    "gateway-error,503", "retriable-status-codes", "http", "https", "HTTP", "GET", "get", "[::1]", "1.2.3.4",
    "user@x", "-a", "a-", "_", "~", '"', "'", "\\", "#", "?", "a?b=c", "a#b", "&", "=", ";", ",", "10s", "1h",
    "0s", "1ms", "100000h", "1", "0", "-1", "https://issuer.example.com", "spiffe://cluster.local/ns/shop/sa/web",
    "cluster.local/ns/shop/sa/web", "NaN", "UNAVAILABLE", "request.headers[x-a]", "source.ip", "mesh",
    "10.0.0.0/8", "::/0", "a,b", "\t", "pkg.Svc", "Svc/Method", "Method",
)  # fmt: skip
DURATIONS: Final = ("1s", "0.5s", "1ms", "10s", "0s", "1h")
_ABOUT_TIME: Final = ("timeout", "delay", "backoff", "interval", "time", "ttl", "maxage", "duration")
_TRIES: Final = 200
_TO_WEB: Final = {"group": "", "kind": "Service", "name": "web"}


def drawn(chance: Random, kind: str, name: str) -> Object:
    """One that is read, of a kind of `KINDS`; for the service web, or of one of its backends."""
    read_as = KINDS[GROUPS[kind], kind]
    for _ in range(_TRIES):
        spec = _aimed(chance, kind, _value(chance, spec_of(read_as), ""))
        try:
            return from_plain({"metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}, read_as)
        except msgspec.ValidationError:
            continue
    raise AssertionError(f"nothing that is drawn is read as {kind}")


def _value(chance: Random, of: Any, name: str) -> Any:
    """`name`: of the field that it is for."""
    match of:
        case inspect.Metadata():
            return _value(chance, of.type, name)
        case inspect.UnionType():
            some = [each for each in of.types if not isinstance(each, inspect.NoneType)]
            return _value(chance, chance.choice(some), name)
        case inspect.StructType():
            share = chance.choice((0.15, 0.3, 0.6))
            taken = [field for field in of.fields if field.required or chance.random() < share]
            return {field.encode_name: _value(chance, field.type, field.encode_name) for field in taken}
        case inspect.StrType() | inspect.CustomType():
            return _text(chance, name.lower())
        case inspect.IntType():
            least, most = of.ge or 0, 2**31 if of.le is None else of.le
            return chance.choice((least, most, chance.randint(least, min(most, least + 100)), PORT, 1, 2))
        case inspect.FloatType():
            return chance.choice((0, 1, 50, 99.9999, 100, 0.00001))
        case inspect.BoolType():
            return chance.random() < 0.5
        case inspect.EnumType():
            return chance.choice([*of.cls]).value
        case inspect.DictType():
            found = ((_value(chance, of.key_type, ""), _value(chance, of.value_type, "")) for _ in "12")
            return dict(found)
        case inspect.VarTupleType() | inspect.ListType():
            return [_value(chance, of.item_type, name) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
    return chance.choice((1, "a", {}))


def _text(chance: Random, name: str) -> str:
    if name in ("host", "hosts") and chance.random() < 0.9:
        return chance.choice(SERVICES)
    if any(word in name for word in _ABOUT_TIME) and chance.random() < 0.9:
        return chance.choice(DURATIONS)
    return "".join(chance.choices(TEXTS, k=chance.choice((1, 1, 1, 1, 1, 2, 3))))


def _aimed(chance: Random, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """For the service web, with backends that there are."""
    for name in ("exportTo", "gateways", "workloadSelector", "selector", "targetRef"):
        spec.pop(name, None)
    match kind:
        case "HTTPRoute" | "GRPCRoute":
            spec["parentRefs"] = [_TO_WEB]
            for rule in spec.get("rules", ()):
                for backend in rule.get("backendRefs", ()):
                    backend |= {"group": "", "kind": "Service", "name": chance.choice(SERVICES), "port": PORT}
                    backend.pop("namespace", None)
        case "VirtualService":
            spec["hosts"] = ["web"]
        case "AuthorizationPolicy" | "RequestAuthentication":
            spec["targetRefs"] = [_TO_WEB]
            for rule in spec.get("jwtRules", ()):
                rule.pop("jwksUri", None)
                rule["jwks"] = '{"keys": []}'
    return spec
