"""A study that runs in a second: 8 x 8 images of four classes, made up, and small networks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlth.engines.cohort import answered
from fedlth.engines.inprocess import InProcess
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import read, resolve
from fedlth.federation import session
from fedlth.federation.jobs import Again, Answers, Engine, Enough, Failure, Job, Reply, never
from fedlth.federation.rounds import Federation
from fedlth.methods.client_update import private
from fedlth.models.layout import Layout, Params, layout_of
from fedlth.output import lines_to
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema
from fedlth.training.budget import Budget
from fedlth.training.local_client import LocalClient
from fedlth.training.optimizer import Sgd
from fedlth.training.recipe import PARTS, TrainingRecipe
from fedlth.training.task import Task, open_task

NUM_CLASSES, SIDE = 4, 8
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavg_ft": {},
    "local": {},
    "standalone": {},
    "two_step": {},
    # Gates open: whether a client prunes must not hang on a machine's last bit.
    "lotteryfl": {"rate": 0.2, "density": 0.3, "val_accuracy": -1.0},
    "sub_fedavg": {"rate": 0.2, "density": 0.3, "val_accuracy": -1.0, "distance": -1.0},
    "fedselect": {"rate": 0.25, "limit": 0.5},
    "fedpm": {"score_lr": 5.0},
    "salientgrads": {"density": 0.3},
    "ssfl": {"density": 0.3},
    # A round costs what weights cost, so that an adjustment drops some; each happens within three rounds.
    "prunefl": {"every": 2, "initial": 2, "max_dec": 0.4, "constant_s": 1e-4},
    "fedtiny": {"density": 0.3, "pool": 3, "every": 1, "end": 4, "rate": 0.3, "blocks": 2},
    "feddst": {"density": 0.3, "rate": 0.4, "every": 2, "end": 8},
    "flash": {"density": 0.3, "share": 0.5, "stage1": 2, "rate": 0.4, "every": 2, "end": 8},
    "fedmask": {"score_lr": 5.0, "density": 0.5},
    "deltamask": {"score_lr": 5.0},
    "spafl": {"coefficient": 0.1},
    "pfedgate": {"density": 0.4},
    "ticket_lora": {"density": 0.4},
    "fedavgm": {},
    "fedadam": {},
    "fedyogi": {},
    "scaffold": {},
    "fedprox": {"mu": 0.5},
    "ditto": {"strength": 0.5},
    "pfedme": {"strength": 2.0, "inner_steps": 2, "outer_lr": 0.1},
    "apfl": {"adaptive": True},
    "fedper": {},
    "fedrep": {"head_epochs": 2},
    "fedbn": {},
    "dfedavg": {"topology": "ring"},
    "dispfl": {"density": 0.4, "topology": {"name": "random", "count": 1}},
    "cell": {"rate": 0.3, "density": 0.5, "val_accuracy": -1.0},
    "sub_fedavg_hybrid": {"rate": 0.2, "density": 0.3, "val_accuracy": -1.0, "distance": -1.0, "channel_distance": -1},
    "hermes": {"rate": 0.3, "density": 0.3, "val_accuracy": -1.0},
    "fedltn": {"rate": 0.2, "density": 0.3, "val_accuracy": -1.0, "jump_start": 1},
    "fedspa": {"density": 0.4},
    "heterofl": {},
    "fjord": {"widths": [0.5, 1.0], "distil": 0.5},
    "fiarse": {},
    "sparsyfed": {"density": 0.3},
}
# What else a method's study needs.
SECTIONS: dict[str, dict[str, Any]] = {
    "fedbn": {"model": {"name": "tests.tiny:Small", "options": {}}},
    "ticket_lora": {"model": {"name": "tests.tiny:Adapted", "options": {}}},
}
# One of each kind: what holds for all methods is tried on each in tests/methods, what depends on the kind on these.
KINDS = ("fedavg", "fedavg_ft", "local", "standalone", "two_step", "lotteryfl", "sub_fedavg", "fedselect", "fedpm")
# With these, one of each way in which clients and server exchange anything; engines run the others when asked (long).
EXCHANGES = (
    *KINDS,
    "scaffold",
    "fedbn",
    "fedspa",
    "hermes",
    "fedtiny",
    "heterofl",
    "fiarse",
    "deltamask",
    "spafl",
    "dispfl",
    "ticket_lora",
)


def each_method(short: Iterable[str] = EXCHANGES) -> list[Any]:
    """Return every method's name as a parameter; those that are not in `short` are marked `long`."""
    kept = set(short)
    return [name if name in kept else pytest.param(name, marks=pytest.mark.long) for name in METHODS]


# What clients carry where a method asks: half of them less than the others.
CARRY_LESS: dict[str, Any] = {"capacity": [{"clients": [0, 1], "width": 0.5, "density": 0.4}]}
READ_CAPACITY = ("heterofl", "fjord", "fiarse")


# A training recipe in which everything is drawn or depends on the round and the step.
RECIPE: dict[str, Any] = {
    "train": {
        "epochs": 2, "lr": 0.01, "momentum": 0.0, "round_decay": 0.7, "clip_norm": 0.5, "dropout": 0.2,
        "optimizer": {"name": "adamw", "weight_decay": 0.1}, "schedule": {"name": "linear", "warmup": 0.4},
        "augment": [{"name": "crop", "pad": 1}, "flip"], "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
    },
    "personalise": {"steps": 4, "epochs": None, "schedule": {"name": "cosine", "warmup": 0.25}},
    "model": {"name": "tests.tiny:dropped", "options": {}},
}  # fmt: skip


def dropped(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, num_classes))


def images(seed: int = 0, train: int = 240, test: int = 120) -> dict[str, Any]:
    """Return noisy prototypes of four classes, uint8 (N, 1, 8, 8)."""
    rng = np.random.default_rng(seed)
    prototypes = rng.integers(0, 255, (NUM_CLASSES, 1, SIDE, SIDE))

    def part(size: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, NUM_CLASSES, size)
        x = 0.5 * prototypes[y] + 0.5 * rng.integers(0, 255, (size, 1, SIDE, SIDE))
        return x.astype(np.uint8), y.astype(np.int64)

    x_train, y_train = part(train)
    x_test, y_test = part(test)
    return {
        "name": "tiny", "x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test,
        "num_classes": NUM_CLASSES, "mean": (0.5,), "std": (0.25,),
    }  # fmt: skip


def tree(**sections: Any) -> dict[str, Any]:
    """Return a tiny study as a plain tree; sections are merged into its defaults."""
    base: dict[str, Any] = {
        "study": "tiny",
        "method": {"name": "two_step"},
        "data": {"name": "tests.tiny:images"},
        "partition": {"name": "iid"},
        "clients": {"count": 4, "unseen": 0.25, "test_samples": 20},
        "model": {"name": "mlp", "options": {"hidden": [12]}},
        "train": {"lr": 0.1, "momentum": 0.5, "batch_size": 16},
        "federate": {"rounds": 2, "clients_per_round": 2},
        "finder": {"densities": [0.5, 0.2]},
        "personalise": {"epochs": 1, "clients_per_wave": 2},
    }
    out = copy.deepcopy(base)
    for key, value in sections.items():
        out[key] = {**out[key], **value} if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def study(**sections: Any) -> schema.Study:
    return schema.build(tree(**sections))


def of_method(name: str, **sections: Any) -> schema.Study:
    sections = {**SECTIONS.get(name, {}), **sections}
    if name in READ_CAPACITY:
        sections["clients"] = {**CARRY_LESS, **sections.get("clients", {})}
    return study(method={"name": name, **METHODS[name]}, **sections)


def recipe(
    *, epochs: int = 1, momentum: float = 0.0, weight_decay: float = 0.0, schedule: str = "constant", **more: Any
) -> TrainingRecipe:
    """Return a recipe of SGD, its parts given as plain numbers."""
    optimizer = Sgd(momentum=momentum, weight_decay=weight_decay)
    return TrainingRecipe(
        budget=Budget(epochs=epochs), optimizer=optimizer, schedule=PARTS["schedule"][schedule](), **more
    )


def task(**sections: Any) -> Task:
    return experiment(study(**sections)).task


def experiment(made: schema.Study) -> Experiment:
    """Return what a study means, nothing tried."""
    return read(made)[0]


def task_of(out: Path) -> Task:
    return open_task(RunFolder(out).study().science())


def run(
    made: schema.Study, out: Path, *, engine: Engine | None = None, tell: Callable[[str], None] | None = None
) -> RunFolder:
    """Run a study; `tell` is given every line that it logs."""
    experiment, notes = resolve(made)
    with lines_to(tell) if tell else nullcontext():
        return session.start(experiment, notes, out, engine or InProcess())


def opened(folder: RunFolder, engine: Engine | None = None) -> Federation:
    """Open a run folder where its last commit left it."""
    return Federation(Experiment.of(folder.study()), folder, engine or InProcess())


def facts(out: Path) -> dict[str, bytes]:
    """Return everything of a run that must be equal after any resume and on any engine, as bytes."""
    names = ("ledger.jsonl", "metrics.jsonl", "rounds.jsonl", "digests.json")
    tickets = {p.name: p.read_bytes() for p in sorted((out / "tickets").glob("*"))}
    return {**{n: (out / n).read_bytes() for n in names}, **tickets}


def kept_by(task: Task, state: ClientState) -> Params:
    """Return a client's whole model as its state has it: theta_0 but for what is its own."""
    return private(LocalClient(task, 0, 0, "federate"), state)


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_bytes().splitlines()]


def digests(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "digests.json").read_bytes()))


class Lists:
    """An in-process engine that takes two jobs at a time; tests change what goes into `run`, or what comes out."""

    name, holds_state = "inprocess", False

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        return answers(InProcess(), jobs)

    def map(self, jobs: Iterable[Job], /, *, again: Again = never) -> Answers:
        source = iter(jobs)
        while part := list(islice(source, 2)):
            yield from answered(part, self.run, again)

    def present(self, *, until: Enough | None = None) -> frozenset[int] | None:
        return None

    def late(self) -> Sequence[tuple[Job, Reply | Failure]]:
        return ()

    def close(self) -> None:
        pass


def answers(engine: Engine, jobs: Iterable[Job]) -> list[Reply | Failure]:
    return [answer for _, answer in engine.map(jobs)]


class Small(nn.Module):
    """A convolution, a BatchNorm with its counters, a linear head: one of each kind of tensor."""

    def __init__(self, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * 6 * 6, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


class Adapted(nn.Module):
    """A linear layer that nothing trains, a low-rank adapter beside it, a head."""

    def __init__(self, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.base = nn.Linear(SIDE * SIDE, 12).requires_grad_(False)
        self.down, self.up = nn.Linear(SIDE * SIDE, 2, bias=False), nn.Linear(2, 12, bias=False)
        self.head = nn.Linear(12, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.head(torch.relu(self.base(x) + self.up(self.down(x))))


def small_layout() -> Layout:
    return layout_of(Small(), ("conv.weight", "head.weight"))
