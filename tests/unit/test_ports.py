"""Ports that an instance is given: nobody else is, and its own processes listen on them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykmesh.node import instance
from pykmesh.node.instance import InstanceError, Ports, ports_of_no_client, reserve_ports

FIRST, COUNT = 18_000, 12


@pytest.fixture(autouse=True)
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only a few, which no other test is given; what was reserved is given back at the end."""
    clients = tmp_path / "ip_local_port_range"
    clients.write_text(f"{FIRST + COUNT} 65535")
    monkeypatch.setattr(instance, "FREE_FROM", FIRST)
    monkeypatch.setattr(instance, "CLIENT_PORTS", clients)
    monkeypatch.setattr(instance, "_reserved", reserved := [])
    yield
    for each in reserved:
        os.close(each)


def test_no_port_is_given_twice() -> None:
    first = ports_of_no_client(3)
    with pytest.raises(InstanceError, match=f"no {COUNT - 2} ports are free"):
        ports_of_no_client(COUNT - 2)
    assert len(first) == len(set(first)) == 3


def test_who_is_told_a_reserved_port_listens_there() -> None:
    (port,) = ports_of_no_client(1)
    reserve_ports(Ports(metrics=port), ["metrics"])
    with socket.create_server(("127.0.0.1", port)), pytest.raises(InstanceError, match=f"port {port} "):
        reserve_ports(Ports(metrics=port), ["metrics"])


def test_a_port_stays_reserved_while_nobody_listens() -> None:
    (port,) = ports_of_no_client(1)
    with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
        pass
    assert port not in ports_of_no_client(COUNT - 1)
