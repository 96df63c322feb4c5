"""The embedded control plane: a folder of Kubernetes and Istio YAML, served as a mesh over delta ADS.

For a node without istiod, and as a peer for tests. The way of the data, each step a module:

    folder      files that changed, with the last good state of broken ones
    manifests   YAML to objects; errors say file, line and field
    allocate    addresses for objects that name none
    translate   objects to messages, as istiod says them (services, workloads, dialect)
    snapshot    messages to named, versioned resources, and what differs between two states
    server      delta ADS to any number of clients
    control_plane   puts these together and runs them
"""
