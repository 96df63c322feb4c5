"""Settings come from a file and from the environment; what is wrong is named, with its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pykmesh.contracts import settings
from pykmesh.contracts.settings import (
    EXIT_SETTINGS,
    CommonSettings,
    ControlPlaneSettings,
    DnsProxySettings,
    LoaderSettings,
    MapWriterSettings,
    SettingsError,
    TelemetrySettings,
    WaypointMgrSettings,
    XdsClientSettings,
    load,
    misspelt,
    to_environment,
)

KINDS = [
    XdsClientSettings,
    MapWriterSettings,
    LoaderSettings,
    TelemetrySettings,
    DnsProxySettings,
    WaypointMgrSettings,
    ControlPlaneSettings,
]


@pytest.mark.parametrize("kind", KINDS)
def test_without_anything_the_defaults_hold(kind: type[CommonSettings]) -> None:
    assert load(kind, {}) == kind()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_for_a_process_is_what_it_reads(kind: type[CommonSettings]) -> None:
    written = kind(instance="other", network="east", nats_password_file=Path("/a b"), admin_port=1)
    assert load(kind, to_environment(written)) == written
    assert load(kind, to_environment(kind())) == kind()


def test_the_environment_is_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        'services_max = 10\nendpoints_max = 20\ncgroup_root = "/cg"\ntelemetry = false\nxds_address = "x:1"\n'
    )
    found = load(
        LoaderSettings,
        {"PYKMESH_SETTINGS": str(file), "PYKMESH_ENDPOINTS_MAX": "30", "PYKMESH_PIN_DIR": "/p"},
    )
    wanted = LoaderSettings(
        services_max=10, endpoints_max=30, cgroup_root=Path("/cg"), pin_dir=Path("/p"), telemetry=False
    )
    assert found == wanted


def test_an_empty_variable_unsets_what_may_be_unset(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('xds_root_cert = "/root.pem"\nnode_name = "n"\n')
    environment = {"PYKMESH_SETTINGS": str(file), "PYKMESH_XDS_ROOT_CERT": "", "PYKMESH_NODE_NAME": ""}
    found = load(XdsClientSettings, environment)
    assert found.xds_root_cert is None
    assert found.node_name == ""


@pytest.mark.parametrize("text", ["true", "True", "1"])
def test_yes_has_several_spellings(text: str) -> None:
    assert load(MapWriterSettings, {"PYKMESH_REFUSE_UNENFORCED_POLICY": text}).refuse_unenforced_policy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("admin_port", "many"),
        ("admin_port", ""),
        ("admin_port", "99999"),
        ("report_deadline_s", "soon"),
        ("report_deadline_s", "-1"),
        ("report_deadline_s", "nan"),
        ("in_flight_batches", "1.5"),
        ("in_flight_batches", "0"),
        ("max_message_bytes", str(1 << 31)),
        ("xds_address", "istiod:xds"),
    ],
)
def test_a_wrong_value_in_the_environment_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as error:
        load(XdsClientSettings, {f"PYKMESH_{name.upper()}": value})
    assert str(error.value).startswith(f"PYKMESH_{name.upper()} in the environment is {value!r}: ")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("services_max = 'few'", "services_max", "'few'"),
        ("pin_dir = 5", "pin_dir", "5"),
        ("telemetry = 'perhaps'", "telemetry", "'perhaps'"),
    ],
)
def test_a_wrong_value_in_the_file_is_named_with_the_file(
    tmp_path: Path, line: str, name: str, value: str
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(line)
    with pytest.raises(SettingsError) as error:
        load(LoaderSettings, {"PYKMESH_SETTINGS": str(file)})
    assert str(error.value).startswith(f"{name} in {file} is {value}: ")


@pytest.mark.parametrize("data", [b"a = ", b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, data: bytes | None) -> None:
    file = tmp_path / "settings.toml"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(SettingsError, match=str(file)):
        load(LoaderSettings, {"PYKMESH_SETTINGS": str(file)})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("endpoint_max = 5", "there is no setting endpoint_max (perhaps endpoints_max)"),
        ("Services_Max = 5", "there is no setting Services_Max (perhaps services_max)"),
        ("xyzzy = 5", "there is no setting xyzzy"),
        (
            "pin_dirs = 'a'\n[bpf_loader]\nservices_max = 5",
            "there is no setting pin_dirs (perhaps pin_dir), bpf_loader",
        ),
    ],
)
def test_a_key_that_no_process_has_is_named_with_the_file_and_the_nearest_that_there_is(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as error:
        load(LoaderSettings, {"PYKMESH_SETTINGS": str(file)})
    assert str(error.value) == f"settings file {file}: {said}"


def test_a_variable_that_no_process_has_is_passed_over_and_told_where_it_looks_like_one() -> None:
    environment = {"PYKMESH_ENDPOINT_MAX": "5", "PYKMESH_SETTINGS": "", "PYKMESH_READY_DEADLINE_S": "9"}
    environment |= {"PYKMESH_INSTANCE": "a", "PYKMESH_PORT_15010_TCP_ADDR": "10.96.0.1", "ENDPOINT_MAX": "5"}
    assert load(LoaderSettings, {"PYKMESH_ENDPOINT_MAX": "5"}) == LoaderSettings()
    assert misspelt(environment) == ["PYKMESH_ENDPOINT_MAX (perhaps PYKMESH_ENDPOINTS_MAX)"]


def test_one_file_may_be_for_all_processes(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("services_max = 10\nin_flight_batches = 20\nmetrics_port = 30\npoll_ms = 40\n")
    environment = {"PYKMESH_SETTINGS": str(file)}
    for kind in KINDS:
        load(kind, environment)
    assert load(LoaderSettings, environment).services_max == 10
    assert load(TelemetrySettings, environment).metrics_port == 30
    assert load(ControlPlaneSettings, environment).poll_ms == 40


def test_a_process_ends_at_once_for_a_wrong_file_and_says_why(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("endpoint_max = 5")
    ended = subprocess.run(
        [sys.executable, "-m", "services.bpf_loader"],
        env={**os.environ, "PYKMESH_SETTINGS": str(file)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == EXIT_SETTINGS
    said = f"bpf_loader: settings file {file}: there is no setting endpoint_max (perhaps endpoints_max)\n"
    assert ended.stderr == said


def test_no_two_processes_listen_on_the_same_port() -> None:
    ports = [kind().admin_port for kind in KINDS]
    assert len(set(ports)) == len(ports)
    assert set(KINDS) == set(settings.PROCESSES)
