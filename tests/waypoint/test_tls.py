"""TLS to endpoints through a real Envoy: who is believed, and that nothing goes in plaintext instead."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trustme

from services.waypoint_mgr import root_files
from services.waypoint_mgr.destinations import Destinations, Encryption
from services.waypoint_mgr.envoy import Json, Port
from services.waypoint_mgr.protocols import AppProtocol
from services.waypoint_mgr.root_files import RootFiles
from services.waypoint_mgr.routes import Configuration
from services.waypoint_mgr.tls import SYSTEM_ROOTS, Roots

from .backends import Answer, Backend, ask, serving
from .test_destinations import destination
from .world import World, ads_server, at, gateway, kubernetes_service, mesh_service, named, waypoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

ADDRESS = "127.0.9.2"
ROOT, OTHER = "/etc/mesh/root.pem", "/etc/mesh/other.pem"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@contextmanager
def encrypted(authority: trustme.CA, *names: str) -> Iterator[tuple[Backend, list[str | None]]]:
    """A backend that speaks TLS alone, and the names that it was asked for."""
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    context.sni_callback = lambda _, name, __: asked.append(name)
    with serving("v1") as backend:
        backend.socket = context.wrap_socket(backend.socket, server_side=True)
        yield backend, asked


def world(backend: Backend, port: int, tls: Json, authority: trustme.CA, name: str = "http") -> World:
    made = World()
    own = mesh_service("shop", "web", {port: [backend.endpoint]}, [ADDRESS])
    made.add_user(own, kubernetes_service("shop", "web", {"port": port, "name": name}))
    made.destinations = [destination({"tls": {"mode": "SIMPLE", **tls}})]
    roots = {ROOT: authority, OTHER: trustme.CA(), SYSTEM_ROOTS: authority}
    made.roots = Roots({path: one.cert_pem.bytes().decode() for path, one in roots.items()})
    return made


@asynccontextmanager
async def asked_by(
    folder: Path, authority: trustme.CA, backend: Backend, tls: Json, host: str = "web.example"
) -> AsyncIterator[Answer]:
    async with ads_server(folder / "ads") as server, waypoint(server, folder) as envoy:
        made = world(backend, envoy.port, tls, authority).configuration()
        assert not (await envoy.apply(made)).refusals
        await envoy.ready()
        yield await anyio.to_thread.run_sync(ask, at(ADDRESS), envoy.port, "/", "GET", {"Host": host})


@pytest.mark.parametrize(
    ("tls", "host", "sni", "status"),
    [
        ({"caCertificates": ROOT, "sni": "web.example"}, "web", "web.example", 200),
        ({"caCertificates": ROOT, "sni": "a.wild.example"}, "web", "a.wild.example", 200),
        ({"caCertificates": ROOT, "sni": "other.example"}, "web.example", "other.example", 503),
        ({"caCertificates": ROOT}, "web.example", "web.example", 200),
        ({"caCertificates": ROOT}, "other.example", "other.example", 503),
        ({"caCertificates": ROOT, "subjectAltNames": ["no", "web.example"]}, "web", "web", 200),
        ({"caCertificates": ROOT, "subjectAltNames": ["no"]}, "web.example", "web.example", 503),
        ({"caCertificates": OTHER, "sni": "web.example"}, "web", "web.example", 503),
        ({"sni": "web.example"}, "web", "web.example", 200),
        ({"insecureSkipVerify": True}, "other.example", "other.example", 200),
        ({"insecureSkipVerify": True, "caCertificates": "/nowhere", "sni": "x.y"}, "web", "x.y", 200),
    ],
)  # fmt: skip
async def test_who_answers_is_checked(
    folder: Path, authority: trustme.CA, tls: Json, host: str, sni: str, status: int
) -> None:
    with encrypted(authority, "web.example", "*.wild.example") as (backend, names):
        async with asked_by(folder, authority, backend, tls, host) as answer:
            assert answer.status == status, answer.body
        assert set(names) == {sni}
        assert backend.seen.empty() is (status != 200)


async def test_an_endpoint_that_speaks_none_is_told_nothing(folder: Path, authority: trustme.CA) -> None:
    with serving("v1") as backend:
        async with asked_by(folder, authority, backend, {"caCertificates": ROOT}) as answer:
            assert answer.status == 503
        assert backend.seen.empty()


@pytest.mark.parametrize(
    ("tls", "why"),
    [
        ({"mode": "MUTUAL"}, "trafficPolicy.tls (there are no certificates of clients here"),
        ({"credentialName": "c"}, "trafficPolicy.tls (credentialName is not read"),
        ({"caCrl": "/crl"}, "trafficPolicy.tls (caCrl is not read"),
        ({"caCertificates": "/new.pem"}, "trafficPolicy.tls (/new.pem is not read yet"),
        ({"caCertificates": "/bad.pem"}, "trafficPolicy.tls (/bad.pem: bad"),
        ({}, f"trafficPolicy.tls ({SYSTEM_ROOTS} is not read yet"),
    ],
)
def test_what_cannot_be_checked_is_not_asked(tls: Json, why: str) -> None:
    rules = Destinations(
        gateway(),
        [destination({"tls": {"mode": "SIMPLE", **tls}})],
        roots=Roots({}, {"/bad.pem": "/bad.pem: bad"}),
    )
    found = Port(named("shop", "web"), 80)
    assert rules.encryption(found, AppProtocol.HTTP) == Encryption(is_closed=True)
    assert [why in one.message for one in rules.conditions()] == [False, True]


def test_tcp_has_to_be_told_whose_certificate_it_should_be(authority: trustme.CA) -> None:
    def made(tls: Json) -> Configuration:
        with serving("v1") as backend:
            return world(backend, 80, {"caCertificates": ROOT, **tls}, authority, "tcp").configuration()

    (closed,) = made({}).assignments.values()
    assert closed["endpoints"] == []
    told = [one.message for one in made({}).destinations if one.type == "PartiallyInvalid"]
    said = "tls of TCP port 80 (without sni or subjectAltNames: its endpoints get nothing)"
    assert told == [f"not honoured: {said}"]
    for named_by in (
        {"sni": "web.example"},
        {"subjectAltNames": ["web.example"]},
        {"insecureSkipVerify": True},
    ):
        found = made(named_by)
        assert [one.type for one in found.destinations] == ["Accepted"]
        (assignment,), (cluster,) = found.assignments.values(), found.clusters.values()
        assert assignment["endpoints"] != []
        assert cluster["transportSocket"]["name"] == "envoy.transport_sockets.tls"


def test_names_are_of_three_kinds_and_http2_is_agreed_upon() -> None:
    names = ["web.example", "spiffe://cluster.local/ns/a/sa/b", "10.0.0.1", "fd00::1"]
    rule = destination({"tls": {"mode": "SIMPLE", "subjectAltNames": names}})
    rules = Destinations(gateway(), [rule], roots=Roots({SYSTEM_ROOTS: "roots"}))
    socket, options, _ = rules.encryption(Port(named("shop", "web"), 80), AppProtocol.HTTP2)
    common: dict[str, Any] = socket["transportSocket"]["typedConfig"]["commonTlsContext"]
    kinds = [each["sanType"] for each in common["validationContext"]["matchTypedSubjectAltNames"]]
    assert kinds == ["DNS", "URI", "IP_ADDRESS", "IP_ADDRESS"]
    assert common["alpnProtocols"] == ["h2"]
    assert options == {"upstreamHttpProtocolOptions": {"autoSni": True, "autoSanValidation": False}}


async def test_files_of_roots_are_read_again_and_a_bad_one_takes_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(root_files, "LOOK_S", 0.02)
    good, missing = tmp_path / "good.pem", tmp_path / "missing.pem"
    first, second = (trustme.CA().cert_pem.bytes() for _ in range(2))
    good.write_bytes(first)
    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    files = RootFiles(changed)

    async def until(found: bytes, error: str) -> None:
        with anyio.fail_after(10):
            while (files.roots.found.get(str(good)), files.roots.errors.get(str(good), "")) != (  # noqa: ASYNC110
                found.decode(),
                error and f"{good}: {error}",
            ):
                await anyio.sleep(0.01)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(files.run)
        files.want([str(good), str(missing)])
        await until(first, "")
        assert files.roots.errors == {str(missing): f"{missing}: No such file or directory"}
        good.write_text("-----BEGIN CERTIFICATE-----\nnone")
        await until(first, "no certificates in PEM")
        good.write_bytes(b"\xff")
        await until(first, "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte")
        good.write_bytes(second)
        await until(second, "")
        before = changes
        await anyio.sleep(0.1)
        assert changes == before
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        files.want([str(good), str(fifo)])
        with anyio.fail_after(10):
            while str(fifo) not in files.roots.errors:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert files.roots.errors[str(fifo)] == f"{fifo}: no regular file"
        files.want([])
        with anyio.fail_after(10):
            while files.roots != Roots():  # noqa: ASYNC110
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
