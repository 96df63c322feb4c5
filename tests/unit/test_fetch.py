"""A page that cannot be had is an error that says why, never taken for its content."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import anyio.to_thread
import pytest

from pykmesh.admin import Admin, Page, Query, as_json
from pykmesh.node.ask import fetch

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_event_loop")]


@pytest.fixture
async def port(one_event_loop: None) -> AsyncIterator[int]:
    """Of a process whose page `/broken` fails, and that is not ready."""
    admin = Admin()

    async def readyz(_: Query) -> Page:
        return as_json({"ready": False}, 503)

    admin.page("/services", lambda: [{"name": "web"}])
    admin.page("/broken", lambda: {}["there is none"])
    admin.route("/readyz", readyz)
    async with anyio.create_task_group() as tasks:
        yield await tasks.start(admin.serve, "127.0.0.1", 0)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("path", "content"), [("/services", [{"name": "web"}]), ("/readyz", {"ready": False})]
)
async def test_a_page_is_its_json_also_of_a_process_that_is_not_ready(
    port: int, path: str, content: object
) -> None:
    assert await anyio.to_thread.run_sync(fetch, port, path) == content


@pytest.mark.parametrize(
    ("path", "why"), [("/broken", "500: KeyError: 'there is none'"), ("/nowhere", "404: no page /nowhere")]
)
async def test_a_page_that_fails_or_is_not_there_is_an_error(port: int, path: str, why: str) -> None:
    with pytest.raises(OSError, match=rf"{path}: HTTP status {why}"):
        await anyio.to_thread.run_sync(fetch, port, path)
