"""The one error that reading a payload may raise."""


class PayloadError(Exception):
    """The bytes are not exactly a payload that this receiver can use. Nothing was changed by looking at them."""


class ReferenceLost(PayloadError):
    """The payload is whole, but it refers to a mask or values that this receiver does not hold."""
