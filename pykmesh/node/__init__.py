"""One node's mesh, run without containers: the instance, the broker, the supervisor."""
