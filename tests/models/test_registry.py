"""Models by name: exact sizes, shapes, options, and users' factories."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fedlth.errors import StudyError
from fedlth.models.registry import MODELS, build

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
SIZES: list[tuple[str, tuple[int, ...], dict[str, object], int]] = [
    ("lenet300", GREY, {}, 266_610),
    ("lenet5", GREY, {}, 61_706),
    ("lenet5", COLOUR, {}, 62_006),
    ("leaf_cnn", GREY, {}, 1_663_370),
    ("conv2", COLOUR, {}, 4_301_642),
    ("conv4", COLOUR, {}, 2_425_930),
    ("resnet9", COLOUR, {}, 6_573_130),
    ("resnet9", COLOUR, {"norm": "batch"}, 6_573_130),
    ("char_lstm", (5,), {}, 801_370),
    ("char_lstm", (5,), {"hidden": 16, "layers": 1, "embedding": 4}, 10 * 4 + 4 * 16 * (4 + 16 + 2) + 17 * 10),
    ("mlp", (7,), {"hidden": [5, 4]}, 7 * 5 + 5 + 5 * 4 + 4 + 4 * 10 + 10),
    ("mlp", (7,), {"hidden": []}, 80),
]


def batch(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones((2, *shape), dtype=torch.int64 if name == "char_lstm" else torch.float32)


@pytest.mark.parametrize(("name", "shape", "options", "size"), SIZES)
def test_exact_parameters_and_logits(name: str, shape: tuple[int, ...], options: dict[str, object], size: int) -> None:
    module = build(name, num_classes=10, input_shape=shape, options=options)
    assert sum(tensor.numel() for tensor in module.parameters()) == size
    assert module.training and module(batch(name, shape)).shape == (2, 10)


def test_every_model_is_measured() -> None:
    assert {name for name, *_ in SIZES} | {"hf"} == set(MODELS), "hf's many forms are in tests/text"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet5", (1, 12, 12)),
        ("lenet5", (3, 40, 32)),
        ("leaf_cnn", (2, 4, 9)),
        ("conv4", (1, 5, 4)),
        ("resnet9", (1, 8, 9)),
    ],
)
def test_models_adapt_to_the_input(name: str, shape: tuple[int, ...]) -> None:
    assert build(name, num_classes=3, input_shape=shape, options={})(batch(name, shape)).shape == (2, 3)


def test_torchs_generator_decides_the_start() -> None:
    def start(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = build("mlp", num_classes=3, input_shape=(4,), options={})
        return torch.cat([tensor.detach().flatten() for tensor in module.parameters()])

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("lenet", GREY, {}, "model.name: must be one of lenet300, .* got 'lenet'"),
        ("lenet5", (1, 11, 28), {}, r"lenet5 must have images .* of at least 12 x 12, got \(1, 11, 28\)"),
        ("lenet5", (16,), {}, "lenet5 must have images"),
        ("conv4", (3, 3, 3), {}, "at least 4 x 4"),
        ("resnet9", COLOUR, {"norm": "layer"}, "model.options.norm must be group or batch, got 'layer'"),
        ("char_lstm", GREY, {}, r"char_lstm must have tokens \(T,\)"),
        ("char_lstm", (5,), {"hidden": 0}, "model.options.hidden must be"),
        ("mlp", (5,), {"hidden": 3}, "model.options.hidden must be a list"),
        ("mlp", (5,), {"width": 3}, "model.options: mlp takes hidden, got 'width'"),
        ("lenet5", GREY, {"num_classes": 3}, "model.options: num_classes is set by fedlth itself"),
        ("no_such_module:net", GREY, {}, "model: no_such_module cannot be imported"),
    ],
)
def test_unsuited_requests(name: str, shape: tuple[int, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        build(name, num_classes=10, input_shape=shape, options=options)


FACTORY = """
from torch import nn
def plain(num_classes): return nn.Linear(4, num_classes)
def wide(num_classes, input_shape, width=8):
    return nn.Sequential(nn.Linear(input_shape[0], width), nn.BatchNorm1d(width), nn.Linear(width, num_classes)).eval()
def lazy(): return nn.LazyLinear(3)
def text(): return "net"
def fails(): raise ValueError("bad day")
"""


def test_user_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_model_factory", raising=False)

    def make(function: str, **options: object) -> torch.nn.Module:
        return build(f"my_model_factory:{function}", num_classes=3, input_shape=(4,), options=options)

    assert make("plain")(torch.ones(2, 4)).shape == (2, 3)
    module = make("wide", width=5)
    assert module.training and module(torch.ones(2, 4)).shape == (2, 3)
    for function, message in [
        ("lazy", "must know its shapes when built, got the lazy tensor weight"),
        ("text", "must return a torch.nn.Module, got str"),
        ("fails", "my_model_factory:fails raised ValueError: bad day"),
    ]:
        with pytest.raises(StudyError, match=message):
            make(function)
