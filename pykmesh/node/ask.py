"""What an instance's processes say of themselves, to commands: quick to import."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any, Final

from pykmesh.node import instance as instances
from pykmesh.node.instance import Instance

PROBE_TIMEOUT_S: Final = 2.0


def fetch(port: int, path: str, timeout_s: float = PROBE_TIMEOUT_S) -> Any:
    """The JSON of a process's administrative page. OSError when nothing answers, or the page cannot be had.

    `/readyz` of a process that is not ready is a page like any other.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        found = json.loads(response.read())
    except (http.client.HTTPException, json.JSONDecodeError) as error:
        raise OSError(f"127.0.0.1:{port}{path}: {error!r}") from error
    except TimeoutError as error:
        raise OSError(f"127.0.0.1:{port}{path}: no answer in {timeout_s:g} s") from error
    finally:
        connection.close()
    not_ready = path == "/readyz" and response.status == http.HTTPStatus.SERVICE_UNAVAILABLE
    if response.status != http.HTTPStatus.OK and not not_ready:
        why = found.get("error") if isinstance(found, dict) else None
        raise OSError(f"127.0.0.1:{port}{path}: HTTP status {response.status}: {why or found}")
    return found


def supervised(instance: Instance) -> dict[str, dict[str, Any]]:
    """What the supervisor says of each process (`Supervisor.state`); nothing where there is none."""
    try:
        with socket.socket(socket.AF_UNIX) as asker:
            asker.settimeout(PROBE_TIMEOUT_S)
            asker.connect(str(instance.supervisor_socket))
            found: dict[str, dict[str, Any]] = json.loads(b"".join(iter(lambda: asker.recv(4096), b"")))
    except (OSError, json.JSONDecodeError):
        return {}
    return found


def broker_version(instance: Instance) -> str | None:
    """What the broker says of itself to each who connects; None when it does not answer."""
    try:
        with socket.create_connection(("127.0.0.1", instance.ports.nats), PROBE_TIMEOUT_S) as asker:
            word, _, text = asker.makefile("rb").readline().partition(b" ")
        return str(json.loads(text)["version"]) if word == b"INFO" else None
    except (OSError, json.JSONDecodeError, KeyError):
        return None


def find(instance: Instance) -> Instance | None:
    """The instance as it runs: below its supervisor, or (containers) on the ports that it would have."""
    found = instances.running(instance.run_dir)
    if found is not None:
        return found
    try:
        status = fetch(instance.ports.bpf_loader, "/status")
    except OSError:
        return None
    return instance if status.get("instance") == instance.name else None
