"""Waypoints: which exist, their Envoys, and how those are configured."""
