"""Owns the contents of the configuration maps: follows xds_client, plans, writes, reports."""
