"""`python -m services.bpf_loader`"""

from __future__ import annotations

from pykmesh.contracts.settings import LoaderSettings
from pykmesh.process import main
from services.bpf_loader.app import run

if __name__ == "__main__":
    main("bpf_loader", LoaderSettings, run)
