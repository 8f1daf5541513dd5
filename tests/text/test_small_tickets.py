"""Tickets of whole heads and channels: what a run finds, and the smaller networks as which they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fedlth
from fedlth.cli import main
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.export import measure, small_network
from fedlth.export.small_network import load_small
from fedlth.models.call import call
from fedlth.models.flops import layer_flops
from fedlth.models.heads import living
from fedlth.models.layout import layout_of
from fedlth.models.prunable import prunable_names
from fedlth.models.small import smaller
from fedlth.models.transformer import Transformer
from fedlth.training.local_client import LocalClient
from tests import tiny
from tests.laws.fakes import finder
from tests.text import sentences
from tests.text.sentences import FAMILIES, WORDS
from tests.text.test_hf_model import ENCODERS, batch, made

transformers = pytest.importorskip("transformers")
FEED_FORWARD = {  # patterns of its weights alone
    "bert": ["*.layer.*.dense.weight", "!*attention*"], "roberta": ["*.layer.*.dense.weight", "!*attention*"],
    "distilbert": ["*.ffn.*.weight"], "gpt2": ["*.mlp.*.weight"],
}  # fmt: skip
WHOLE = {"granularity": "heads_and_channels", "densities": [0.5]}


def ticket(family: str, density: float = 0.5, patterns: list[str] | None = None, **options: Any) -> Transformer:
    """Return a random network in which nothing is zero but what a random mask of heads and channels leaves out."""
    module = made(family, **options)
    layout = layout_of(module, prunable_names(module, patterns))
    draw = np.random.default_rng(0)
    full = np.ones(layout.num_prunable, bool)
    mask = finder(granularity="heads_and_channels", scope="global").pick(draw.random(full.size), full, layout, density)
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, tensor in sorted(module.named_parameters()):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=dice))
        for e in layout.prunable:
            module.get_parameter(e.name).mul_(torch.from_numpy(mask[e.slice].reshape(e.shape)))
    return module


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, options) for family in FAMILIES for options in ({}, {"pooling": "own"})),
        *((family, {"task": "masked_lm", "num_classes": WORDS}) for family in ENCODERS),
    ],
    ids=str,
)
def test_the_smaller_network_has_the_same_outputs(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    module, x = ticket(family, **options), batch()
    small = smaller(module)
    assert sum(t.numel() for t in small.parameters()) < sum(t.numel() for t in module.parameters())
    assert min(small.counts.values()) >= 1 and any(n < module.counts[of] for of, n in small.counts.items())
    with torch.no_grad():
        assert torch.allclose(call(small, x), call(module, x), atol=1e-6)
    small.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    again = load_small(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(call(again, x), call(small, x))
    assert again.counts == small.counts and not again.plain
    call(small.train(), x).square().sum().backward()  # it trains like any other


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_equal_width_open_in_plain_transformers(tmp_path: Path, family: str) -> None:
    module, x = made(family, pooling="own"), batch((10,))
    kept = {of: np.arange(n) % 2 == 0 for of, n in module.counts.items() if of.endswith(".channels")}
    layout = layout_of(module, prunable_names(module, FEED_FORWARD[family]))
    with torch.no_grad():
        for e in layout.prunable:
            assert e.units is not None and e.units.of in kept
            there = torch.from_numpy(kept[e.units.of][e.units.along(e.shape[e.units.dim])])
            module.get_parameter(e.name).mul_(there[:, None] if e.units.dim == 0 else there)
    small = smaller(module)
    assert small.plain
    small.save_pretrained(tmp_path)
    plain, told = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    with torch.no_grad():
        assert torch.allclose(plain.eval()(**x).logits, call(module, x), atol=1e-5)
        assert torch.equal(call(load_small(tmp_path), x), call(small, x))


def test_a_run_finds_such_tickets_and_they_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {**sentences.study(tmp_path / "data").model_dump(mode="json")["finder"], **WHOLE, "densities": [0.5, 0.3]}
    study = sentences.study(tmp_path / "data", finder=given, personalise={"arms": ["ticket", "random", "global_mask"]})
    tiny.run(study, tmp_path / "r")
    task = tiny.task_of(tmp_path / "r")
    rows = tiny.rows(tmp_path / "r", "metrics")
    channel = 2 * 16 / (4 * 16 * 16 + 2 * 16 * 32)
    assert {row["arm"] for row in rows} == {"ticket", "random", "global_mask"}
    assert all(abs(row["density"] - row["target_density"]) <= channel for row in rows if row["target_density"] < 1)
    module = fedlth.load_ticket(tmp_path / "r", 1)
    assert isinstance(module, Transformer)
    mask = np.concatenate(
        [module.get_parameter(e.name).detach().numpy().reshape(-1) != 0 for e in task.layout.prunable]
    )
    alive = living(task.layout, mask)
    for name, unit in module.units().items():
        if name.endswith(".bias"):
            gone = ~alive[unit.of][unit.along(module.get_parameter(name).numel())]
            assert gone.any() and not module.get_parameter(name).detach().numpy()[gone].any()
    assert main(["tickets", "export", str(tmp_path / "r"), "1", "--to", "small"]) == 0
    folder = tmp_path / "r" / "export" / "small" / "client-0001"
    text = capsys.readouterr().out
    assert "opened by fedlth.load_small" in text and "bert.encoder.layer.0.heads: 1 of 2" in text and "latency" in text
    told = json.loads((folder / "export.json").read_text())
    assert told["difference"] <= 1e-5 and told["client"] == 1 and told["examples"] == len(task.part(1, "test"))
    small = fedlth.load_small(folder)
    assert told["export"]["parameters"] == sum(tensor.numel() for tensor in small.parameters())
    assert told["export"]["file_bytes"] == (folder / "model.safetensors").stat().st_size < told["ticket"]["file_bytes"]
    assert 0 < told["export"]["memory_bytes"] < told["ticket"]["memory_bytes"]
    x = task.part(1, "test").batch(slice(0, 5)).x
    with torch.no_grad():
        assert torch.allclose(call(small, x), call(module, x), atol=1e-5)


def test_what_is_alive_is_what_the_smaller_network_costs(tmp_path: Path) -> None:
    task = tiny.task_of(tiny.run(sentences.study(tmp_path / "data"), tmp_path / "r").root)
    mask = finder(granularity="heads_and_channels").pick(
        np.random.default_rng(0).random(task.layout.num_prunable), np.ones(task.layout.num_prunable, bool),
        task.layout, 0.3,
    )  # fmt: skip
    module = task.model.module()
    with torch.no_grad():
        for e in task.layout.prunable:
            module.get_parameter(e.name).mul_(torch.from_numpy(mask[e.slice].reshape(e.shape)))
    assert isinstance(module, Transformer)
    few = task.part(0, "train").batch(slice(0, 2)).x
    dense, whole = layer_flops(module, few)
    small, less = layer_flops(smaller(module), few)
    for e in task.layout.prunable:
        assert small[e.name] == pytest.approx(dense[e.name] * mask[e.slice].mean(), abs=1)
    client = LocalClient(task, 0, 0, "personalise")
    counted = client.flops(mask, 1)
    # Of a training too; a little less, as the pooler, which nothing prunes or trains, counts one forward of three.
    assert counted[1] / counted[0] == pytest.approx(less / whole, rel=0.02)
    assert counted[1] / counted[0] < less / whole


def test_nothing_is_written_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sentences.study(tmp_path / "data", personalise={"arms": ["ticket"]})
    tiny.run(plain, tmp_path / "plain")
    with pytest.raises(StudyError, match="client 0: no head and no channel is pruned as a whole; finder.granularity"):
        fedlth.export_ticket(tmp_path / "plain", 0, to="small")
    tiny.run(sentences.study(tmp_path / "data", finder=WHOLE, personalise={"arms": ["ticket"]}), tmp_path / "r")
    real = small_network.smaller

    def wrong(module: Transformer) -> Transformer:
        found = real(module)
        with torch.no_grad():
            found.get_parameter("head.bias").add_(1e-3)
        return found

    monkeypatch.setattr(small_network, "smaller", wrong)
    with pytest.raises(StudyError, match="client 0, as small: outputs must not differ from the ticket's by 1e-05, got"):
        fedlth.export_ticket(tmp_path / "r", 0, to="small")
    assert not (tmp_path / "r" / "export").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "whole")
    with pytest.raises(StudyError, match="got a config.json without fedlth_small"):
        load_small(tmp_path / "whole")
    smaller(ticket("bert")).save_pretrained(tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    held = {n: t for n, t in tensors.items() if n != "head.bias"}
    save_file(held, file)
    with pytest.raises(StudyError, match=r"model.safetensors must hold \['head.bias'\], and not \[\]"):
        load_small(tmp_path / "small")
    save_file({**tensors, name: tensors[name][1:].contiguous()}, file)
    with pytest.raises(StudyError, match="model.safetensors does not fit config.json"):
        load_small(tmp_path / "small")


def test_the_study_is_refused_where_nothing_whole_can_go(tmp_path: Path) -> None:
    lora = sentences.study(tmp_path / "data", options={"trains": {"lora": {"rank": 2}}}, finder=WHOLE)
    with pytest.raises(StudyError, match=r"finder.granularity: heads_and_channels needs a transformer .* got "):
        resolve(lora)
    with pytest.raises(StudyError, match="finder.densities: must be at least 0.2"):
        resolve(sentences.study(tmp_path / "data", finder={**WHOLE, "densities": [0.1]}))


def test_the_memory_of_a_pass_is_what_lives_at_once() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    assert measure.peak_bytes(net, torch.zeros(8, 4)) == 2 * 8 * 100 * 4  # before the relu, and behind it
