"""`python -m pykmesh`, which `pykmesh` is."""

from __future__ import annotations

from pykmesh.cli.main import main

if __name__ == "__main__":
    main(prog_name="pykmesh")
