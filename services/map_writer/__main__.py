"""`python -m services.map_writer`"""

from __future__ import annotations

from pykmesh.contracts.settings import MapWriterSettings
from pykmesh.process import main
from services.map_writer.app import run

if __name__ == "__main__":
    main("map_writer", MapWriterSettings, run)
