"""Cut fedlth/data/fashion_slice.json out of the full Fashion-MNIST idx files.

    python scripts/cut_fashion_slice.py [--root DIR] [--out FILE]

Source: the Debian package dataset-fashion-mnist, or the four files of github.com/zalandoresearch/fashion-mnist.
The same files give the same output byte for byte (with the same liblzma; the decoded content in any case).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.embedded import SLICE, encode
from fedlth.data.idx import fashion_mnist
from fedlth.rng import stream

TRAIN_PER_CLASS = 600
TEST_PER_CLASS = 100


def chosen(labels: np.ndarray, per_class: int, part: str) -> np.ndarray:
    """Return the sorted positions of `per_class` examples of every class, drawn from a named stream."""
    rng = stream(0, f"fashion_slice/{part}")
    picks = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(10)]
    return np.sort(np.concatenate(picks))


def cut(full: Dataset) -> str:
    """Return the text of the slice's file."""
    content: dict[str, object] = {
        "about": "6,000 + 1,000 images of Fashion-MNIST, cut by scripts/cut_fashion_slice.py",
        "licence": "MIT, Copyright (c) 2017 Zalando SE, see FASHION_MNIST_LICENSE.md",
        "coding": "base85 (RFC 1924 alphabet) of xz; images class by class, labels in true order",
        "source_sha256": {
            "train-images": hashlib.sha256(full.x_train.tobytes()).hexdigest(),
            "train-labels": hashlib.sha256(full.y_train.astype(np.uint8).tobytes()).hexdigest(),
            "t10k-images": hashlib.sha256(full.x_test.tobytes()).hexdigest(),
            "t10k-labels": hashlib.sha256(full.y_test.astype(np.uint8).tobytes()).hexdigest(),
        },
    }
    train = chosen(full.y_train, TRAIN_PER_CLASS, "train")
    test = chosen(full.y_test, TEST_PER_CLASS, "test")
    content["train"] = encode(full.x_train[train], full.y_train[train].astype(np.uint8))
    content["test"] = encode(full.x_test[test], full.y_test[test].astype(np.uint8))
    return json.dumps(content, indent=0) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of the four idx files (default: the system's)")
    parser.add_argument("--out", type=Path, default=SLICE)
    args = parser.parse_args()
    text = cut(fashion_mnist(args.root))
    args.out.write_text(text, "ascii")
    print(f"{args.out}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
