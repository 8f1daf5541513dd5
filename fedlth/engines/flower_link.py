"""The thinnest link that devices are served over, and the time that messages may take on it."""

from __future__ import annotations

from fedlth.engines.flower_record import PIECE_BYTES

# Flower 1.41's client sends two requests at a time, and sends one again whose answer has not come after 30 s. So both
# pieces must cross in that time. A quarter is for what is lost and for what TLS and HTTP add; and since two connections
# on a link that loses packets do not get equal shares, the slower piece may take so much longer than the mean.
AT_ONCE, ANSWER_S, OVERHEAD, UNEVEN = 2, 30.0, 1.25, 1.6
THINNEST_BYTES_S = UNEVEN * OVERHEAD * AT_ONCE * PIECE_BYTES / ANSWER_S


def crossing_s(size: float, bytes_s: float = THINNEST_BYTES_S) -> float:
    """Return the seconds that so many bytes of messages may take on a link, losses of some 5 % and all."""
    return OVERHEAD * size / bytes_s


def no_link(size: float) -> float:
    """Return the seconds where nothing is between the two ends."""
    return 0.0
