"""How the kernel's functions are compiled; the only caller of numba.njit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba.extending
from numba import njit

from fedlth.kernel.late_jit import load_numba

_Function = TypeVar("_Function", bound=Callable[..., Any])

load_numba()

# "numpy": a division by zero gives inf, as torch does, and costs no test.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# A part is only called by compiled code: no wrappers for Python, and nothing that it could allocate to count.
_PART: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}

_COMPILED = (  # and all in kinds/
    "arithmetic",
    "columns",
    "constants",
    "dense_forward",
    "fitting",
    "jit",
    "kept_form",
    "kept_products",
    "loop",
    "pointwise",
    "reduce",
    "sparse",
    "tiles",
    "vectors",
    "weights",
)


def part(function: _Function) -> _Function:
    """Compile a function that compiled code calls."""
    return cast(_Function, njit(**_PART)(function))


def inlined(function: _Function) -> _Function:
    """The same, with its body put in place of each call: tiles must not pass through memory."""
    return cast(_Function, njit(forceinline=True, **_PART)(function))


def pasted(function: _Function) -> _Function:
    """Compile a function as a part of its callers' source: else each link of a chain is compiled with all behind it."""
    return cast(_Function, njit(inline="always", **_PART)(function))


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Numba's decorator, whose own type counts the typing context as an argument of the call."""
    return cast(Callable[..., Any], numba.extending.intrinsic(function))


def probe(function: _Function) -> _Function:
    """Compile a function that is only timed, in memory."""
    return cast(_Function, njit(**_OPTIONS)(function))


def source_stamp(tiles: str = "") -> int:
    """Return a number that changes with any source file that is compiled, and with the variant of tiles.

    Numba's disk cache looks only at the file of the cached function, not at the files of the functions it calls.
    An entry point that holds this number in a closure cell is recompiled when any of them changes.
    """
    digest = hashlib.blake2b(tiles.encode(), digest_size=7)
    here = Path(__file__).parent
    for file in [*(here / f"{name}.py" for name in _COMPILED), *sorted((here / "kinds").glob("*.py"))]:
        digest.update(file.read_bytes())
    return int.from_bytes(digest.digest(), "big")


def cache_folder() -> Path | None:
    """Return where numba keeps the machine code of this folder's functions; None where no place is writable."""
    try:
        place = njit(cache=True)(source_stamp).stats.cache_path
    except RuntimeError:
        return None
    return Path(place) if place else None


def entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile an entry point and keep its machine code on disk; in memory only where no place is writable."""
    try:
        cached: Callable[..., Any] = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        cached = njit(**_OPTIONS)(function)
    return cached
