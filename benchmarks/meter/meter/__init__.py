"""Counts what fedlth sends through a Flower grid, without asking fedlth."""
