"""A run: session, rounds, server, client step, messages."""
