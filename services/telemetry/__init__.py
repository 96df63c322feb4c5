"""Counts what the programs record: drains the ring, reads counters, serves metrics and live flows."""
