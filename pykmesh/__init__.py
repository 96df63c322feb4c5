"""pykmesh: a service mesh data plane without sidecars, in Python and eBPF."""

from __future__ import annotations

import os

__version__ = "0.1.0"

# No linear algebra is done here, and a thread for each core, from the first import of numpy on, is dear.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
