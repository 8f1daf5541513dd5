"""Compile a loop where numba is installed; otherwise the same function runs as plain Python."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])

COMPILED = find_spec("numba") is not None


def compiled(function: _Function) -> _Function:
    """Compile at the first call and keep the machine code on disk; in memory only where no place is writable."""
    if not COMPILED:
        return function
    from numba import njit

    try:
        return cast(_Function, njit(cache=True, nogil=True)(function))
    except RuntimeError:
        return cast(_Function, njit(nogil=True)(function))
