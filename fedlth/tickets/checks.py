"""What a part must be and give back, checked where it is used; an error names the part and what was wanted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlth.errors import StudyError
from fedlth.models.layout import Layout
from fedlth.tickets.scope import survivors

CALLED = {
    "score": "__call__(evidence)",
    "schedule": "__call__(targets)",
    "scope": "__call__(score, alive, layout, density)",
    "dead": "__call__(origin, now)",
    "gate": "__call__(looks)",
    "stop": "__call__(looks)",
    "granularity": "groups(layout)",
}
SAID = {"rewind": ("anchor", "replay_lr"), "dead": ("holds",)}


def check_parts(parts: Mapping[str, object]) -> None:
    """Raise StudyError at a part that lacks what its kind is asked for."""
    for kind, part in parts.items():
        method = CALLED.get(kind)
        lacks = [method] if method and not callable(getattr(part, method.partition("(")[0], None)) else []
        lacks += [name for name in SAID.get(kind, ()) if not hasattr(part, name)]
        if lacks:
            raise StudyError(f"finder.{kind}: {type(part).__name__} must have {lacks[0]}")


def check_chains(schedule: object, chains: object, targets: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """Return a schedule's chains: densities in (0, 1] that never rise, each target in one of them."""
    place = f"finder.schedule: {type(schedule).__name__} must give"
    try:
        told = tuple(tuple(float(d) for d in chain) for chain in chains)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise StudyError(f"{place} chains, a tuple of tuples of densities, got {chains!r}") from None
    if any(not 0 < d <= 1 for chain in told for d in chain):
        raise StudyError(f"{place} densities in (0, 1], got {told}")
    if any(list(chain) != sorted(chain, reverse=True) for chain in told):
        raise StudyError(f"{place} densities that never rise, got {told}")
    missing = [t for t in targets if not any(t in chain for chain in told)]
    if missing:
        raise StudyError(f"{place} chains through every target, got {told} without {missing[0]:g}")
    return told


def check_values(kind: str, part: object, values: object, size: int) -> np.ndarray:
    """Return what a score, a rewind or a dead rule gives: one number a prunable weight."""
    told = np.asarray(values)
    place = f"finder.{kind}: {type(part).__name__} must give ({size},) numbers, one for each prunable weight, got"
    if told.shape != (size,):
        raise StudyError(f"{place} shape {told.shape}")
    if told.dtype.kind not in "fiub":
        raise StudyError(f"{place} {told.dtype}")
    if np.isnan(told).any():
        raise StudyError(f"{place} {np.count_nonzero(np.isnan(told))} that are not a number")
    return told


def check_kept(scope: object, kept: object, alive: np.ndarray, layout: Layout, density: float) -> np.ndarray:
    """Return what a scope keeps: exactly as many as `density` means, among the living, as a mask over groups.

    A scope that counts otherwise says so by a method `counts(layout, density)`, which gives every layer's count.
    """
    told = np.asarray(kept)
    place = f"finder.scope: {type(scope).__name__} must"
    if told.shape != alive.shape or told.dtype != bool:
        raise StudyError(f"{place} give a mask {alive.shape} bool, got {told.shape} {told.dtype}")
    if (told & ~alive).any():
        raise StudyError(f"{place} keep no weight that is pruned, got {np.count_nonzero(told & ~alive)} pruned ones")
    counts = getattr(scope, "counts", None)
    wanted = survivors(layout, density) if counts is None else int(np.sum(counts(layout, density)))
    wanted = min(wanted, int(np.count_nonzero(alive)))
    if np.count_nonzero(told) != wanted:
        raise StudyError(
            f"{place} keep exactly {wanted} of {told.size} at density {density:g}, got {np.count_nonzero(told)}"
        )
    return told
