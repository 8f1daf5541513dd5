"""The kept weights of one layer as lists, and the products that they take part in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fedlth.kernel.aligned import aligned
from fedlth.kernel.kept_form import LINEAR, Convolution, Form, Pair, form

_NEAR, _TAPS = 96, 20  # tiles of a panel in the nearest cache beside the rest; kept weights of a chunk at least
_NONE = np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class Lists:
    """Of every output the inputs of its kept weights, cut into chunks of the inputs; a chunk's outputs lie together.

    starts: (chunks * outputs + 1,) int32; channels, taps: (kept,), the inputs and their pixels of the window.
    """

    starts: np.ndarray
    channels: np.ndarray
    taps: np.ndarray
    chunks: int

    def places(self, plane: int, taps: np.ndarray) -> np.ndarray:
        """Return (kept,) int32, where the inputs lie in a panel."""
        found: np.ndarray = (self.channels * np.int32(plane) + taps[self.taps]).astype(np.int32)
        return found


@dataclass(eq=False)
class Scratch:
    """Memory that the products of many layers use one after the other."""

    held: dict[str, np.ndarray] = field(default_factory=dict)

    def floats(self, name: str, size: int) -> np.ndarray:
        """Return (size,) float32 of any content, until the next call with this name."""
        if name not in self.held or len(self.held[name]) < size:
            self.held[name] = aligned(size)
        return self.held[name][:size]


@dataclass(frozen=True, eq=False)
class Panels:
    """What `backward` needs of a forward pass."""

    x: np.ndarray
    form: Form
    places: np.ndarray
    back_places: np.ndarray


class KeptMatrix:
    """The kept weights of a layer; mask: (outputs, inputs of a group, height and width of a window) bool.

    A linear layer's mask is (outputs, inputs). moved: the weights lie in memory with the inputs innermost. `kept`
    (kept,) int32 says where in its layer's memory each kept weight lies, in the order of the lists.
    """

    def __init__(self, mask: np.ndarray, scratch: Scratch, layer: Convolution = LINEAR, *, moved: bool = False) -> None:
        from fedlth.kernel import kept_products  # which loads numba

        self.outputs, within = mask.shape[:2]
        self.layer, self.inputs, area = layer, within * layer.groups, math.prod(layer.window)
        self.scratch, self.products = scratch, kept_products
        flat = np.flatnonzero(mask).astype(np.int32)
        rows, taps = np.divmod(flat, np.int32(area))
        outputs, inputs = np.divmod(rows, np.int32(within))
        density, among = max(len(flat) / max(1, mask.size), 1e-9), self.outputs // layer.groups
        chunk, back_chunk = (_chunk(channels, layer, density) for channels in (within, among))
        order = _order(inputs // np.int32(chunk))
        outputs, inputs, taps = outputs[order], inputs[order], taps[order]
        self.kept = (outputs * np.int32(area) + taps) * np.int32(within) + inputs if moved else flat[order]
        self.w = aligned(len(flat))
        channels = outputs // np.int32(among) * np.int32(within) + inputs
        self.lists = _listed(inputs // np.int32(chunk), outputs, channels, taps, self.outputs, -(-within // chunk))
        chunks = outputs % np.int32(among) // np.int32(back_chunk)
        self.back_weights = _order(chunks * np.int32(self.inputs) + channels)
        chunks, channels, outputs, taps = (one[self.back_weights] for one in (chunks, channels, outputs, taps))
        self.back = _listed(chunks, channels, outputs, taps, self.inputs, -(-among // back_chunk))
        self._forms = dict[tuple[Pair, bool], tuple[Form, np.ndarray, np.ndarray]]()

    def warm(self) -> None:
        """Load what is compiled; compile it first where it must be."""
        x = np.ones((1, self.inputs), np.float32)
        y, panels = self.forward(x, np.ones(int(self.kept.max(initial=0)) + 1, np.float32), None)
        self.backward(y, panels, None, wants_dx=True)

    def forward(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray | None,
        size: Pair = (1, 1),
        *,
        channels_last: bool = False,
    ) -> tuple[np.ndarray, Panels]:
        """Return y (N, outputs * its size) of x (N, inputs * size), and what `backward` needs of x.

        weight: the layer's memory, of which only the kept ones are read; bias (outputs,). All float32, contiguous.
        channels_last: of the maps of x and y.
        """
        key, examples = (size, channels_last), len(x)
        if key not in self._forms:
            made = form(self.layer, self.inputs, self.outputs, size, channels_last)
            back = self.back.places(made.dy.plane, made.back_taps)
            self._forms[key] = made, self.lists.places(made.x.plane, made.taps), back
        at, places, back_places = self._forms[key]
        panels = Panels(aligned(at.padded(examples) * at.x.size), at, places, back_places)
        y = aligned(examples * len(at.dy.places))
        self.products.forward(
            x.reshape(-1), y, weight, _NONE if bias is None else bias, self.kept, self.lists.starts, places, self.w,
            self.lists.chunks, at.x.places, at.x.rims, panels.x, at.x.size,
            self.scratch.floats("y", at.row(examples) * at.y_size), at.numbers, examples, at.panel,
        )  # fmt: skip
        return y.reshape(examples, -1), panels

    def backward(self, dy: np.ndarray, panels: Panels, grad: np.ndarray | None, *, wants_dx: bool) -> np.ndarray:
        """Return dx (N, inputs * size), empty where it is not wanted; add the kept weights' gradient to `grad` (kept,).

        dy: (N, outputs * its size), of the weights of the last `forward`.
        """
        at, examples = panels.form, len(dy)
        dx = aligned(examples * len(at.x.places) if wants_dx else 0)
        row = at.row(examples)
        self.products.backward(
            dy.reshape(-1), dx, _NONE if grad is None else grad, self.lists.starts, panels.places, self.w,
            self.lists.chunks, panels.x, at.x.size, self.back.starts, panels.back_places, self.back_weights,
            self.back.chunks, self.scratch.floats("packed", len(self.kept)), at.dy.places, at.dy.rims,
            self.scratch.floats("dy", row * at.dy.size), self.scratch.floats("dx", row * at.dx_size), at.numbers,
            at.back_numbers, examples, at.panel,
        )  # fmt: skip
        return dx.reshape(examples, -1) if wants_dx else dx


def _chunk(channels: int, layer: Convolution, density: float) -> int:
    """Return how many channels a chunk has: so that its tiles stay near, yet enough that its sums are long.

    The partial sums of a chunk pass through memory.
    """
    (high, wide), area = layer.window, math.prod(layer.window)
    near = _NEAR * 4 // (high * (wide + 3))  # a tile of four pixels, and what its windows overlap
    return min(channels, max(1, near, math.ceil(_TAPS / (density * area))))


def _order(keys: np.ndarray) -> np.ndarray:
    """Return the stable order of keys; numpy sorts those of 16 bits by their digits."""
    few = keys.max(initial=0) < 1 << 16
    return np.argsort(keys.astype(np.uint16) if few else keys, kind="stable").astype(np.int32)


def _listed(
    chunk: np.ndarray, outputs: np.ndarray, channels: np.ndarray, taps: np.ndarray, count: int, chunks: int
) -> Lists:
    counts = np.bincount(chunk * np.int32(count) + outputs, minlength=chunks * count)
    return Lists(np.append(0, np.cumsum(counts)).astype(np.int32), channels, taps, chunks)
