"""How the kernel's functions are compiled; the only caller of numba.njit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

# "numpy": a division by zero gives inf, as torch does, and costs no test.
_OPTIONS = {"nogil": True, "error_model": "numpy"}

part = njit(**_OPTIONS)
inlined = njit(forceinline=True, **_OPTIONS)


def source_stamp() -> int:
    """Return a number that changes with any source file of this package.

    Numba's disk cache looks only at the file of the cached function, not at the files of the functions it calls.
    An entry point that holds this number in a closure cell is recompiled when any of them changes.
    """
    digest = hashlib.blake2b(digest_size=7)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "big")


def entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile an entry point and keep its machine code on disk; in memory only where no place is writable."""
    try:
        cached: Callable[..., Any] = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        cached = njit(**_OPTIONS)(function)
    return cached
