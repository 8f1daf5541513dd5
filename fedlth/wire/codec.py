"""Which modes a study's payloads may use: a receiver refuses all others."""

from __future__ import annotations

from dataclasses import dataclass

REUSE, LAYERS, PREVIOUS, BITMAP, CHANNELS, MAGNITUDE, FULL, TOGETHER = range(8)
BY_BIT = 8  # added to a mode: the same information, coded bit by bit with chances that are learnt on the way
LAYERS_BITS, PREVIOUS_BITS, MAGNITUDE_BITS = LAYERS + BY_BIT, PREVIOUS + BY_BIT, MAGNITUDE + BY_BIT
F32, DELTA, BF16, F16, STEP, SIGN, NO_VALUES, F32_PCO = range(8)
MASK_NAMES = {
    REUSE: "reuse", LAYERS: "layers", PREVIOUS: "previous", BITMAP: "bitmap", CHANNELS: "channels",
    MAGNITUDE: "magnitude", FULL: "full", TOGETHER: "together", LAYERS_BITS: "layers by bit",
    PREVIOUS_BITS: "previous by bit", MAGNITUDE_BITS: "magnitude by bit",
}  # fmt: skip
VALUE_NAMES = ("f32", "delta", "bf16", "f16", "step", "sign", "none", "f32 pco")
LOSSLESS_MASKS = (
    REUSE, LAYERS, PREVIOUS, BITMAP, CHANNELS, MAGNITUDE, FULL, TOGETHER, LAYERS_BITS, PREVIOUS_BITS, MAGNITUDE_BITS,
)  # fmt: skip


@dataclass(frozen=True)
class Codec:
    """A name, the mask modes and the value modes that it may use; `error` is what STEP may lose of a delta's norm.

    `feedback` says that a client adds to an update what its last one left out (error feedback).
    """

    name: str
    masks: tuple[int, ...]
    values: tuple[int, ...]
    error: float = 0.03
    feedback: bool = False

    @property
    def refers(self) -> bool:
        """Say whether a payload may refer to floats that both ends hold."""
        return MAGNITUDE in self.masks


RAW = Codec("raw", (REUSE, BITMAP, FULL), (F32, NO_VALUES))
LOSSLESS = Codec("lossless", LOSSLESS_MASKS, (F32, DELTA, F32_PCO, NO_VALUES))
LOSSY_BF16 = Codec("bf16", LOSSLESS_MASKS, (BF16, NO_VALUES))
LOSSY_F16 = Codec("f16", LOSSLESS_MASKS, (F16, NO_VALUES))
LOSSY_STEP = Codec("step", LOSSLESS_MASKS, (F32, F32_PCO, STEP, NO_VALUES), feedback=True)
LOSSY_SIGN = Codec("sign", LOSSLESS_MASKS, (F32, F32_PCO, SIGN, NO_VALUES), feedback=True)
CODECS = {c.name: c for c in (RAW, LOSSLESS, LOSSY_BF16, LOSSY_F16, LOSSY_STEP, LOSSY_SIGN)}
