"""The edge to the kernel: layout, pinned maps, ring buffers, program objects."""
