"""One node's mesh, run without containers: the instance's directories and ports, the broker, the supervisor."""
