"""Compile a loop where numba is installed; otherwise the same function runs as plain Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])

COMPILED = find_spec("numba") is not None


def load_numba() -> None:
    """Make numba load what its first compilation would, less scipy.linalg; saves 0.15 of 0.3 CPU s.

    It asks for scipy.linalg only to choose how np.convolve sums; np.dot and its like ask for it again when compiled.
    """
    if "numba.np.arraymath" in sys.modules or "scipy.linalg" in sys.modules:
        return
    from numba.core.registry import cpu_target

    sys.modules["scipy.linalg"] = cast(Any, None)  # Python's way to say that an import shall fail
    try:
        cpu_target.target_context.refresh()
    finally:
        del sys.modules["scipy.linalg"]


def compiled(function: _Function) -> _Function:
    """Compile at the first call and keep the machine code on disk; in memory only where no place is writable."""
    if not COMPILED:
        return function
    from numba import njit

    try:
        return cast(_Function, njit(cache=True, nogil=True)(function))
    except RuntimeError:
        return cast(_Function, njit(nogil=True)(function))
