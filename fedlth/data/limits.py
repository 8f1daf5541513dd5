"""The bounds that settings of data sets and partitions must keep; each error names the setting."""

from __future__ import annotations

from fedlth.errors import wrong
from fedlth.study.parts import is_number as is_number

MAX_TRIES = 2_000  # draws of a partition that must meet a minimum


def check_count(place: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise wrong(place, f"an integer of at least {least}", value)


def check_above_zero(place: str, value: float) -> None:
    if not is_number(value) or value <= 0:
        raise wrong(place, "a number above 0", value)


def check_share(place: str, value: float) -> None:
    if not is_number(value) or not 0 < value <= 1:
        raise wrong(place, "in (0, 1]", value)
