"""Compile a loop where numba is installed; otherwise the same function runs as plain Python."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType
from typing import Any, Literal, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])

COMPILED = find_spec("numba") is not None


def load_numba() -> None:
    """Make numba load what its first compilation would, less scipy.linalg; saves 0.15 of 0.3 CPU s.

    It asks for scipy.linalg only to choose how np.convolve sums; np.dot and its like ask for it again when compiled.
    Without the garbage collector, which finds nothing here: another 0.05 s.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        _load_numba()
    finally:
        if collects:
            gc.enable()


def _load_numba() -> None:
    from numba.core.registry import cpu_target  # not every run needs numba: see _Late

    if "numba.np.arraymath" in sys.modules or "scipy.linalg" in sys.modules:
        return
    sys.modules["scipy.linalg"] = cast(Any, None)  # Python's way to say that an import shall fail
    try:
        cpu_target.target_context.refresh()
    finally:
        del sys.modules["scipy.linalg"]


def compiled(function: _Function, *, inline: bool = False) -> _Function:
    """Compile at the first call and keep the machine code on disk; in memory only where no place is writable.

    `inline` puts the function's body into its callers, where numba's own call of it would cost more than it does.
    """
    return cast(_Function, _Late(cast(FunctionType, function), inline)) if COMPILED else function


class _Late:
    """A function that numba compiles when it is called: a run whose masks are all full saves numba's import, 0.14 s."""

    def __init__(self, function: FunctionType, inline: bool) -> None:
        self.function = function
        self.inline: Literal["always", "never"] = "always" if inline else "never"
        self._made: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        return (self._made or self.made())(*args)

    def made(self) -> Callable[..., Any]:
        """Return the compiled function; those that it calls are made first, since numba must find them so."""
        if self._made is None:
            load_numba()
            from numba import njit

            code, names = self.function.__code__, self.function.__globals__
            called = {name: names[name].made() for name in code.co_names if isinstance(names.get(name), _Late)}
            whole = FunctionType(code, {**names, **called}, self.function.__name__) if called else self.function
            try:
                self._made = njit(cache=True, nogil=True, inline=self.inline)(whole)
            except RuntimeError:
                self._made = njit(nogil=True, inline=self.inline)(whole)
        return self._made
