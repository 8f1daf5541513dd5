"""Federated methods as compositions of parts; recipes.py lists them all."""
