"""Numbers as people read them: points, bytes, FLOPs; one rounding rule for tables, pages and terminals."""

from __future__ import annotations

import math

from fedlth.report.intervals import Interval

NOTHING = "–"
_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def percent(share: float | None, *, digits: int = 1) -> str:
    """Return a share as a percentage without its sign: 0.8714 is 87.1."""
    if share is None or math.isnan(share):
        return NOTHING
    return f"{100 * share:.{digits}f}"


def points(difference: float) -> str:
    """Return a difference of shares in signed points: 0.031 is +3.1; a rounded zero has no sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def signed(value: float) -> str:
    """Return a correlation or an effect with its sign and two decimals."""
    return f"{value:+.2f}".replace("-", "−")


def bounds(found: Interval, *, signed: bool = False) -> str:
    """Return an interval as [low, high], in percent or signed points."""
    if math.isnan(found.low):
        return NOTHING
    ends = (points(found.low), points(found.high)) if signed else (percent(found.low), percent(found.high))
    return f"[{ends[0]}, {ends[1]}]"


def scaled(amount: float | None, unit: str) -> str:
    """Return an amount with three digits and a decimal prefix: (12_345_678, "B") is 12.3 MB."""
    if amount is None:
        return NOTHING
    size = abs(amount)
    for step, prefix in _STEPS:
        if size >= 0.9995 * step:
            return f"{three_digits(amount / step)} {prefix}{unit}"
    return f"{amount:.0f} {unit}"


def three_digits(value: float) -> str:
    """Return a value in [1, 1000) with three significant digits and no exponent."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def count(number: float) -> str:
    """Return a whole number plainly, any other with one decimal."""
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.1f}"
