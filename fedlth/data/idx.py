"""Fashion-MNIST and MNIST in their idx files, plain or .gz (format: yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.errors import StudyError

SYSTEM_PLACES = ("/usr/share/datasets", "/usr/local/share/datasets")
MAX_BYTES = 2**31


def fashion_mnist(root: str | None) -> Dataset:
    """Return Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017): 60,000 + 10,000 grey images of 28 x 28."""
    return _mnist_like("fashion_mnist", root, ("fashion-mnist", "FashionMNIST/raw", "fashion_mnist"), 0.2860, 0.3530)


def mnist(root: str | None) -> Dataset:
    """Return MNIST (LeCun, Cortes, Burges): 60,000 + 10,000 grey images of 28 x 28."""
    return _mnist_like("mnist", root, ("mnist", "MNIST/raw"), 0.1307, 0.3081)


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array of one idx file; raise StudyError when the file is not exactly one."""
    try:
        # One call of zlib: gzip.open makes one every 8 KB, and waits for Python's lock after each, up to 0.3 s of a
        # run's start, since the main thread is importing.
        with BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
                raise StudyError(f"{path}: must be an idx file of unsigned bytes, got header {head.hex()}")
            counts = file.read(4 * head[3])
            shape = tuple(int.from_bytes(counts[i : i + 4], "big") for i in range(0, len(counts), 4))
            # Python integers: a hostile header must not overflow into a small product.
            size = 1
            for n in shape:
                size *= n
            if len(counts) != 4 * head[3] or size > MAX_BYTES:
                raise StudyError(f"{path}: the idx header must name a size below 2 GiB, got {shape}")
            body = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise StudyError(f"{path}: cannot be read: {error}") from error
    if len(body) != size:
        raise StudyError(
            f"{path}: must hold {size} bytes for shape {shape}, got {'more' if len(body) > size else len(body)}"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def find_folder(root: str | None, folders: tuple[str, ...], files: tuple[str, ...], name: str) -> Path:
    """Return the first folder that has the first of `files`; only `root` is searched when it is given."""
    bases = [Path(root).expanduser()] if root else [Path(place) for place in SYSTEM_PLACES]
    places = [base / folder for base in bases for folder in (*folders, ".")]
    for place in places:
        if any((place / file).is_file() for file in files):
            return place
    where = ", ".join(str(place) for place in places)
    raise StudyError(f"data.root: no files of {name} ({' or '.join(files)}) found, looked in {where}")


def _mnist_like(name: str, root: str | None, folders: tuple[str, ...], mean: float, std: float) -> Dataset:
    first = "train-images-idx3-ubyte"
    folder = find_folder(root, folders, (f"{first}.gz", first), name)
    x_train = _part(folder, first)
    x_test = _part(folder, "t10k-images-idx3-ubyte")
    for part, x in (("train", x_train), ("t10k", x_test)):
        if x.ndim != 3:
            raise StudyError(f"{folder}/{part}-images: must hold images (N, H, W), got {x.shape}")
    return Dataset(
        name=name,
        x_train=x_train[:, None],
        y_train=_part(folder, "train-labels-idx1-ubyte").astype(np.int64),
        x_test=x_test[:, None],
        y_test=_part(folder, "t10k-labels-idx1-ubyte").astype(np.int64),
        num_classes=10,
        mean=(mean,),
        std=(std,),
    )


def _part(folder: Path, stem: str) -> np.ndarray:
    """Read one file of the four, whichever of its two forms is there."""
    for path in (folder / f"{stem}.gz", folder / stem, folder / stem.replace("-idx", ".idx")):
        if path.is_file():
            return read_idx(path)
    raise StudyError(f"{folder}: the file {stem} or {stem}.gz is missing")
