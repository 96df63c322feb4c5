"""`python -m services.waypoint_mgr`"""

from __future__ import annotations

from pykmesh.contracts.settings import WaypointMgrSettings
from pykmesh.process import main
from services.waypoint_mgr.app import run

if __name__ == "__main__":
    main("waypoint_mgr", WaypointMgrSettings, run)
