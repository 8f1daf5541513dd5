"""Is an aggregation rule from outside the package to be believed? Tried on made-up contributions before a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.methods.aggregate import Aggregate, Contribution, join
from fedlth.methods.client_update import UPDATE
from fedlth.models.layout import Layout, Params
from fedlth.storage import store
from fedlth.storage.server_state import ServerState
from fedlth.wire.payload import Content


def check_rule(
    rule: Aggregate, state: ServerState, layout: Layout, sends: Mapping[str, tuple[str, Layout]], count: int, place: str
) -> None:
    """Join `count` made-up contributions twice; raise StudyError where a method's own rule cannot be believed.

    `sends` are kind and layout of each message that comes up, by name.

    Equal calls must give equal results, or a resumed run ends in others without a word. Rules of this package are
    held to that by its tests, but the mean inside one may be the user's (federate.join).
    """
    mean: Any = getattr(rule, "mean", None)
    if hasattr(mean, "result"):
        check_rule(mean, state, layout, {UPDATE: ("values", layout)}, count, f"{place}: its mean {type(mean).__name__}")
    if type(rule).__module__.startswith("fedlth."):
        return
    state = ServerState(Params(_read_only(state.theta.floats), _read_only(state.theta.ints)))
    made = [(name, _made_up(kind, of, state.theta)) for name, (kind, of) in sends.items()]
    came = [Contribution(client, 10 + client, made[0][1], dict(made[1:])) for client in range(count)]
    try:
        found = [join(rule, state, came, layout) for _ in range(2)]
        bits = [_bits(one) for one in found]
    except Exception as error:  # the user's code may raise anything
        raise StudyError(f"{place} fails: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if bits[0] != bits[1]:
        raise StudyError(
            f"{place} must give equal results for equal input; what it remembers from round to round belongs into the "
            "memory of the state that it returns"
        )
    new = found[0].theta
    for name, got, wanted in (("floats", new.floats, state.theta.floats), ("ints", new.ints, state.theta.ints)):
        if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
            raise StudyError(f"{place} must return {name} {wanted.dtype} {wanted.shape}, got {got.dtype} {got.shape}")


def _made_up(kind: str, layout: Layout, theta: Params) -> Content:
    """Return what a client might send: the state a little moved, or other numbers where the layout is another."""
    mask = _read_only(np.ones(layout.num_prunable, bool))
    if kind == "mask":
        return Content(mask, None, None)
    if layout.num_floats != theta.floats.size:
        return Content(mask, _read_only(np.linspace(0, 1, layout.num_floats, dtype=np.float32)), np.zeros(0, np.int64))
    return Content(mask, _read_only(theta.floats + np.float32(0.01)), theta.ints)


def _read_only(values: np.ndarray) -> np.ndarray:
    """Return a view through which a rule cannot change what it was given."""
    view = values.view()
    view.flags.writeable = False
    return view


def _bits(state: ServerState) -> bytes:
    """Return a state as its checkpoint has it; raises where an array cannot be kept."""
    return store.pack(
        {"floats": state.theta.floats, "ints": state.theta.ints, **{f"memory/{k}": v for k, v in state.memory.items()}}
        | ({} if state.mask is None else {"mask": state.mask.astype(np.uint8)})
    )
