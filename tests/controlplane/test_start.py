"""A control plane begins to serve only with a folder that it could read whole: else clients would delete."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from pykmesh.controlplane.process import ManifestsTask
from pykmesh.manifests.parse import ConfigError
from pykmesh.readiness import Readiness

from .ads_client import begun, connected, running
from .manifest_texts import pod, service, write

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("one_event_loop")]

WEB = "shop/web.shop.svc.cluster.local"
WEB_1, WEB_2 = "Kubernetes//Pod/shop/web-1", "Kubernetes//Pod/shop/web-2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return whole(tmp_path / "config")


def whole(folder: Path) -> Path:
    if folder.is_file():
        folder.unlink()
    write(folder / "web.yaml", service("web", clusterIP="10.96.1.1"), pod("web-1", podIP="10.244.1.1"))
    write(folder / "more.yaml", pod("web-2", podIP="10.244.1.2"))
    return folder


def a_link_to_nothing(folder: Path) -> None:
    (folder / "web.yaml").unlink()
    (folder / "web.yaml").symlink_to("nothing")


def text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "web.yaml").write_text(content)


SERVICE = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no YAML": (text("kind: ["), "web.yaml:2: Not YAML: "),
    "no text": (lambda folder: (folder / "web.yaml").write_bytes(b"\xff"), "web.yaml:1: Not UTF-8"),
    "a field that does not fit": (
        text(f"{SERVICE}spec:\n  ports:\n  - port: eighty\n"),
        "web.yaml:6: spec.ports[0].port: Expected `int`, got `str`",
    ),
    "a number that is none": (text(f"{SERVICE}x: !!int abc\n"), "web.yaml:4: Cannot read 'abc' as int"),
    "a link to nothing": (a_link_to_nothing, "web.yaml:0: Cannot be read: No such file"),
    "no folder": (
        lambda folder: folder.rename(folder.with_name("away")),
        ".:0: The folder cannot be listed: No such file",
    ),
    "a file in its place": (
        lambda folder: (folder.rename(folder.with_name("away")), folder.write_text("")),
        ".:0: The folder cannot be listed: Not a directory",
    ),
}


@pytest.mark.parametrize(("break_", "error"), BROKEN.values(), ids=BROKEN)
async def test_it_does_not_listen_until_the_folder_is_whole(
    folder: Path, break_: Callable[[Path], object], error: str
) -> None:
    break_(folder)
    with socket.socket() as held:  # listening here would fail
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        async with begun(folder, listen_port=port) as run:
            (told,) = await run.refusal()
            assert told.startswith(error)
            assert [str(error) for error in run.plane.errors] == [told]
            assert not run.plane.resources
            assert run.port is None
            held.close()
            whole(folder)
            async with connected(await run.serving()) as client:
                await client.subscribe()
                await client.receive()
                assert client.held.keys() == {WEB, WEB_1, WEB_2} == run.plane.resources.keys()
            assert not run.plane.errors


async def test_an_empty_folder_is_waited_for_and_a_file_that_says_nothing_is_an_empty_mesh(
    tmp_path: Path,
) -> None:
    (tmp_path / ".hidden.yaml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "sub").mkdir()
    with capture_logs() as logs:
        async with begun(tmp_path) as run:
            told = [f".:0: No YAML file in {tmp_path} yet (for an empty mesh: one with a comment)"]
            assert await run.refusal() == told == [str(error) for error in run.plane.errors]
            await anyio.sleep(0.1)  # ten looks at the folder
            assert run.port is None
            (tmp_path / "a.yaml").write_text("# nothing\n")
            async with connected(await run.serving()) as client:
                await client.subscribe({WEB: "1"})
                assert (await client.receive()).removed_resources == [WEB]
            assert not run.plane.errors
    assert [entry["first"] for entry in logs if entry["event"] == "not_served"] == told


async def test_an_empty_folder_and_then_a_broken_file_are_told_in_turn(tmp_path: Path) -> None:
    async with begun(tmp_path) as run:
        assert "No YAML file" in str(await run.refusal())
        (tmp_path / "a.yaml").write_text("kind: [")
        assert (await run.refusal())[0].startswith("a.yaml:2: Not YAML: ")
        (tmp_path / "a.yaml").unlink()
        assert "No YAML file" in str(await run.refusal())
        assert run.port is None


async def test_once_it_serves_the_last_file_may_go_like_any_other(folder: Path) -> None:
    async with running(folder) as (plane, port), connected(port) as client:
        await client.subscribe()
        await client.receive()
        for name in ("web", "more"):
            (folder / f"{name}.yaml").unlink()
        while client.held:
            await client.receive()
        assert not plane.resources
        assert not plane.errors


def replaced(folder: Path) -> None:
    """By an empty one, in one step after another."""
    empty = folder.with_name("empty")
    empty.mkdir()
    folder.rename(folder.with_name("away"))
    empty.rename(folder)


async def test_once_it_serves_a_folder_that_is_replaced_by_an_empty_one_takes_nothing_along(
    folder: Path,
) -> None:
    async with running(folder, poll_ms=5) as (plane, port), connected(port) as client:
        await client.subscribe()
        await client.receive()
        replaced(folder)
        await anyio.sleep(0.2)  # many looks at the folder
        assert [str(error) for error in plane.errors] == [
            ".:0: Another folder, and empty: what was in the one before counts until there is a file"
        ]
        assert plane.resources.keys() == {WEB, WEB_1, WEB_2}
        write(folder / "new.yaml", pod("web-2", podIP="10.244.1.2"))
        while client.held.keys() != {WEB_2}:
            await client.receive()


async def test_a_client_of_the_run_before_loses_nothing_by_a_broken_file(folder: Path) -> None:
    async with running(folder) as (_, port), connected(port) as client:
        await client.subscribe()
        await client.receive()
    (folder / "web.yaml").write_text("kind: [")
    async with begun(folder) as run:
        await run.refusal()
        write(folder / "web.yaml", service("web", clusterIP="10.96.1.1"))
        async with connected(await run.serving()) as again:
            await again.subscribe(client.versions)
            response = await again.receive()
            assert response.removed_resources == [WEB_1]
            assert not response.resources


async def test_each_change_of_what_is_in_the_way_is_told(folder: Path) -> None:
    for name in ("web", "more"):
        (folder / f"{name}.yaml").write_text("kind: [")
    async with begun(folder) as run:
        assert [error.partition(":")[0] for error in await run.refusal()] == ["more.yaml", "web.yaml"]
        write(folder / "more.yaml", pod("web-2"))
        assert [error.partition(":")[0] for error in await run.refusal()] == ["web.yaml"]
        (folder / "web.yaml").unlink()
        await run.serving()
        assert run.plane.resources.keys() == {WEB_2}


async def test_a_file_that_breaks_while_it_waits_for_another_is_in_the_way_too(folder: Path) -> None:
    (folder / "web.yaml").write_text("kind: [")
    async with begun(folder) as run:
        await run.refusal()
        (folder / "more.yaml").write_text("kind: [")
        assert len(await run.refusal()) == 2
        write(folder / "web.yaml", pod("web-1"))
        assert [error.partition(":")[0] for error in await run.refusal()] == ["more.yaml"]
        assert run.port is None


async def test_shortages_and_duplicates_are_not_in_the_way(folder: Path) -> None:
    write(folder / "x.yaml", service("a"), service("b"), pod("x"), pod("x"))
    async with running(folder, service_cidr_v4="10.0.0.0/30") as (plane, _):  # one address to give
        assert len(plane.errors) == 2
        assert WEB_1 in plane.resources


async def test_an_object_in_two_files_is_in_the_way_at_the_start_and_taken_over_by_none_later(
    folder: Path,
) -> None:
    twice = folder / "again.yaml"
    write(twice, pod("web-1", podIP="10.244.1.9"))
    async with begun(folder) as run:
        (told,) = await run.refusal()
        assert told.startswith("web.yaml:")
        assert "Pod shop/web-1 is also in again.yaml:1" in told
        twice.unlink()
        async with connected(await run.serving()) as client:
            await client.subscribe()
            await client.receive()
            write(twice, pod("web-1", podIP="10.244.1.9"), pod("web-3", podIP="10.244.1.3"))
            write(folder / "more.yaml", pod("web-4", podIP="10.244.1.4"))
            changed = await client.receive()
            assert [resource.name for resource in changed.resources] == ["Kubernetes//Pod/shop/web-4"]
            assert changed.removed_resources == [WEB_2]
        assert "Pod shop/web-1 is also in web.yaml:" in str(run.plane.errors[0])


async def test_once_it_serves_a_broken_file_counts_as_it_last_was(folder: Path) -> None:
    async with running(folder) as (plane, port), connected(port) as client, connected(port) as late:
        await client.subscribe()
        await client.receive()
        (folder / "web.yaml").write_text("kind: [")
        (folder / "more.yaml").unlink()
        assert (await client.receive()).removed_resources == [WEB_2]
        assert [error.file for error in plane.errors] == ["web.yaml"]
        await late.subscribe()
        await late.receive()
        assert late.held.keys() == {WEB, WEB_1}


def test_readiness_says_which_file_is_in_the_way() -> None:
    readiness = Readiness()
    task = ManifestsTask(readiness)
    error = ConfigError("web.yaml", 36, "spec.ports[0].port", "Expected `int`, got `str`")
    task.wait_for([error, ConfigError("x.yaml", 1, "", "Not UTF-8")])
    assert readiness.pending == [
        "manifests: web.yaml:36: spec.ports[0].port: Expected `int`, got `str` (and 1 more)"
    ]
    task.wait_for([error])
    assert readiness.pending == ["manifests: web.yaml:36: spec.ports[0].port: Expected `int`, got `str`"]
    task.done()
    assert readiness.ready
