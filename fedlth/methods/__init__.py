"""Federated methods as compositions of parts; table.py lists them all."""
