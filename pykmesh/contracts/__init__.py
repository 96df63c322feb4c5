"""What the processes agree on: subjects, messages, settings, ports. Versioned; pinned by golden bytes."""
