"""`python -m services.xds_client`"""

from __future__ import annotations

from pykmesh.contracts.settings import XdsClientSettings
from pykmesh.process import main
from services.xds_client.app import run

if __name__ == "__main__":
    main("xds_client", XdsClientSettings, run)
