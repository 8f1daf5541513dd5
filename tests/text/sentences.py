"""Made-up sentences that say which class they are of, as files, and a study of them with a tiny random transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedlth.study import schema
from fedlth.training.task import open_task
from tests import tiny

ROOT = Path(__file__).parents[2]
BERT_TICKETS, BERT_MLM = (ROOT / "configs" / name for name in ("bert_tickets.yaml", "bert_mlm.yaml"))
BENCH = ROOT / "bench" / "bert.yaml"

FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}
WORDS = 40
# Of bert_tickets: a round before the search.
IN_ROUNDS: dict[str, Any] = {
    "method": "two_step", "federate": {"rounds": 1, "clients_per_round": 3}, "train": {"steps": 2},
    "model": {"personal": ["head.*"]},
}  # fmt: skip
GOOD, BAD, PLAIN = ["good", "fine", "great"], ["bad", "poor", "awful"], ["the", "film", "was", "a", "story", "of"]


def config(family: str) -> dict[str, Any]:
    length = "n_positions" if family == "gpt2" else "max_position_embeddings"
    return {"model_type": family, "vocab_size": WORDS, length: 16, **FAMILIES[family]}


def lines(count: int, seed: int) -> list[tuple[str, int]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        label = int(rng.integers(0, 2))
        words = [*rng.choice(PLAIN, rng.integers(2, 7)), *rng.choice(GOOD if label else BAD, 2)]
        found.append((" ".join(map(str, words)), label))
    return found


def write(folder: Path, keys: tuple[str, ...] = ("films", "books"), count: int = 60) -> dict[str, str]:
    """Write a TSV file of text and label a key, and return key -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, key in enumerate(keys):
        (folder / f"{key}.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in lines(count, seed)))
    return {key: f"{key}.tsv" for key in keys}


def study(
    folder: Path, family: str = "bert", *, options: dict[str, Any] | None = None, data: dict[str, Any] | None = None,
    **sections: Any,
) -> schema.Study:  # fmt: skip
    """Return a study of two clients, a domain each; `options` are the model's, `data` the data set's."""
    files = {"files": write(folder), "text": 0, "label": 1, "tokenizer": {"words": WORDS}, "max_length": 12}
    given: dict[str, Any] = {
        "data": {"name": "text", "root": str(folder), "options": {**files, **(data or {})}},
        "model": {"name": "hf", "options": {"config": config(family), **(options or {})}},
        "partition": {"name": "natural", "clients_per_key": 1},
        "clients": {"count": 2, "unseen": 0.0, "test_samples": 12},
        "train": {"lr": 0.01, "momentum": 0.0, "batch_size": 8, "optimizer": "adamw", "steps": 2, "epochs": None},
        "federate": {"rounds": 1, "clients_per_round": 2}, "finder": {"densities": [0.5]},
        "personalise": {"steps": 2, "epochs": None},
    }  # fmt: skip
    for key, value in sections.items():
        given[key] = {**given.get(key, {}), **value} if isinstance(value, dict) else value
    return schema.build({**tiny.tree(), **given})


def shrunk(tree: dict[str, Any], folder: Path) -> None:
    """Put made-up domains and a tiny pre-trained network into the places of a study's own."""
    weights = folder / "weights"
    if not weights.exists():
        open_task(study(folder / "other").science()).model.module().save_pretrained(weights)
    options = tree["data"]["options"]
    names = tuple(options["files"])
    options.update(files=write(folder / "texts", names, 50), gap=1, blocks=1, tokenizer={"words": WORDS}, max_length=12)
    tree["data"]["root"] = str(folder / "texts")
    own = {name: value for name, value in tree["model"]["options"].items() if name != "package"}
    tree["model"]["options"] = {**own, "path": str(weights)}
    tree["clients"]["test_samples"] = 8
    tree["train"]["batch_size"] = 8


def bert_tickets(folder: Path, **sections: Any) -> schema.Study:
    """Return configs/bert_tickets.yaml in small: made-up domains, a tiny pre-trained network, a few steps."""
    tree = yaml.safe_load(BERT_TICKETS.read_text())
    shrunk(tree, folder)
    tree["train"]["lr"] = 0.01
    tree["finder"]["densities"], tree["finder"]["main"] = [0.5, 0.2], 0.2
    tree["personalise"]["steps"] = 3
    del tree["seeds"]
    return schema.build(_with(tree, sections))


def bert_mlm(folder: Path, **sections: Any) -> schema.Study:
    """Return configs/bert_mlm.yaml in small, in the folder of the same texts and weights."""
    tree = yaml.safe_load(BERT_MLM.read_text())
    shrunk(tree, folder)
    tree["train"].update(lr=0.01, steps=2, loss={"name": "masked_lm", "mask_token": 4, "special": [0, 2, 3]})
    tree["federate"]["rounds"], tree["personalise"]["steps"] = 2, 2
    return schema.build(_with(tree, sections))


def _with(tree: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    for key, value in sections.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return tree
