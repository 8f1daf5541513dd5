"""Studies of text, end to end, with tiny random transformers: what trains, tasks, masked words, tickets that leave."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.catalogue import listing
from fedlth.data.tensors import inputs
from fedlth.data.tokens import tokenizer_of
from fedlth.engines.forked import Forked
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.federation import session
from fedlth.federation.rounds import Federation
from fedlth.forecast import forecast
from fedlth.models.call import call
from fedlth.models.transformer import Transformer
from fedlth.study.schema import Study
from fedlth.training import evaluation
from fedlth.training.evaluation import evaluate
from fedlth.training.local_client import LocalClient
from fedlth.training.loss import examined
from fedlth.training.task import Task, open_task
from tests import tiny
from tests.test_server_state import Stopped, stop
from tests.test_transport import Counting, check
from tests.text import sentences

transformers = pytest.importorskip("transformers")
HEAD = 16 * 2 + 2  # values of the head
LORA = {"lora": {"rank": 2, "dropout": 0.1}}
MASKED = {
    "options": {"task": "masked_lm"}, "data": {"label": None},
    "train": {"loss": {"name": "masked_lm", "mask_token": 4, "special": [0, 2, 3]}, "optimizer": "adamw", "lr": 0.01,
              "batch_size": 8, "steps": 2, "epochs": None, "momentum": 0.0},
}  # fmt: skip


def task_of(made: Study) -> Task:
    return open_task(made.science())


def test_an_evaluation_pads_a_text_to_others_of_about_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(sentences.study(tmp_path / "data"))
    data = inputs(task.dataset, np.arange(30), train=True)
    one_by_one = [evaluate(task.flat_model, task.theta_0, data.batch(slice(at, at + 1))) for at in range(30)]
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 4)
    seen, hook = list[tuple[int, int]](), task.flat_model.module.register_forward_pre_hook
    with hook(lambda module, given, named: seen.append([*given, *named.values()][0].shape), with_kwargs=True):
        found = evaluate(task.flat_model, task.theta_0, data)
    assert data.longest is not None
    wanted = [int(part.max()) for part in np.split(np.sort(data.longest), range(4, 30, 4))]
    assert [width for _, width in seen] == wanted
    assert found.accuracy == pytest.approx(np.mean([one.accuracy for one in one_by_one]))
    assert found.loss == pytest.approx(np.mean([one.loss for one in one_by_one]), rel=1e-5)


@pytest.mark.parametrize("method", ["fedavg", "local"])
@pytest.mark.parametrize(
    ("trains", "values"), [("head", HEAD), ("bitfit", HEAD + 2 * (7 * 16 + 32) + 16), (LORA, HEAD + 2 * 4 * 2 * 16)]
)
def test_what_trains_is_what_crosses(tmp_path: Path, method: str, trains: Any, values: int) -> None:
    made = sentences.study(tmp_path / "data", options={"trains": trains}, method={"name": method})
    task = task_of(made)
    assert task.exchange.num_floats == values
    tiny.run(made, tmp_path / "r")
    rows = tiny.rows(tmp_path / "r", "metrics")
    assert {row["client"] for row in rows} == {0, 1} and all(np.isfinite(row["test_loss"]) for row in rows)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_ticket_leaves_as_a_plain_model(tmp_path: Path, family: str) -> None:
    made = sentences.study(tmp_path / "data", family, options={"pooling": "own"}, personalise={"arms": ["ticket"]})
    tiny.run(made, tmp_path / "r")
    module = load_ticket(tmp_path / "r", 1)
    assert isinstance(module, Transformer)
    module.save_pretrained(tmp_path / "out")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    task = task_of(made)
    few = task.part(1, "test").batch(slice(0, 6)).x
    assert isinstance(few, dict) and not few["attention_mask"].all(), "lengths that differ"
    with torch.no_grad():
        assert torch.allclose(plain(**few).logits, call(module, few), atol=1e-5)
    pruned = dict(plain.named_parameters())
    kept = sum(int((pruned[e.name] != 0).sum()) for e in task.layout.prunable)
    assert kept == task.layout.num_prunable // 2


def own_weights(folder: Path) -> dict[str, str]:
    """Write a tiny random BERT and a tokenizer of its own, and return where."""
    library = pytest.importorskip("tokenizers")
    task_of(sentences.study(folder / "other")).model.module().save_pretrained(folder / "weights")
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sentences.GOOD, *sentences.BAD, *sentences.PLAIN]
    made = library.Tokenizer(library.models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.post_processor = library.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(folder / "weights" / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (folder / "weights" / "tokenizer_config.json").write_text(json.dumps(told))
    return {"path": str(folder / "weights")}


def test_the_lines_of_the_docs_give_a_tickets_outputs_without_fedlth(tmp_path: Path) -> None:
    where = own_weights(tmp_path)
    made = sentences.study(
        tmp_path / "data", model={"name": "hf", "options": where}, data={"tokenizer": where},
        personalise={"arms": ["ticket"]},
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    module = load_ticket(tmp_path / "r", 1)
    assert isinstance(module, Transformer) and module.pooling == "mean"
    module.save_pretrained(tmp_path / "folder")
    code = re.search(r"```python\n(# plain.py.*?)```", (sentences.ROOT / "docs" / "study.md").read_text(), re.S)
    assert code
    told = "\nimport json, sys\nassert 'fedlth' not in sys.modules\nprint(json.dumps([texts, logits.tolist()]))\n"
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", code.group(1) + told],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
        check=True,
    )
    texts, logits = json.loads(found.stdout)
    tokenizer = tokenizer_of(where, 12, ())
    rows = [torch.tensor(tokenizer(text, None)[0]) for text in texts]
    assert len({len(row) for row in rows}) > 1, "padded"
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        wanted = call(module, {"input_ids": ids, "attention_mask": (ids != 0).to(torch.int64)})
    assert torch.allclose(torch.tensor(logits), wanted, atol=1e-5)


def test_masked_words(tmp_path: Path) -> None:
    made = sentences.study(tmp_path / "data", method={"name": "fedavg"}, metrics=["perplexity"], **MASKED)
    tiny.run(made, tmp_path / "r")
    rows = tiny.rows(tmp_path / "r", "metrics")
    assert rows and all(row["test_loss"] < 2 * np.log(sentences.WORDS) for row in rows)


def test_masked_words_need_no_model_of_the_tokenizers_size(tmp_path: Path) -> None:
    given: dict[str, Any] = {**MASKED, "method": {"name": "fedavg"}}
    given["options"] = {"task": "masked_lm", "config": {**sentences.config("bert"), "vocab_size": 48}}
    tiny.run(sentences.study(tmp_path / "data", **given), tmp_path / "r")
    assert all(row["test_loss"] < 2 * np.log(sentences.WORDS) for row in tiny.rows(tmp_path / "r", "metrics"))
    with pytest.raises(StudyError, match="data.options.label: null"):
        resolve(sentences.study(tmp_path / "data", **{**given, "data": {}}))


def test_masked_words_alone_are_decoded(tmp_path: Path) -> None:
    """An evaluation of masked words never holds logits of all positions."""
    task: Task = task_of(sentences.study(tmp_path / "data", method={"name": "fedavg"}, **MASKED))
    sizes: list[tuple[int, ...]] = []
    _ = task.flat_model.module.register_forward_hook(lambda module, given, out: sizes.append(tuple(out.shape)))
    data = task.part(0, "test")
    scores = evaluate(task.flat_model, task.theta_0, data, task.judged.all)
    assert sizes and all(len(size) == 2 and size[0] < 3 * len(data) for size in sizes)
    assert 0 < scores.loss < 2 * np.log(sentences.WORDS)


def test_tasks_share_the_encoder(tmp_path: Path) -> None:
    made = sentences.study(
        tmp_path / "data", method={"name": "fedavg"},
        model={"name": "hf", "options": {"config": sentences.config("bert")}, "personal": ["head.*"]},
        tasks={"books": {"num_classes": 3}, "films": {}},
    )  # fmt: skip
    task = task_of(made)
    assert not any("head" in e.name or "embeddings.word" in e.name for e in task.exchange.entries)
    assert {one.dataset.num_classes for one in task.each} == {2, 3}
    tiny.run(made, tmp_path / "r")
    assert {row["client"] for row in tiny.rows(tmp_path / "r", "metrics")} == {0, 1}


@pytest.mark.parametrize(("compute", "density"), [("reference", 0.5), ("sparse", 0.2)])
def test_workers_and_a_resume_change_nothing(tmp_path: Path, compute: str, density: float) -> None:
    made = sentences.study(
        tmp_path / "data", personalise={"arms": ["ticket", "dense"], "clients_per_wave": 1}, compute=compute,
        finder={"densities": [density]},
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    tiny.run(made, one, engine=InProcess())
    forked = Forked(2)
    tiny.run(made, two, engine=forked)
    forked.close()
    assert tiny.facts(one) == tiny.facts(two)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "run", lambda self: stop(self, 2))
        with pytest.raises(Stopped):
            tiny.run(made, tmp_path / "cut")
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(one) == tiny.facts(tmp_path / "cut")


def test_other_weights_for_controls(tmp_path: Path) -> None:
    """A pre-trained encoder brings its weights; init: random is what draws others."""
    first = task_of(sentences.study(tmp_path / "data"))
    module = first.model.module()
    assert isinstance(module, Transformer) and not first.model.brought
    module.save_pretrained(tmp_path / "weights")
    options = {"path": str(tmp_path / "weights")}
    brings = task_of(sentences.study(tmp_path / "data", model={"name": "hf", "options": options}))
    assert "brings its own weights" in brings.model.brought
    drawn = task_of(
        sentences.study(
            tmp_path / "data", model={"name": "hf", "options": options, "reinit_options": {"init": "random"}}
        )
    )
    assert not drawn.model.brought
    names = {e.name: e for e in drawn.layout.entries}
    other = drawn.model.fresh("other")
    frozen = names["bert.embeddings.word_embeddings.weight"].slice
    assert np.array_equal(other.floats[frozen], drawn.theta_0.floats[frozen])


def test_the_check_says_what_guessing_reaches(tmp_path: Path) -> None:
    files = {"films": "films.tsv", "books": {"train": "films.tsv", "test": "books.tsv"}}
    made = sentences.study(tmp_path / "data", data={"files": files})
    text = forecast(made)
    task = task_of(made)
    hits = []
    for client in range(2):
        train, test = (task.part(client, part).y.numpy() for part in ("train", "test"))
        hits.append((test == np.bincount(train).argmax()).mean())
    wanted = f"guessing each client's most frequent training class: {100 * np.mean(hits):.1f} % of its test examples"
    assert wanted in text and f"({100 * min(hits):.1f} to {100 * max(hits):.1f})" in text
    assert "have a text that is in a validation or test part too" in text


def test_both_are_listed() -> None:
    assert "hf (path=None, package=None, hub=None" in listing("models") and "BERT, RoBERTa" in listing("models")
    assert "text (files, tokenizer, max_length=128" in listing("datasets")


def test_tokens_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    made = sentences.study(tmp_path / "data", data={"tokenizer": {"words": 60}}, method={"name": "fedavg"})
    small = {**sentences.config("bert"), "vocab_size": 8}
    made = made.model_copy(update={"model": made.model.model_copy(update={"options": {"config": small}})})
    with pytest.raises(StudyError, match="data.options.tokenizer: must give tokens below 8, the vocabulary of model"):
        resolve(made)


def test_flops_of_masked_words_count_what_is_decoded(tmp_path: Path) -> None:
    task = task_of(sentences.study(tmp_path / "data", method={"name": "fedavg"}, **MASKED))
    few = examined(task.loss, inputs(task.dataset, np.arange(2), train=True).batch(slice(None)))
    asked = int((few.y != -100).sum())
    assert 0 < asked < few.y.numel()
    flops = task.model.flops
    assert flops["cls.predictions.transform.dense.weight"] == 2 * asked * 16 * 16 // 2
    assert flops["bert.encoder.layer.0.attention.self.query.weight"] == 2 * few.y.numel() * 16 * 16 // 2


@pytest.mark.parametrize("rounds", [1, 0])
def test_pre_trained_weights_do_not_cross(rounds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first model is theta_0: what it costs is no matter of its size, and raw it would be 18 kB."""
    task_of(sentences.study(tmp_path / "data")).model.module().save_pretrained(tmp_path / "weights")
    made = sentences.study(
        tmp_path / "data", model={"name": "hf", "options": {"path": str(tmp_path / "weights")}},
        federate={"rounds": rounds, "clients_per_round": 2}, personalise={"arms": ["dense"]},
    )  # fmt: skip
    meter = Counting()
    tiny.run(made, tmp_path / "r", engine=meter)
    check(meter, tmp_path / "r", capsys)
    task = tiny.task_of(tmp_path / "r")
    assert task.exchange.num_floats > 4000 and task.study.model.theta_0 is not None
    first = [row for row in tiny.rows(tmp_path / "r", "ledger") if row["kind"] == "install"]
    assert len(first) == 2 and all(row["payload_bytes"] < 300 for row in first)


def test_training_flops_of_what_is_frozen(tmp_path: Path) -> None:
    """By layer: a head alone has no backward pass behind it, biases no gradient of a weight, adapters both in part."""

    def costs(trains: Any) -> tuple[dict[str, int], dict[str, int], LocalClient]:
        task = task_of(sentences.study(tmp_path / "data", options={"trains": trains}))
        return task.model.flops, task.model.training_flops, LocalClient(task, 0, 1, "try")

    once, whole, local = costs("all")
    pooler = "bert.pooler.dense.weight"  # nothing trains it, and no loss depends on it: the head sees a mean
    assert whole == {n: 3 * c for n, c in once.items()} | {pooler: once[pooler], "": 3 * once[""] - 2 * once[pooler]}
    assert local.flops(local.full, 7) == (7.0 * whole[""], 7.0 * whole[""])
    once, head, local = costs("head")
    assert head[""] == once[""] + 2 * once["head.weight"] < 1.1 * once[""]
    assert local.flops(local.full, 7)[0] == pytest.approx(7 * head[""])
    once, biases, _ = costs("bitfit")
    # The first biases that train are those of the embeddings' norm.
    assert biases[""] == 2 * once[""] + once["head.weight"] - once[pooler]
    once, lora, _ = costs(LORA)
    query = "bert.encoder.layer.{}.attention.self.query.{}.weight"
    assert lora[query.format(0, "base_layer")] == once[query.format(0, "base_layer")] > 0
    assert lora[query.format(1, "base_layer")] == 2 * once[query.format(1, "base_layer")]
    assert lora[query.format(0, "lora_A.default")] == 3 * once[query.format(0, "lora_A.default")] > 0
    assert 2 * once[""] * 0.7 < lora[""] < 2.3 * once[""]
