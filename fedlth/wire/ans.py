"""The mask coder: constriction's ANS where its wheel is installed, else the project's own; equal bytes either way."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from fedlth.kernel.late_jit import COMPILED
from fedlth.wire import ans_own
from fedlth.wire.errors import PayloadError
from fedlth.wire.table import cumulative, weights

HAS_CONSTRICTION = find_spec("constriction") is not None
# Below this many symbols a segment, a call for each segment costs more than the compiled loop over all of them.
FEW = 4096


def encode(symbols: np.ndarray, counts: np.ndarray, ones: np.ndarray, sizes: np.ndarray) -> bytes:
    """Code runs of counts[s] symbols (uint8, N), each under the table of (ones[s], sizes[s]); u32 words, head last."""
    live = counts > 0
    counts, table = counts[live], weights(ones[live], sizes[live])
    if _own(len(symbols), len(counts)):
        words = ans_own.encode(symbols, counts, cumulative(table))
    else:
        words = encode_library(symbols, counts, table)
    return words.astype("<u4").tobytes()


def decode(data: bytes, counts: np.ndarray, ones: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return sum(counts) symbols; raise PayloadError where the stream is not exactly theirs."""
    if len(data) % 4:
        raise PayloadError("the mask's words are cut off")
    words = np.frombuffer(data, "<u4").astype(np.uint32)
    if words.size and words[-1] == 0:
        raise PayloadError("the mask's last word is zero")
    live = counts > 0
    counts, table = counts[live], weights(ones[live], sizes[live])
    if _own(int(counts.sum()), len(counts)):
        symbols, clean = ans_own.decode(words, counts, cumulative(table))
    else:
        symbols, clean = decode_library(words, counts, table)
    if not clean:
        raise PayloadError("the mask's stream does not end where it should")
    return symbols


def _own(symbols: int, segments: int) -> bool:
    return not HAS_CONSTRICTION or (COMPILED and symbols < FEW * segments)


def encode_library(symbols: np.ndarray, counts: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The same words by constriction; `table` (S, 256) are its unscaled weights."""
    from constriction import stream

    coder, wide, end = stream.stack.AnsCoder(), symbols.astype(np.int32), len(symbols)
    for count, row in zip(counts[::-1].tolist(), table[::-1], strict=True):
        if count:
            coder.encode_reverse(wide[end - count : end], stream.model.Categorical(row, perfect=False))
            end -= count
    return np.asarray(coder.get_compressed(), np.uint32)


def decode_library(words: np.ndarray, counts: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, bool]:
    """The same symbols by constriction, and whether it ends empty."""
    from constriction import stream

    coder, parts = stream.stack.AnsCoder(words), [np.zeros(0, np.uint8)]
    for count, row in zip(counts.tolist(), table, strict=True):
        if count:
            parts.append(coder.decode(stream.model.Categorical(row, perfect=False), count).astype(np.uint8))
    return np.concatenate(parts), bool(coder.is_empty())
