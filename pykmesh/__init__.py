"""pykmesh: a service mesh data plane without sidecars, in Python and eBPF."""

from __future__ import annotations

__version__ = "0.1.0"
