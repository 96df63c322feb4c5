"""The pods of the test: `client`, and `web`, which answers on port 8080. They live until this is told to end.

`python -m tests.compose.pods FILE` writes their directories and namespaces to FILE, for a shell to read.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from pykmesh.demo.pods import Pod, PodNetwork
from pykmesh.kernel.cgroups import find_root

CLIENT, WEB = 2, 3


def words(pod: Pod) -> str:
    return (
        f"{pod.name}_cgroup={pod.cgroup}\n{pod.name}_netns={pod.netns}\n{pod.name}_address={pod.address4}\n"
    )


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with PodNetwork("pods", find_root(), "10.77.0", "fd77:") as network:
        client, web = network.add("client", CLIENT), network.add("web", WEB)
        endpoint = web.spawn(
            sys.executable, "-m", "pykmesh.demo.endpoint", "web-1", "--http", "8080", stdout=subprocess.PIPE
        )
        assert endpoint.stdout is not None
        assert endpoint.stdout.readline() == b"ready\n"
        temporary = Path(sys.argv[1]).with_suffix(".new")
        temporary.write_text(words(client) + words(web))
        temporary.rename(sys.argv[1])
        endpoint.wait()


if __name__ == "__main__":
    main()
