"""Kubernetes, Istio and Gateway API objects, read from a folder of YAML files that is watched."""
