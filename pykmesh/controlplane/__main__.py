"""`python -m pykmesh.controlplane`"""

from __future__ import annotations

from pykmesh.controlplane.process import start

if __name__ == "__main__":
    start()
