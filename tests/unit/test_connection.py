"""A token does not leave the node in plaintext."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest

from pykmesh.contracts.settings import XdsClientSettings
from services.xds_client import connection

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_event_loop")]


async def open_with_token(address: str, directory: Path) -> grpc.aio.StreamStreamCall[object, bytes]:
    """Of a stream to an address, without a root certificate."""
    token = directory / "token"
    token.write_text("secret")
    settings = XdsClientSettings(xds_address=address, xds_token_file=token)
    async with connection.open_channel(settings) as channel:
        stream = connection.open_stream(channel, settings)
        stream.cancel()
        return stream


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "[::1]", "::1"])
async def test_a_token_may_go_to_this_host_in_plaintext(host: str, tmp_path: Path) -> None:
    await open_with_token(f"{host}:15010", tmp_path)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1.example.com", "127.example.com", "localhost.example.com", "istiod.istio-system.svc",
        "10.0.0.1", "[2001:db8::1]", "[::2]", "0.0.0.0", "dns:///127.0.0.1.example.com", "",
    ],
)  # fmt: skip
async def test_a_token_goes_nowhere_else_in_plaintext(host: str, tmp_path: Path) -> None:
    with pytest.raises(connection.CredentialsError, match="in plaintext"):
        await open_with_token(f"{host}:15010", tmp_path)
