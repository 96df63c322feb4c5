"""A mesh to look at: pods made of network namespaces and cgroups, servers and clients in them."""
