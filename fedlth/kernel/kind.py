"""What a kind of layer is: how it is read from torch, its loops, what they may reach, and its channels in a ticket.

A kind is one file in kinds/, and its name in the table there: the other files ask its fields, and do not change. No
Kind are convolutions and linear layers, of whose weights a ticket keeps some, and choices of channels (shrink.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedlth.kernel.reach import Reach, same_shape
from fedlth.kernel.table import Op

Loop = Callable[..., None]


def _none(op: Op) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of layer without a matrix of weights.

    number: what stands in the row's column KIND; name: what `fedlth check` says.
    modules: by torch module, what reads one: (reader, its name, the module, its input) -> its output, or Unsupported.
    functions, methods: by function of torch, or method of a tensor, what reads a call: (reader, *its arguments).
    loops: returns the compiled forward(work, w, scale, row, lanes) and backward(work, w, grad, scale, row, lanes),
    whose scale is (1,) float32, the layer's Op.scale. It imports numba, which reading must not. A backward adds to the
    input's gradient where row[ACCUMULATE], else overwrites it whole.
    check: wants what the loops reach inside; that the input, the output and their gradients are, has been seen.
    stats: how many vectors of lanes, at row[STATS], the forward keeps for the backward.
    channels: what a ticket's dropped channels may do. "kept": a channel depends on the same one of the input, and
    equals it where that is constant, so that it is folded. "apart": it depends on it alone; constants are computed.
    "joint": it depends on others, or has parameters: all channels stay.
    clips: the forward clips at zero where row[RELU], so that a relu behind it needs no pass of its own. The output's
    gradient has then been clipped before the backward, but for a max pool, which does so itself.
    """

    number: int
    name: str
    loops: Callable[[], tuple[Loop, Loop]]
    channels: Literal["kept", "apart", "joint"]
    modules: Mapping[type, Callable[..., Any]] = field(default_factory=dict)
    functions: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    check: Callable[[Reach], None] = same_shape
    stats: Callable[[Op], int] = _none
    clips: bool = False
