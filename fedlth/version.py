"""fedlth's version, which both ends of a federation must have."""

__version__ = "0.1.0"
