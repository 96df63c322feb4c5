"""Owns the existence of programs, maps, links and pins, and which cgroups are enrolled."""
