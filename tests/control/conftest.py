from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from pykmesh.node.mesh import Options
from tests.control.mesh_node import CLIENT, MeshNode, running
from tests.control.recordings import HERE, LOCALITY
from tests.control.scripted_ads import ScriptedAds, serving


class Client(NamedTuple):
    """A control plane, and xds_client as its client; nobody writes maps."""

    plane: ScriptedAds
    node: MeshNode


class Whole(NamedTuple):
    """A control plane, and everything between it and the kernel's maps."""

    plane: ScriptedAds
    node: MeshNode


@pytest.fixture
async def client(tmp_path_factory: pytest.TempPathFactory, one_event_loop: None) -> AsyncIterator[Client]:
    async with serving() as plane:
        alone = {"PYKMESH_MAP_WRITER_GRACE_S": "0"}
        options = Options(xds_address=f"127.0.0.1:{plane.port}", settings=alone)
        async with running(tmp_path_factory.mktemp("client"), options, CLIENT) as node:
            yield Client(plane, node)


@pytest.fixture
async def mesh(tmp_path_factory: pytest.TempPathFactory, one_event_loop: None) -> AsyncIterator[Whole]:
    async with serving() as plane:
        options = Options(
            xds_address=f"127.0.0.1:{plane.port}",
            node_name=HERE["NODE"],
            settings={"PYKMESH_LOCALITY": LOCALITY},
        )
        async with running(tmp_path_factory.mktemp("mesh"), options) as node:
            yield Whole(plane, node)
