"""Who pods are to waypoints, in real maps: what is said of their addresses, and of whom it was said."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykmesh.contracts.address import decode_address
from pykmesh.contracts.handoff import Identity
from pykmesh.contracts.waypoints import account_name
from pykmesh.kernel import hooks, pins
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import IDENTITY_VALUE, NO_IP, POD_KEY, POD_VALUE, ip_from_text
from services.map_writer.follower import Change
from services.map_writer.identities import Identities
from services.map_writer.mesh import Mesh, Touched
from tests.control.resources import pod

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def pin_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("needs root: maps are made and pinned")
    found = tmp_path_factory.mktemp("maps") / "bpf" / "test"
    pins.prepare(found)
    try:
        fixed = hooks.ProgramSettings("test", 0, hooks.can_set_retval(), has_telemetry=True)
        hooks.Programs(pins.maps_dir(found), {"flows": 65536, "pods": 16, "identities": 16}, fixed).close()
        yield found
    finally:
        subprocess.run(["umount", "--lazy", found], check=True, timeout=10)


class World:
    def __init__(self, pin_dir: Path) -> None:
        self.pods = PinnedMap(pins.maps_dir(pin_dir), "pods")
        self.map = PinnedMap(pins.maps_dir(pin_dir), "identities")
        self.identities = Identities(pin_dir, lambda *_, **__: None)
        self.mesh = Mesh()
        self.identities.follow(self.mesh, Change(True, Touched()))

    def enroll(self, cookie: int, address: str) -> None:
        value = POD_VALUE.pack(ip_from_text(address), NO_IP, 0, 1)
        self.pods.put(POD_KEY.pack(cookie), value)
        self.identities.look()

    def unenroll(self, cookie: int) -> None:
        self.pods.remove(POD_KEY.pack(cookie))
        self.identities.look()

    def say(self, name: str, *addresses: str) -> None:
        """Of a pod; without an address that it is gone."""
        touched, said = Touched(), pod(name, *addresses)
        if addresses:
            self.mesh.put(said.name, decode_address(said.resource.value), touched)
        else:
            self.mesh.remove(said.name, touched)
        self.identities.follow(self.mesh, Change(False, touched))

    def identity(self, cookie: int) -> Identity | None:
        value = self.map.get(POD_KEY.pack(cookie))
        return Identity(*IDENTITY_VALUE.unpack(value)[1:]) if value else None

    @property
    def default(self) -> Identity:
        """Of the pods here: all have one account."""
        found = self.identities
        return Identity(found.namespace_id("shop"), found.account_id(account_name("shop", "default")))


@pytest.fixture
def world(pin_dir: Path) -> Iterator[World]:
    found = World(pin_dir)
    yield found
    for opened in (found.pods, found.map):
        for key, _ in list(opened.items()):
            opened.remove(key)
        opened.close()
    found.identities.close()


def test_a_pod_is_whoever_is_said_to_be_at_its_address(world: World) -> None:
    world.enroll(1, "10.1.0.1")
    assert world.identity(1) is None
    world.say("web-1", "10.1.0.1")
    assert world.identity(1) == world.default
    world.enroll(2, "10.1.0.2")
    world.say("web-2", "10.1.0.2")
    world.say("web-1")
    assert (world.identity(1), world.identity(2)) == (None, world.default)


def test_who_takes_over_an_address_is_not_who_had_it(world: World) -> None:
    world.say("teller-1", "10.1.0.1")
    world.enroll(1, "10.1.0.1")
    assert world.identity(1) == world.default
    world.unenroll(1)
    world.enroll(2, "10.1.0.1")
    assert world.identity(2) is None, "the control plane is slow"
    world.say("web-9", "10.1.0.9")
    assert world.identity(2) is None, "that was of another address"
    world.identities.follow(world.mesh, Change(True, Touched()))
    assert world.identity(2) is None, "the same, read anew"
    world.say("teller-1")
    world.say("web-2", "10.1.0.1")
    assert world.identity(2) == world.default


def test_a_mesh_that_is_read_anew_may_say_who_took_an_address_over(world: World) -> None:
    world.say("teller-1", "10.1.0.1")
    world.enroll(1, "10.1.0.1")
    world.unenroll(1)
    world.enroll(2, "10.1.0.1")
    anew, touched, said = Mesh(), Touched(), pod("web-2", "10.1.0.1")
    anew.put(said.name, decode_address(said.resource.value), touched)
    world.identities.follow(anew, Change(True, touched))
    assert world.identity(2) == world.default


def test_ids_outlive_the_process_and_its_maps_say_what_they_said(world: World, pin_dir: Path) -> None:
    world.say("web-1", "10.1.0.1")
    world.enroll(1, "10.1.0.1")
    other = Identities(pin_dir, lambda *_, **__: None)
    other.look()
    assert other.namespace_id("shop") == world.identities.namespace_id("shop") != other.namespace_id("bank")
    assert world.identity(1) == world.default, "nothing is taken back before the mesh is known"
    other.close()
