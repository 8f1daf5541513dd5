"""Tickets as ONNX: onnxruntime predicts what torch does, for every model of the registry and for one of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedlth
from fedlth.data.examples import Examples, Inputs
from fedlth.errors import StudyError
from fedlth.export import kernel_time
from fedlth.export.agreement import agreement
from fedlth.export.onnx_file import onnx
from fedlth.export.source import Source
from fedlth.models.call import call
from fedlth.models.layout import layout_of
from fedlth.models.prunable import prunable_names
from fedlth.models.registry import MODELS, build
from tests import tiny
from tests.text.sentences import WORDS, config

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
CLASSES = 6


class Outside(nn.Module):
    """A model that is not in the package: dilation, a gate, layer norm, attention by hand, concatenation, a buffer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=2, dilation=2)
        self.gate, self.norm = nn.Conv2d(8, 8, 1, groups=2), nn.LayerNorm(16)
        self.keys, self.head = nn.Linear(16, 16, bias=False), nn.Linear(32, num_classes)
        self.register_buffer("places", torch.linspace(-1, 1, 16).expand(16, 16).clone())

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.conv(x))
        x = nn.functional.avg_pool2d(x * torch.sigmoid(self.gate(x)), 2)
        x = x.reshape(len(x), -1, 16)  # (N, 8, 16)
        seen = torch.softmax(self.keys(self.norm(x)) @ (x + self.places[: x.shape[1]]).transpose(1, 2), -1) @ x
        return self.head(torch.cat((seen.mean(1), x.amax(1)), 1))


class Loop(nn.Module):
    """What no graph can express: how often a layer is applied depends on the values."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        while float(x.detach().square().mean()) > 0.5:
            x = 0.1 * torch.tanh(self.inner(x))
        return self.head(x)


def source(name: str, x: Inputs, lengths: dict[str, Tensor] | None = None, **options: Any) -> Source:
    """Return a network of random weights under a random mask, as an export takes it."""
    shape: Any = {n: tuple(t.shape[1:]) for n, t in x.items()} if isinstance(x, dict) else tuple(x.shape[1:])
    classes = options.pop("num_classes", CLASSES)
    torch.manual_seed(0)
    module = build(name, num_classes=classes, input_shape=shape, options=options).eval()
    layout = layout_of(module, prunable_names(module, None))
    mask = np.random.default_rng(0).random(layout.num_prunable) < 0.5
    with torch.no_grad():
        for e in layout.prunable:
            module.get_parameter(e.name).mul_(torch.from_numpy(mask[e.slice].reshape(e.shape)))
    count = len(next(iter(x.values())) if isinstance(x, dict) else x)
    task: Any = SimpleNamespace(
        study=SimpleNamespace(train=SimpleNamespace(batch_size=4), model=SimpleNamespace(name=name))
    )
    test = Examples(x, torch.zeros(count, dtype=torch.int64), lengths or {})
    return Source("run: client 0", 0, module, layout, mask, task, test, {"model": name, "input_shape": shape})


def images(*shape: int) -> Tensor:
    return torch.randn(11, *shape, generator=torch.Generator().manual_seed(1))


def sentences() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return ragged tokens with their mask: batches are cut to their own longest."""
    dice = torch.Generator().manual_seed(2)
    lengths = torch.tensor([6, 10, 3, 4, 2, 5, 3, 2, 7, 1, 4])
    mask = (torch.arange(10) < lengths[:, None]).to(torch.int64)
    ids = torch.randint(5, WORDS, mask.shape, generator=dice) * mask
    return {"input_ids": ids, "attention_mask": mask}, {"input_ids": lengths, "attention_mask": lengths}


def of_text(**options: Any) -> Source:
    pytest.importorskip("transformers")
    x, lengths = sentences()
    return source("hf", x, lengths, **options)


CASES: dict[str, Any] = {
    "lenet300": lambda: source("lenet300", images(1, 8, 8)),
    "lenet5": lambda: source("lenet5", images(1, 16, 16)),
    "leaf_cnn": lambda: source("leaf_cnn", images(1, 8, 8)),
    "conv2": lambda: source("conv2", images(3, 8, 8)),
    "conv4": lambda: source("conv4", images(3, 8, 8)),
    "resnet9": lambda: source("resnet9", images(3, 8, 8)),
    "resnet9, batch norms": lambda: source("resnet9", images(3, 8, 8), norm="batch"),
    "char_lstm": lambda: source("char_lstm", torch.arange(11 * 7).reshape(11, 7) % CLASSES, hidden=16),
    "mlp": lambda: source("mlp", images(1, 8, 8)),
    "hf": lambda: of_text(config=config("bert")),
    "hf, roberta": lambda: of_text(config=config("roberta")),
    "hf, distilbert, its own head": lambda: of_text(config=config("distilbert"), pooling="own"),
    "hf, a decoder": lambda: of_text(config=config("gpt2")),
    "hf, masked tokens": lambda: of_text(config=config("bert"), task="masked_lm", num_classes=WORDS),
    "outside": lambda: source("tests.export.test_onnx:Outside", images(1, 8, 8)),
}


def test_no_model_of_the_registry_is_left_out() -> None:
    assert set(MODELS) <= {name.partition(",")[0] for name in CASES}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in CASES])
def test_onnxruntime_predicts_what_torch_does(name: str, tmp_path: Path) -> None:
    given = CASES[name]()
    written = onnx(given, tmp_path)
    single = given.test.batch(slice(3, 4)).x
    found = agreement(name, lambda x: call(given.module, x), written.forward, [*given.batches, single], classes=True)
    assert found <= 1e-5
    x = given.batches[0]
    assert written.memory(x) > 4 * given.layout.num_params
    # As anyone else opens it: no fedlth, the file alone.
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    named = x if isinstance(x, dict) else {"x": x}
    logits = session.run(["logits"], {one.name: named[one.name].numpy() for one in session.get_inputs()})[0]
    with torch.no_grad():
        assert np.array_equal(logits.argmax(-1), call(given.module, x).argmax(-1).numpy())
    assert session.get_modelmeta().custom_metadata_map["model"] == given.task.study.model.name
    assert not isinstance(session.get_inputs()[0].shape[0], int), "the batch axis is free"


@pytest.mark.slow
def test_a_run_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_time.kernel, "available", lambda: "the kernel is not here")
    more = {"personalise": {"arms": ["ticket"], "epochs": 1}, "federate": {"rounds": 1, "clients_per_round": 2}}
    run = tiny.run(tiny.study(**more), tmp_path / "r").root
    told = fedlth.export_ticket(run, 1, to="onnx")
    assert told.difference <= 1e-5 and told.examples == 20 and told.files == ("model.onnx",)
    measures = json.loads((told.folder / "export.json").read_text())
    assert measures["export"]["latency_ms"] > 0 and measures["export"]["memory_bytes"] > 0
    assert json.loads(
        runtime.InferenceSession(told.folder / "model.onnx").get_modelmeta().custom_metadata_map["std"]
    ) == [0.25]
    file = fedlth.export_ticket(run, 1, to="compact").folder / "ticket.safetensors"
    alone = fedlth.export_ticket(file, to="onnx")
    assert alone.random and alone.difference <= 1e-5
    own, runs = (runtime.InferenceSession(one.folder / "model.onnx").get_modelmeta() for one in (alone, told))
    assert {**own.custom_metadata_map, "ticket": ""} == {**runs.custom_metadata_map, "ticket": ""}


@pytest.mark.slow
def test_what_no_graph_expresses_is_refused(tmp_path: Path) -> None:
    given = source("tests.export.test_onnx:Loop", images(1, 8, 8))
    with pytest.raises(
        StudyError, match="run: client 0: ONNX cannot express the model tests.export.test_onnx:Loop: "
    ) as e:
        onnx(given, tmp_path)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())
