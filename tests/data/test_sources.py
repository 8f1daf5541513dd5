"""`load` by name: the embedded slice, the synthetic text, Hugging Face, and users' factories."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.data import embedded
from fedlth.data.sources import SOURCES, load
from fedlth.data.tensors import inputs
from fedlth.errors import StudyError


def test_the_slice_is_whole() -> None:
    data = load("fashion_slice", root=None, options={})
    assert data.x_train.shape == (6000, 1, 28, 28) and data.x_test.shape == (1000, 1, 28, 28)
    assert np.bincount(data.y_train).tolist() == [600] * 10 and np.bincount(data.y_test).tolist() == [100] * 10
    assert data.digest() == "fdba17f707d97d4314a00fc13e9cedc70202ac5bd218cc32757363ed73689ffd"
    assert embedded.SLICE.stat().st_size < 3_500_000


def test_slice_coding_round_trips_and_guards() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 1, 28, 28), np.uint8), rng.integers(0, 10, 30).astype(np.uint8)
    fields = embedded.encode(x, y)
    decoded_x, decoded_y = embedded.decode(fields)
    assert np.array_equal(decoded_x, x) and np.array_equal(decoded_y, y)
    with pytest.raises(StudyError, match="must have sha256"):
        embedded.decode({**fields, "sha256": "0" * 64})
    with pytest.raises(StudyError, match="damaged"):
        embedded.decode({**fields, "labels": ["00000"]})


def test_a_damaged_slice_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slice.json"
    path.write_text("{")
    monkeypatch.setattr(embedded, "SLICE", path)
    with pytest.raises(StudyError, match="slice.json: the embedded slice cannot be read"):
        load("fashion_slice", root=None, options={})


@pytest.mark.slow
def test_cutting_again_gives_the_same_file() -> None:
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    scripts = Path(__file__).parents[2] / "scripts"
    cutter = types.ModuleType("cutter")
    exec(compile((scripts / "cut_fashion_slice.py").read_text(), "cut_fashion_slice.py", "exec"), vars(cutter))
    text = cutter.cut(load("fashion_mnist", root=None, options={}))
    made, kept = json.loads(text), json.loads(embedded.SLICE.read_text("ascii"))
    assert made["source_sha256"] == kept["source_sha256"]
    assert made["train"]["sha256"] == kept["train"]["sha256"] and made["test"]["sha256"] == kept["test"]["sha256"]
    assert text == embedded.SLICE.read_text("ascii")


def test_characters_have_dialects_and_keys() -> None:
    data = load("characters", root=None, options={"roles": 4, "samples": 400, "length": 6})
    assert data.x_train.shape == (1600, 6) and data.y_train.shape == (1600,) and data.x_test.shape == (400, 6)
    assert data.key_train is not None and np.bincount(data.key_train).tolist() == [400] * 4

    def bigrams(role: int) -> np.ndarray:
        assert data.key_train is not None
        own = data.key_train == role
        pairs = data.x_train[own][:, -1] * 32 + data.y_train[own]
        counts: np.ndarray = np.bincount(pairs, minlength=1024).astype(float)
        unit: np.ndarray = counts / np.linalg.norm(counts)
        return unit

    assert bigrams(0) @ bigrams(2) > 0.5 > bigrams(0) @ bigrams(1)
    assert data.digest() == load("characters", root=None, options={"roles": 4, "samples": 400, "length": 6}).digest()


def test_inputs_normalise_images() -> None:
    data = load("fashion_slice", root=None, options={})
    part = inputs(data, np.arange(600), train=True)
    x, y = part.tensor, part.y
    assert x.dtype == torch.float32 and x.shape == (600, 1, 28, 28) and y.dtype == torch.int64
    wanted = (data.x_train[:600] / 255 - 0.2860) / 0.3530
    assert np.allclose(x.numpy(), wanted, atol=1e-6)
    before = data.x_test.copy()
    inputs(data, np.array([3, 1]), train=False).tensor.zero_()
    assert np.array_equal(data.x_test, before)


def test_inputs_keep_tokens() -> None:
    data = load("characters", root=None, options={})
    part = inputs(data, np.array([5, 2]), train=False)
    x, y = part.tensor, part.y
    assert x.dtype == torch.int64 and np.array_equal(x.numpy(), data.x_test[[5, 2]])
    assert np.array_equal(y.numpy(), data.y_test[[5, 2]])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fashion", {}, "data.name: must be one of fashion_slice, .*got 'fashion'"),
        ("fashion_slice", {"size": 3}, "data.options: fashion_slice takes none, got 'size'"),
        ("characters", {"role": 3}, "data.options: characters takes length, roles, samples, got 'role'"),
        ("characters", {"roles": 0}, "data.options.roles must be an integer of at least 1, got 0"),
        ("no.such.module:make", {}, "data: no.such.module cannot be imported: ModuleNotFoundError"),
        ("json:make", {}, "data: the module json has no make"),
        ("json:__name__", {}, "data: json:__name__ must be callable"),
    ],
)
def test_bad_names_and_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load(name, root=None, options=options)


def test_every_source_is_named_as_its_key() -> None:
    assert all(name == source.__name__ for name, source in SOURCES.items())


FACTORY = """
import numpy as np
def fields(size=4):
    return dict(x_train=np.ones((size, 3)), y_train=[0, 1] * (size // 2), x_test=np.ones((2, 3)), y_test=[0, 1],
                num_classes=2)
def images(root, *, size=4):
    assert root == "here"
    return {**fields(size), "name": "mine", "x_train": np.ones((size, 1, 2, 2), np.uint8),
            "x_test": np.ones((2, 1, 2, 2), np.uint8), "mean": [0.5], "std": [0.25], "key_train": ["a"] * size}
def value(**options):
    from fedlth.data.dataset import Dataset
    assert set(options) == {"root", "colour"}
    made = images("here")
    made["y_train"], made["y_test"] = np.array(made["y_train"]), np.array(made["y_test"])
    return Dataset(**{**made, "key_train": None})
def needs(folder): return fields()
def fails(): raise RuntimeError("no\\ndisk")
def number(): return 3
def short(): return {"x_train": 1, "extra": 2}
def bad_labels(): return {**fields(), "y_train": [0, 1, 2, 3]}
def bad_mean(): return {**fields(), "mean": 1.0}
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_data_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_data_factory", raising=False)
    return "my_data_factory"


def test_user_factories(mine: str) -> None:
    path = list(sys.path)
    plain = load(f"{mine}:fields", root=None, options={"size": 6})
    assert plain.x_train.dtype == np.float32 and plain.y_train.dtype == np.int64 and len(plain.x_train) == 6
    assert plain.name == f"{mine}:fields"
    images = load(f"{mine}:images", root="here", options={})
    assert images.name == "mine" and images.mean == (0.5,) and images.key_train is not None
    assert load(f"{mine}:value", root="here", options={"colour": 1}).x_train.shape == (4, 1, 2, 2)
    assert sys.path == path


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("fields", {"sizes": 3}, "data.options: my_data_factory:fields takes size, got 'sizes'"),
        ("fields", {"root": "x"}, "data.options: root is set by fedlth itself"),
        ("needs", {}, "data.options: my_data_factory:needs also needs folder"),
        ("fails", {}, "data: my_data_factory:fails raised RuntimeError: no disk"),
        ("number", {}, "must return a Dataset or a dict of its fields, got int"),
        ("short", {}, r"got unknown \['extra'\] and missing \['y_train'"),
        ("bad_labels", {}, r"y_train must lie in \[0, 2\)"),
        ("bad_mean", {}, "mean must be a list of numbers"),
    ],
)
def test_user_factories_fail_in_one_line(mine: str, function: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message) as caught:
        load(f"{mine}:{function}", root=None, options=options)
    assert "\n" not in str(caught.value)


class FakePart(dict[str, Any]):
    """The little of `datasets.Dataset` that the reader uses."""

    features = types.SimpleNamespace(__getitem__=None)

    @property
    def column_names(self) -> list[str]:
        return list(self)


def fake_library(colours: bool) -> types.ModuleType:
    rng = np.random.default_rng(0)

    def part(size: int) -> FakePart:
        shape = (size, 4, 4, 3) if colours else (size, 4, 4)
        made = FakePart(image=list(rng.integers(0, 256, shape, np.uint8)), label=[0, 1] * (size // 2))
        made["writer"] = ["w"] * size
        made.features = {"label": types.SimpleNamespace(num_classes=3)}  # type: ignore[assignment]
        return made

    def load_dataset(*args: object, **options: object) -> dict[str, FakePart]:
        if args[0] == "absent":
            raise FileNotFoundError("not on the hub")
        return {"train": part(6), "test": part(2)}

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    return library


@pytest.mark.parametrize("colours", [True, False])
def test_huggingface_columns(monkeypatch: pytest.MonkeyPatch, colours: bool) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_library(colours))
    data = load("hf:someone/something", root=None, options={"key": "writer"})
    assert data.x_train.shape == (6, 3 if colours else 1, 4, 4) and data.num_classes == 3
    assert data.key_test is not None and data.key_test.tolist() == ["w", "w"]
    for options, message in [({"image": "img"}, "has the columns image, label"), ({"test": "val"}, "has the splits")]:
        with pytest.raises(StudyError, match=message):
            load("hf:someone/something", root=None, options=options)
    with pytest.raises(StudyError, match="data: hf:absent cannot be loaded: FileNotFoundError"):
        load("hf:absent", root=None, options={})


def test_huggingface_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(StudyError, match=r"data: hf:x needs the extra `hf`: pip install 'fedlth\[hf\]'"):
        load("hf:x", root=None, options={})
