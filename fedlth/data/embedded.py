"""The slice of Fashion-MNIST that travels with the package: 6,000 + 1,000 real images (MIT, Zalando SE).

The file is JSON because Flower's app packaging drops .npz; scripts/cut_fashion_slice.py made it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.errors import StudyError

SLICE = Path(__file__).with_name("fashion_slice.json")
ALPHABET = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
LINE = 100_000
# Images repeat bytes, not 4-byte words: no position bits; long literal context.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


def fashion_slice() -> Dataset:
    """Return the embedded slice: 600 train and 100 test images a class, uint8 (N, 1, 28, 28)."""
    try:
        content = json.loads(SLICE.read_text("ascii"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{SLICE}: the embedded slice cannot be read: {error}") from error
    x_train, y_train = decode(content["train"])
    x_test, y_test = decode(content["test"])
    return Dataset(
        name="fashion_slice",
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        num_classes=10,
        mean=(0.2860,),
        std=(0.3530,),
    )


def encode(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Return the JSON fields of images (N, 1, 28, 28) and labels (N,), both uint8.

    Images are stored class by class, which LZMA packs better; the labels tell their true order.
    """
    order = np.argsort(y, kind="stable")
    return {
        "count": len(y),
        "sha256": _sha256(x, y),
        "labels": _pack(y.tobytes()),
        "images": _pack(np.ascontiguousarray(x[order]).tobytes()),
    }


def decode(fields: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 1, 28, 28) uint8 and labels (N,) int64; raise StudyError unless the checksum fits."""
    try:
        y = np.frombuffer(_unpack(fields["labels"]), np.uint8)
        stored = np.frombuffer(_unpack(fields["images"]), np.uint8).reshape(len(y), 1, 28, 28)
    except (lzma.LZMAError, ValueError, KeyError) as error:
        raise StudyError(f"{SLICE}: the embedded slice is damaged: {error}") from error
    x = np.empty_like(stored)
    x[np.argsort(y, kind="stable")] = stored
    if _sha256(x, y) != fields["sha256"]:
        raise StudyError(f"{SLICE}: the embedded slice must have sha256 {fields['sha256']}, got {_sha256(x, y)}")
    return x, y.astype(np.int64)


def _sha256(x: np.ndarray, y: np.ndarray) -> str:
    return hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()


def _pack(raw: bytes) -> list[str]:
    """Compress and spell in base85, whose alphabet JSON needs not escape."""
    packed = lzma.compress(raw, filters=FILTERS)
    text = base64.b85encode(packed, pad=True).decode("ascii")
    return [text[i : i + LINE] for i in range(0, len(text), LINE)]


def _unpack(lines: list[str]) -> bytes:
    """Undo `_pack`; base64.b85decode takes half a second for what numpy does in 30 ms."""
    value = np.zeros(256, np.uint32)
    value[np.frombuffer(ALPHABET, np.uint8)] = np.arange(85)
    digits = value[np.frombuffer("".join(lines).encode("ascii"), np.uint8)].reshape(-1, 5)
    words = digits @ (85 ** np.arange(4, -1, -1)).astype(np.uint32)
    # The padding to whole words is up to three zero bytes after the stream's end; the container ignores them.
    return lzma.LZMADecompressor().decompress(words.astype(">u4").tobytes())
