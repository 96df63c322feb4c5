"""The broker of a development node: nats-server on loopback, a user for each process, nothing open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from pykmesh import programs
from pykmesh.contracts.messages import Subject
from pykmesh.node.instance import Instance, InstanceError

MAX_PAYLOAD_BYTES: Final = 8 * 1024 * 1024
MAX_PENDING_BYTES: Final = 256 * 1024 * 1024
# What each process may publish, and what it may hear; answers to requests are allowed besides.
PERMISSIONS: Final[dict[str, tuple[list[Subject], list[Subject]]]] = {
    "xds_client": (
        [Subject.CONFIG_LOG, Subject.MAP_REFUSED],
        [Subject.MAP_REPORT, Subject.CONFIG_SNAPSHOT],
    ),
    "map_writer": (
        [Subject.CONFIG_SNAPSHOT, Subject.MAP_REPORT, Subject.MAP_NAMES],
        [
            Subject.CONFIG_LOG,
            Subject.MAP_REFUSED,
            Subject.MAP_RESOLVE,
            Subject.DNS_RESOLVE,
            Subject.WAYPOINTS,
        ],
    ),
    "telemetry": ([Subject.MAP_RESOLVE], [Subject.MAP_NAMES, Subject.REQUESTS]),
    "dns_proxy": ([Subject.DNS_RESOLVE], []),
    "waypoint_mgr": ([Subject.WAYPOINTS, Subject.REQUESTS], [Subject.MAP_REPORT]),
}


def configuration(host: str, port: int, passwords: dict[str, str]) -> dict[str, Any]:
    """nats-server's configuration, as JSON, which it reads."""
    return {
        "listen": f"{host}:{port}",
        "max_payload": MAX_PAYLOAD_BYTES,
        "max_pending": MAX_PENDING_BYTES,
        "authorization": {"users": [_user(name, password) for name, password in passwords.items()]},
    }


def _user(name: str, password: str) -> dict[str, Any]:
    publish, subscribe = PERMISSIONS[name]
    return {
        "user": name,
        "password": password,
        "permissions": {
            "publish": {"allow": [str(subject) for subject in publish]},
            "subscribe": {"allow": [*(str(subject) for subject in subscribe), f"_INBOX_{name}.>"]},
            "allow_responses": {"max": 1, "expires": "10s"},
        },
    }


def find_server() -> Path:
    """The nats-server beside this Python, else the one on the PATH."""
    found = programs.find("nats-server")
    if found is None:
        raise InstanceError("no nats-server: make setup installs it, or put one on the PATH")
    return found


def write_configuration(instance: Instance) -> Path:
    passwords = {name: instance.secret(name).read_text().strip() for name in PERMISSIONS}
    path = instance.run_dir / "nats.conf"
    try:
        path.touch(0o600)
        path.write_text(json.dumps(configuration("127.0.0.1", instance.ports.nats, passwords), indent=1))
    except OSError as error:
        raise InstanceError(f"{path}: {error.strerror}") from error
    return path
