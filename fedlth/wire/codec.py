"""Which modes a study's payloads may use: a receiver refuses all others."""

from __future__ import annotations

from dataclasses import dataclass

REUSE, LAYERS, PREVIOUS, BITMAP, CHANNELS, MAGNITUDE, FULL = range(7)
F32, DELTA, BF16, F16, STEP, _SIGN, NO_VALUES, F32_PCO = range(8)
MASK_NAMES = ("reuse", "layers", "previous", "bitmap", "channels", "magnitude", "full")
VALUE_NAMES = ("f32", "delta", "bf16", "f16", "step", "sign", "none", "f32 pco")
LOSSLESS_MASKS = (REUSE, LAYERS, PREVIOUS, BITMAP, CHANNELS, MAGNITUDE, FULL)


@dataclass(frozen=True)
class Codec:
    """A name, the mask modes and the value modes that it may use; `step` is the share of a delta's rms, in STEP.

    `feedback` says that a client adds to an update what its last one left out (error feedback).
    """

    name: str
    masks: tuple[int, ...]
    values: tuple[int, ...]
    step: float = 0.125
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
CODECS = {c.name: c for c in (RAW, LOSSLESS, LOSSY_BF16, LOSSY_F16, LOSSY_STEP)}
