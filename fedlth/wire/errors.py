"""The one exception of the decoder."""


class PayloadError(Exception):
    """A payload that must not be used: too long, damaged, of another schema, or not finite."""
