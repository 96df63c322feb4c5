"""Answers enrolled pods' questions about names of services; all others go to the server that was asked."""
