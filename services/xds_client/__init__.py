"""Owns the conversation with the control plane: streams, nonces, answers, versions, credentials."""
