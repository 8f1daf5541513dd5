"""Transports: ways to get `client_step` done. The in-process engine is the definition."""
