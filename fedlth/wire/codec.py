"""Which modes a study's payloads may use: a receiver refuses all others."""

from __future__ import annotations

from dataclasses import dataclass

REUSE, BITMAP, FULL = range(3)
CODED = 4  # bit by bit, each with a chance; plus what the chances depend on:
ON_MASK, ON_VALUES = 1, 2
F32, DELTA, BF16, F16, STEP, SIGN, NO_VALUES, F32_PCO = range(8)
MASK_NAMES = {
    REUSE: "reuse", BITMAP: "bitmap", FULL: "full", CODED: "coded", CODED + ON_MASK: "coded on mask",
    CODED + ON_VALUES: "coded on values", CODED + ON_MASK + ON_VALUES: "coded on both",
}  # fmt: skip
VALUE_NAMES = ("f32", "delta", "bf16", "f16", "step", "sign", "none", "f32 pco")
PLAIN_MASKS, MASKS = (REUSE, BITMAP, FULL), tuple(MASK_NAMES)


@dataclass(frozen=True)
class Codec:
    """A name, the mask modes and the value modes that it may use.

    `feedback` says that a client adds to an update what its last one left out (error feedback).
    """

    name: str
    masks: tuple[int, ...]
    values: tuple[int, ...]
    feedback: bool = False

    @property
    def refers(self) -> bool:
        """Say whether a payload may refer to floats that both ends hold."""
        return CODED in self.masks

    @property
    def down(self) -> Codec:
        """The codec of what the server sends: steps and signs are of updates, a state comes exactly as it is."""
        return LOSSLESS if self.feedback else self


RAW = Codec("raw", PLAIN_MASKS, (F32, NO_VALUES))
LOSSLESS = Codec("lossless", MASKS, (F32, DELTA, F32_PCO, NO_VALUES))
LOSSY_BF16 = Codec("bf16", MASKS, (BF16, NO_VALUES))
LOSSY_F16 = Codec("f16", MASKS, (F16, NO_VALUES))
LOSSY_STEP = Codec("step", MASKS, (F32, F32_PCO, STEP, NO_VALUES), feedback=True)
LOSSY_SIGN = Codec("sign", MASKS, (F32, F32_PCO, SIGN, NO_VALUES), feedback=True)
CODECS = {c.name: c for c in (RAW, LOSSLESS, LOSSY_BF16, LOSSY_F16, LOSSY_STEP, LOSSY_SIGN)}
