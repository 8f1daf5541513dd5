"""The idx and CIFAR readers, on tiny files written here."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from fedlth.data.idx import read_idx
from fedlth.data.sources import load
from fedlth.errors import StudyError


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.tobytes()


def write_mnist(folder: Path, compress: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (5, 28, 28), np.uint8),
        "train-labels-idx1-ubyte": np.arange(5, dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (2, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte": np.array([9, 3], np.uint8),
    }
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        raw = idx_bytes(array)
        (folder / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(raw) if compress else raw)
    return arrays


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"), [("fashion_mnist", "fashion-mnist"), ("mnist", "MNIST/raw"), ("mnist", "")]
)
def test_idx_round_trip(tmp_path: Path, name: str, folder: str, compress: bool) -> None:
    arrays = write_mnist(tmp_path / "root" / folder, compress)
    data = load(name, root=str(tmp_path / "root"), options={})
    assert np.array_equal(data.x_train[:, 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(data.y_train, arrays["train-labels-idx1-ubyte"])
    assert np.array_equal(data.x_test[:, 0], arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(data.y_test, arrays["t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be an idx file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "must be an idx file"),
        (b"\0\0\x08\x01\0\0", "must name a size"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "must name a size below 2 GiB"),
        (idx_bytes(np.zeros(4, np.uint8))[:-1], "must hold 4 bytes"),
        (idx_bytes(np.zeros(4, np.uint8)) + b"x", "must hold 4 bytes"),
    ],
)
def test_damaged_idx_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file-idx"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=message):
        read_idx(path)
    packed = tmp_path / "file.gz"
    packed.write_bytes(gzip.compress(content))
    with pytest.raises(StudyError, match=message):
        read_idx(packed)


def test_truncated_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.arange(250, dtype=np.uint8)))[:-20])
    with pytest.raises(StudyError, match="cannot be read"):
        read_idx(path)


@pytest.mark.parametrize("place", [-1, -5, 30])
def test_damaged_gzip_is_named(tmp_path: Path, place: int) -> None:
    path = tmp_path / "file.gz"
    data = bytearray(gzip.compress(idx_bytes(np.arange(250, dtype=np.uint8))))
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(StudyError, match="cannot be read|must"):
        read_idx(path)


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "cifar10", "cifar100"])
def test_missing_files_name_the_places(tmp_path: Path, name: str) -> None:
    with pytest.raises(StudyError, match=rf"data.root: no files of {name} .* looked in {tmp_path}"):
        load(name, root=str(tmp_path), options={})


def test_one_missing_file_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", compress=False)
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(StudyError, match="t10k-labels-idx1-ubyte"):
        load("mnist", root=str(tmp_path), options={})


CIFAR10 = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def write_cifar(root: Path, layout: str, stems: list[str], num_labels: int) -> None:
    """Write two images a file; python files as Python 2 wrote them (bytes keys), or re-saved with str keys."""
    folders = {(1, "bin"): "cifar-10-batches-bin", (2, "bin"): "cifar-100-binary"}
    folder = root / folders.get((num_labels, layout), "cifar-10-batches-py" if num_labels == 1 else "cifar-100-python")
    folder.mkdir(parents=True)
    names = [b"labels"] if num_labels == 1 else [b"coarse_labels", b"fine_labels"]
    for i, stem in enumerate(stems):
        pixels = np.random.default_rng(i).integers(0, 256, (2, 3072), np.uint8)
        labels = np.array([[i, 9 - i][:2]] * num_labels)
        if layout == "bin":
            rows = np.concatenate([labels.T.astype(np.uint8), pixels], 1)
            (folder / f"{stem}.bin").write_bytes(rows.tobytes())
            continue
        batch: dict[object, object] = {b"data": pixels, b"batch_label": b"a batch"}
        batch |= {name: column.tolist() for name, column in zip(names, labels, strict=True)}
        if layout == "python-str":
            batch = {key.decode(): value for key, value in batch.items() if isinstance(key, bytes)}
        (folder / stem).write_bytes(pickle.dumps(batch, protocol=2 if layout == "python" else 4))


@pytest.mark.parametrize("layout", ["bin", "python", "python-str"])
def test_cifar10_layouts_agree(tmp_path: Path, layout: str) -> None:
    write_cifar(tmp_path, layout, CIFAR10, 1)
    data = load("cifar10", root=str(tmp_path), options={})
    assert data.x_train.shape == (10, 3, 32, 32) and data.x_test.shape == (2, 3, 32, 32)
    assert data.y_train.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and data.y_test.tolist() == [5, 4]
    assert np.array_equal(data.x_test.reshape(2, -1), np.random.default_rng(5).integers(0, 256, (2, 3072), np.uint8))


@pytest.mark.parametrize("layout", ["bin", "python"])
def test_cifar100_has_coarse_keys(tmp_path: Path, layout: str) -> None:
    write_cifar(tmp_path, layout, ["train", "test"], 2)
    fine = load("cifar100", root=str(tmp_path), options={})
    coarse = load("cifar100", root=str(tmp_path), options={"labels": "coarse"})
    assert fine.num_classes == 100 and coarse.num_classes == 20
    assert fine.key_train is not None and np.array_equal(fine.key_train, coarse.y_train)
    with pytest.raises(StudyError, match="data.options.labels must be fine or coarse"):
        load("cifar100", root=str(tmp_path), options={"labels": "medium"})


class Payload:
    """Run a command when unpickled, as a hostile data file would."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


class Indirect:
    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (np.ndarray, "tofile")


@pytest.mark.parametrize("payload", [Payload(), Indirect(), Path("x"), {b"data": Payload()}])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickles_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: object, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path, "python", CIFAR10, 1)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(payload, protocol=protocol))
    with pytest.raises(StudyError, match="must be a pickle of plain arrays.* is not admitted"):
        load("cifar10", root=str(tmp_path), options={})
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "must hold a dictionary"),
        ({b"labels": [0]}, "the fields data are missing"),
        ({b"data": np.zeros((1, 5), np.uint8), b"labels": [0]}, "data must be a uint8 array"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "one label for each of the 2"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}, "labels must be a list of integers"),
    ],
)
def test_wrong_cifar_content_is_named(tmp_path: Path, batch: object, message: str) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch))
    with pytest.raises(StudyError, match=message):
        load("cifar10", root=str(tmp_path), options={})


def test_ragged_binary_is_named(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(StudyError, match="records of 3073 bytes, got 3072"):
        load("cifar10", root=str(tmp_path), options={})


def test_a_label_out_of_range_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, "bin", CIFAR10, 1)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(StudyError, match=r"y_train must lie in \[0, 10\)"):
        load("cifar10", root=str(tmp_path), options={})
