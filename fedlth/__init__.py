"""Federated personalised lottery tickets: one study file in, a leaderboard with true bytes out."""

__version__ = "0.1.0"
