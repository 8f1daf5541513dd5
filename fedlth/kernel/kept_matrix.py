"""The kept weights of one matrix as lists, and the products that they take part in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

_NEAR, _TAPS = 64, 10  # features of a panel in the nearest cache beside the rest; kept weights of a chunk
_NONE = np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class Lists:
    """Of every output the inputs of its kept weights, cut into chunks of the inputs.

    starts: (outputs * chunks + 1,) int32; places: (kept,) int32, the inputs.
    """

    starts: np.ndarray
    places: np.ndarray
    chunks: int


@dataclass(eq=False)
class Scratch:
    """Memory that the products of many layers use one after the other."""

    held: dict[str, np.ndarray] = field(default_factory=dict)

    def floats(self, name: str, size: int) -> np.ndarray:
        """Return (size,) float32 of any content, until the next call with this name."""
        if name not in self.held or len(self.held[name]) < size:
            self.held[name] = np.empty(size, np.float32)
        return self.held[name][:size]


class KeptMatrix:
    """The kept weights of a matrix (outputs, inputs); mask: (outputs, inputs) bool."""

    def __init__(self, mask: np.ndarray, scratch: Scratch) -> None:
        from fedlth.kernel import kept_products  # which loads numba

        self.outputs, self.inputs = mask.shape
        self.scratch, self.products = scratch, kept_products
        self.kept = np.flatnonzero(mask).astype(np.int32)
        self.w = np.empty(len(self.kept), np.float32)
        outputs, inputs = np.divmod(self.kept, np.int32(self.inputs))
        # Of 16 bits, as far as they go: numpy sorts these by their digits.
        order = np.argsort(inputs.astype(np.uint16) if self.inputs <= 1 << 16 else inputs, kind="stable")
        self.lists = _listed(outputs, inputs, mask.shape)
        self.back = _listed(inputs[order], outputs[order], mask.shape[::-1])
        self.back_weights = order.astype(np.int32)

    def warm(self) -> None:
        """Load what is compiled; compile it first where it must be."""
        y, panels = self.forward(
            np.ones((1, self.inputs), np.float32), np.ones(self.outputs * self.inputs, np.float32), None
        )
        self.backward(y, panels, None, wants_dx=True)

    def forward(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return y (positions, outputs) of x (positions, inputs), and what `backward` needs of x.

        weight (outputs * inputs,): of which only the kept ones are read; bias (outputs,). All float32, contiguous.
        """
        positions = len(x)
        y, panels = (
            np.empty((positions, self.outputs), np.float32),
            np.empty(_padded(positions) * self.inputs, np.float32),
        )
        self.products.forward(
            x.reshape(-1), y.reshape(-1), weight, _NONE if bias is None else bias, self.kept, self.lists.starts,
            self.lists.places, self.w, panels, self.scratch.floats("y", _padded(positions) * self.outputs),
            positions, self.inputs, self.outputs, self.lists.chunks,
        )  # fmt: skip
        return y, panels

    def backward(self, dy: np.ndarray, panels: np.ndarray, grad: np.ndarray | None, *, wants_dx: bool) -> np.ndarray:
        """Return dx (positions, inputs), empty where it is not wanted; add the kept weights' gradient to `grad`.

        dy: (positions, outputs), of the weights of the last `forward`. grad: (outputs * inputs,).
        """
        positions = len(dy)
        dx = np.empty((positions if wants_dx else 0, self.inputs), np.float32)
        self.products.backward(
            dy.reshape(-1), dx.reshape(-1), _NONE if grad is None else grad, self.kept, self.lists.starts,
            self.lists.places, self.w, panels, self.lists.chunks, self.back.starts, self.back.places,
            self.back_weights, self.back.chunks, self.scratch.floats("packed", len(self.kept)),
            self.scratch.floats("dy", _padded(positions) * self.outputs),
            self.scratch.floats("dx", _padded(positions) * self.inputs), positions, self.inputs, self.outputs,
        )  # fmt: skip
        return dx


def _padded(positions: int) -> int:
    return -(-positions // 16) * 16


def _listed(outputs: np.ndarray, inputs: np.ndarray, shape: tuple[int, ...]) -> Lists:
    """Return the lists of kept weights (outputs, inputs), ascending, in chunks whose inputs stay in the nearest cache.

    A chunk has at least _TAPS kept weights an output, since its partial sums pass through memory.
    """
    density = max(len(inputs) / math.prod(shape), 1e-9)
    chunk = min(shape[1], max(_NEAR, math.ceil(_TAPS / density)))
    chunks = -(-shape[1] // chunk)
    counts = np.bincount(outputs * chunks + inputs // chunk, minlength=shape[0] * chunks)
    return Lists(np.append(0, np.cumsum(counts)).astype(np.int32), inputs, chunks)
