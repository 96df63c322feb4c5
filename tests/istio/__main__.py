"""The control plane of these tests, for a try by hand: `python -m tests.istio DIRECTORY`, until Ctrl-C.

It says where it listens; `kubectl` works with the `kubeconfig` in the directory.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path

from tests.istio import binaries
from tests.istio.control_plane import SERVER_NAME, ControlPlane


def main() -> None:
    found = binaries.find()
    if found is None:
        sys.exit(f"no istiod and kube-apiserver in {binaries.FOLDER}: make istio-tools")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    directory = Path(sys.argv[1]).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(KeyboardInterrupt), ControlPlane(found, directory) as plane:
        plane.write_root_certificate(directory / "root-cert.pem")
        sys.stdout.write(
            f"istiod: {plane.xds_address} plaintext, {plane.xds_tls_address} TLS ({SERVER_NAME})\n"
            f"in {directory}: kubeconfig, root-cert.pem, logs\n"
        )
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    main()
