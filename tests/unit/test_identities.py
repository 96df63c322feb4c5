"""Who pods are to waypoints, in real maps: what is said of their addresses, and of whom it was said."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykmesh.contracts.address import decode_address
from pykmesh.contracts.handoff import Identity, MeshKey, read_mesh_key
from pykmesh.contracts.settings import SettingsError
from pykmesh.contracts.waypoints import account_name
from pykmesh.kernel import hooks, pins
from pykmesh.kernel.maps import PinnedMap
from pykmesh.kernel.records import (
    HANDOFF_SECRET,
    IDENTITY_SECRET_BYTES,
    IDENTITY_SECRET_KEY,
    IDENTITY_VALUE,
    NO_IP,
    POD_KEY,
    POD_VALUE,
    ip_from_text,
)
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


def test_who_takes_over_an_address_is_somebody_when_his_health_alone_is_told(world: World) -> None:
    world.say("web-0", "10.1.0.1")
    world.enroll(1, "10.1.0.1")
    world.unenroll(1)
    world.enroll(2, "10.1.0.1")
    assert world.identity(2) is None
    found, touched = pod("web-0", "10.1.0.1", healthy=False), Touched()
    world.mesh.put(found.name, decode_address(found.resource.value), touched)
    assert not touched.places
    world.identities.follow(world.mesh, Change(False, touched))
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


@pytest.fixture
def key(tmp_path: Path) -> MeshKey:
    path = tmp_path / "mesh.key"
    path.write_text("k" * 32 + "\n")
    return read_mesh_key(path)


def test_nodes_with_the_same_key_have_the_same_ids(world: World, pin_dir: Path, key: MeshKey) -> None:
    """Who has another one is nobody until those have heard that are told ids, also after another start."""
    world.say("web-1", "10.1.0.1")
    world.enroll(1, "10.1.0.1")
    for _ in range(2):
        changed = Identities(pin_dir, lambda *_, **__: None, key)
        changed.look()
        changed.follow(world.mesh, Change(True, Touched()))
        assert (world.identity(1), handoff_secret(pin_dir)) == (None, bytes(HANDOFF_SECRET.size))
        assert changed.namespace_id("shop") != world.identities.namespace_id("shop")
    changed.withheld_until = time.monotonic()
    changed.look()
    same = Identities(pin_dir, lambda *_, **__: None, key)
    same.look()
    same.follow(world.mesh, Change(True, Touched()))
    own = Identity(same.namespace_id("shop"), same.account_id(account_name("shop", "default")))
    assert (world.identity(1), handoff_secret(pin_dir)) == (own, key.handoff)
    world.identities = Identities(pin_dir, lambda *_, **__: None)
    assert handoff_secret(pin_dir) == bytes(HANDOFF_SECRET.size), "no key any more"
    assert world.identities.namespace_id("shop") == same.namespace_id("shop")


def test_a_node_that_never_had_a_key_begins_with_it_at_once(pin_dir: Path, key: MeshKey) -> None:
    with PinnedMap(pins.maps_dir(pin_dir), "identity_secrets") as secrets:
        before = secrets.get(IDENTITY_SECRET_KEY) or b""
        secrets.put(IDENTITY_SECRET_KEY, bytes(IDENTITY_SECRET_BYTES))
        Identities(pin_dir, lambda *_, **__: None, key).close()
        assert handoff_secret(pin_dir) == key.handoff
        secrets.put(IDENTITY_SECRET_KEY, before)


def test_what_is_no_key_is_said(tmp_path: Path) -> None:
    path = tmp_path / "mesh.key"
    with pytest.raises(SettingsError, match=r"mesh\.key: No such file"):
        read_mesh_key(path)
    path.write_text("short\n")
    with pytest.raises(SettingsError, match="has 5 bytes, not the 32"):
        read_mesh_key(path)


def handoff_secret(pin_dir: Path) -> bytes | None:
    with PinnedMap(pins.maps_dir(pin_dir), "handoff_secrets") as secrets:
        return secrets.get(IDENTITY_SECRET_KEY)


def test_ids_outlive_the_process_and_its_maps_say_what_they_said(world: World, pin_dir: Path) -> None:
    world.say("web-1", "10.1.0.1")
    world.enroll(1, "10.1.0.1")
    other = Identities(pin_dir, lambda *_, **__: None)
    other.look()
    assert other.namespace_id("shop") == world.identities.namespace_id("shop") != other.namespace_id("bank")
    assert world.identity(1) == world.default, "nothing is taken back before the mesh is known"
    other.close()
