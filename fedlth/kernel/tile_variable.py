"""The variant of tiles that the environment names: looked at before a run, so it needs no numba."""

from __future__ import annotations

import os

from fedlth.kernel.tiles import VARIANTS

VARIABLE = "FEDLTH_KERNEL_TILES"


def forced() -> str:
    """Return the variant's name, "" where none is named; raise ValueError where there is no such variant."""
    if why := misnamed():
        raise ValueError(why)
    return os.environ.get(VARIABLE, "")


def misnamed() -> str:
    """Return one line about a name that is no variant's; "" where there is none."""
    name = os.environ.get(VARIABLE, "")
    if not name or name in VARIANTS:
        return ""
    return f"environment variable {VARIABLE} must be one of {', '.join(VARIANTS)} or unset, got {name!r}"
