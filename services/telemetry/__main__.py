"""`python -m services.telemetry`"""

from __future__ import annotations

from pykmesh.contracts.settings import TelemetrySettings
from pykmesh.process import main
from services.telemetry.app import run

if __name__ == "__main__":
    main("telemetry", TelemetrySettings, run)
