"""How large a tile of sums the kernel keeps in registers: a table of variants, one of which is compiled.

No variant changes a result: every output adds up its products in the same order in each, so that a run may go on, and
its workers may be, where another is the fastest. Which one: tile_choice.py.
"""

from __future__ import annotations

from dataclasses import dataclass

Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes are (output channels, values of 32 bits), the most channels first and one channel last.

    taps: of a convolution forward and of its input's gradient; what is left of a row takes 16 values at a time.
    line: the same of a linear layer. features: inputs of a linear layer whose weights' gradients go together.
    pairs: output channels of a convolution's weight gradient, two to a vector; without any, two go in vectors of 8.
    spans: values of an output row that go together where only kept weights are stored.
    """

    taps: Sizes
    line: Sizes
    features: int
    pairs: tuple[int, ...]
    spans: tuple[int, ...]


VARIANTS = {
    # 12 vectors of 8 (16 registers: AVX2), or 24 of 4 (32 registers: NEON)
    "narrow": Tiles(
        taps=((6, 16), (4, 16), (2, 32), (1, 32)),
        line=((6, 16), (4, 16), (2, 16), (1, 16)),
        features=16,
        pairs=(),
        spans=(96, 32, 16),
    ),
    # 16 vectors of 16 (32 registers: AVX-512): twice what a latency of 4 cycles and two units want
    "wide": Tiles(
        taps=((8, 32), (6, 32), (4, 32), (2, 32), (1, 32)),
        line=((8, 32), (6, 32), (4, 32), (2, 32), (1, 32)),
        features=32,
        pairs=(8, 6, 4),
        spans=(128, 96, 64, 32, 16),
    ),
}
