"""Clients with tasks of their own: heads by natural key over one exchanged encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlth.api import load_ticket
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.federation import session
from fedlth.forecast import forecast
from fedlth.report import compare, read_results, summary_text, write_report
from fedlth.report.fleet import tiers_table
from fedlth.report.tables import tasks_table
from fedlth.report.units import NOTHING
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema
from fedlth.training import cohort
from fedlth.training.batch_requests import Evaluation
from fedlth.training.evaluation import ACCURACY, evaluate
from fedlth.training.task import forget_tasks
from tests import tiny

CLASSES = {"digits": 2, "shapes": 5, "signs": 3}


def domains(*, numbered: bool = False, classes: dict[str, int] | None = None, train: int = 180) -> dict[str, Any]:
    """Return noisy prototypes of three domains; labels of each begin at 0. `numbered`: keys 0, 1, 2 for names."""
    rng = np.random.default_rng(3)
    classes = classes or CLASSES
    prototypes = {name: rng.integers(0, 255, (count, 1, 8, 8)) for name, count in classes.items()}

    def part(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keys = np.array(sorted(classes))[np.arange(size) % len(classes)]
        y = np.array([rng.integers(classes[key]) for key in keys], np.int64)
        x = np.stack([prototypes[key][label] for key, label in zip(keys, y, strict=True)])
        x = (0.6 * x + 0.4 * rng.integers(0, 255, x.shape)).astype(np.uint8)
        return x, y, np.searchsorted(sorted(classes), keys) if numbered else keys

    fields = ("x", "y", "key")
    made = {f"{f}_{n}": a for n, s in (("train", train), ("test", 120)) for f, a in zip(fields, part(s), strict=True)}
    return {"name": "domains", "num_classes": max(classes.values()), "mean": (0.5,), "std": (0.25,), **made}


def alike() -> dict[str, Any]:
    """Return domains of five classes each."""
    return domains(classes=dict.fromkeys(CLASSES, 5))


class Shared(nn.Module):
    """An encoder that all clients share, and a head; `wide` widens the encoder, which no task must."""

    def __init__(self, *, num_classes: int, hidden: int = 0, wide: int = 12) -> None:
        super().__init__()
        # The head is drawn first: the encoder of each task would then be another, were it the task's own draw.
        inner = [nn.Linear(wide, hidden), nn.ReLU()] if hidden else []
        self.head = nn.Sequential(*inner, nn.Linear(hidden or wide, num_classes))
        self.encoder = nn.Linear(64, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.encoder(x.flatten(1))))


MIXED: dict[str, Any] = {
    "digits": {"metric": "macro_f1"},
    "shapes": {"metric": "perplexity"},
    "signs": {"metric": "loss"},
}
TASKS: dict[str, Any] = {"digits": {"num_classes": 2}, "shapes": {"options": {"hidden": 7}}, "signs": {}}


def tree(method: str = "two_step", **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "method": {"name": method, **tiny.METHODS[method]},
        "data": {"name": "tests.test_tasks:domains"},
        "partition": {"name": "natural", "clients_per_key": 2},
        "clients": {"count": 6, "unseen": 0.2},
        "model": {"name": "tests.test_tasks:Shared", "options": {}, "personal": ["head.*"]},
        "federate": {"rounds": 2, "clients_per_round": 4},
        "tasks": TASKS,
    }
    made = tiny.tree(**base)
    made["model"]["options"] = {}
    for key, value in sections.items():
        whole = not isinstance(value, dict) or key in ("tasks", "partition")
        made[key] = value if whole else {**made.get(key, {}), **value}
    return made


def study(method: str = "two_step", **sections: Any) -> schema.Study:
    return schema.build(tree(method, **sections))


def test_every_client_has_the_network_of_its_key_over_one_exchanged_part() -> None:
    task = tiny.experiment(study()).task
    assert task.names == ("digits", "digits", "shapes", "shapes", "signs", "signs")
    assert [task.of(c).dataset.num_classes for c in range(6)] == [2, 2, 5, 5, 3, 3]
    assert [e.shape for e in task.of(2).layout.floats if e.name.startswith("head") and len(e.shape) > 1] == [
        (7, 12), (5, 7),
    ]  # fmt: skip
    first = task.shared_part(task.theta_0)
    for one in task.each:
        assert one.exchange is task.exchange
        assert one.shared_part(one.theta_0).digest() == first.digest()
        one.flat_model.load(one.theta_0)
        assert not np.array_equal(one.shared_part(one.model.fresh("reinit")).floats, first.floats)


def test_keys_that_are_numbers_go_by_their_text() -> None:
    made = study(data={"options": {"numbered": True}}, tasks={0: {}, 2: {"num_classes": 4}})
    task = tiny.experiment(made).task
    assert task.names == ("0", "0", "", "", "2", "2")
    assert [task.of(c).dataset.num_classes for c in range(6)] == [2, 2, 5, 5, 4, 4]
    assert task.of(2) is task and task.clients == (2, 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in known:
            more = {"train": {"epochs": 2}} if method == "sub_fedavg" else {}
            more |= {"refine": {"rounds": 1, "clients_per_round": 3}} if method == "two_step" else {}
            more |= {"model": {"prunable": ["encoder.weight"]}} if method == "fedpm" else {}
            known[method] = tmp_path_factory.mktemp(method) / "run"
            tiny.run(study(method, **more), known[method])
        return known[method]

    return run


@pytest.mark.parametrize("method", tiny.KINDS)
def test_every_method_trains_every_head(finished: Callable[[str], Path], method: str) -> None:
    out = finished(method)
    header = RunFolder(out).header()
    assert header is not None and [len(counts) for counts in header.client_labels] == [2, 2, 5, 5, 3, 3]
    assert [(t.name, t.clients, t.num_classes) for t in header.tasks] == [
        ("digits", [0, 1], 2), ("shapes", [2, 3], 5), ("signs", [4, 5], 3),
    ]  # fmt: skip
    rows = tiny.rows(out, "metrics")
    assert {row["client"] for row in rows} == set(range(6)) and not any(r["failed"] for r in tiny.rows(out, "rounds"))
    for row in rows if method != "fedpm" else ():
        assert ("head.2.weight" in row["layer_density"]) == (row["client"] in (2, 3))


@pytest.mark.parametrize("method", ["two_step", "lotteryfl", "fedselect", "fedavg_ft"])
def test_a_loaded_ticket_gives_its_clients_metrics_row(finished: Callable[[str], Path], method: str) -> None:
    out = finished(method)
    task = tiny.task_of(out)
    for client in range(6):
        path = out / "tickets" / f"client-{client:04d}.safetensors"
        if not path.exists():
            continue
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            meta = file.metadata()
        part = task.of(client).part(client, "test")
        logits = load_ticket(out, client)(part.x)
        right = float((logits.argmax(-1) == part.y).double().mean())
        rows = [r for r in tiny.rows(out, "metrics") if (r["client"], r["arm"]) == (client, meta["arm"])]
        assert logits.shape[1] == [2, 2, 5, 5, 3, 3][client]
        assert right in {r["test_accuracy"] for r in rows}
    assert len(list((out / "tickets").glob("*.safetensors"))) == 6


@pytest.mark.parametrize("method", ["two_step", "fedselect"])
def test_a_run_that_is_stopped_and_resumed_is_equal(
    finished: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    made = RunFolder(finished(method)).study()
    for stop in (1, 3):
        out = tmp_path / f"{method}-{stop}"
        folder = RunFolder(out)
        folder.create(made)
        tiny.opened(folder).run(stop_after=stop)
        forget_tasks()
        session.resume(out, InProcess())
        assert tiny.facts(out) == tiny.facts(finished(method))


def test_tasks_that_all_equal_the_datas_own_change_nothing(tmp_path: Path) -> None:
    same = {name: {"num_classes": 5} for name in CLASSES}
    data = {"name": "tests.test_tasks:alike"}
    made = {name: study(data=data, tasks=tasks) for name, tasks in (("without", {}), ("with", same))}
    for name, one in made.items():
        tiny.run(one, tmp_path / name)
    assert tiny.facts(tmp_path / "without") == tiny.facts(tmp_path / "with")


def test_an_unseen_client_begins_with_the_head_of_its_task(finished: Callable[[str], Path]) -> None:
    folder = RunFolder(finished("fedavg"))
    theta_g, task = folder.load_state(folder.progress().theta).theta, tiny.task_of(folder.root)
    (client,) = task.splits.unseen
    own = task.of(client)
    found = evaluate(own.flat_model, own.merge(theta_g, own.theta_0), own.part(client, "test"))
    (row,) = [r for r in tiny.rows(folder.root, "metrics") if (r["client"], r["arm"]) == (client, "global")]
    assert (row["test_accuracy"], row["test_loss"]) == (found.accuracy, found.loss)


def test_clients_of_one_network_alone_go_together_in_a_cohort() -> None:
    task = tiny.experiment(study()).task
    alone = [(task.of(c).flat_model, task.of(c).theta_0, task.of(c).part(c, "train")) for c in (4, 0, 2, 1, 5)]
    together = cohort.answer([Evaluation(*one, ACCURACY) for one in alone])
    for found, one in zip(together, alone, strict=True):
        wanted = evaluate(*one)
        assert (found.accuracy, found.loss) == pytest.approx((wanted.accuracy, wanted.loss), rel=1e-5)


def test_tasks_with_different_metrics_have_no_common_mean(finished: Callable[[str], Path], tmp_path: Path) -> None:
    alike_run = finished("two_step")
    assert "mean test accuracy" in summary_text(read_results(alike_run))
    assert len(read_results(alike_run).tasks) == 3 and read_results(alike_run).summaries
    fleet = {"flops_s": 1e6, "down_bytes_s": 1000.0, "up_bytes_s": 1000.0}
    run = tiny.run(study(tasks=MIXED, evaluate={"every": 1}, fleet=fleet), tmp_path / "r").root
    results, text = read_results(run), summary_text(read_results(run))
    assert not results.summaries and "accuracy [" not in text and "nan" not in text
    assert "By task, whose metrics have no common mean: digits " in text and "(macro f1)" in text
    assert len(tiny.rows(run, "curve")) == 2 * 6 and "The best round on test data" not in text
    assert tiers_table(results).rows[-1][-1] == NOTHING
    assert "random ticket" in text, "the table by task is the only one, so it has every arm"
    page = write_report(run).read_text()
    assert 'id="arms"' not in page and not (run / "tables" / "summary.md").exists()
    assert page.count("macro f1") > 1 and "the curve is in curve.jsonl alone" in page
    with pytest.raises(StudyError, match="one metric, got macro_f1, perplexity, loss"):
        compare([run, alike_run])


def test_further_metrics_of_a_task_are_in_its_rows(tmp_path: Path) -> None:
    tasks = {"digits": {"metric": "macro_f1", "metrics": ["balanced_accuracy"]}, "shapes": {"metric": "perplexity"}}
    run = tiny.run(study(tasks=tasks), tmp_path / "r").root
    table = tasks_table(read_results(run))
    own = tiny.rows(run, "metrics")
    told = {(row[0], row[4], row[5]): row[-1] for row in table.rows}
    held = [row.get("test_metrics", {}) for row in own if row["arm"] == "dense"]
    digits = [one["balanced_accuracy"] for one in held if "balanced_accuracy" in one]
    assert table.header[-1] == "further metrics" and len(digits) == 2
    assert told["digits", "dense twin", "1"].endswith(f", balanced accuracy {100 * sum(digits) / 2:.1f} %")
    assert told["shapes", "dense twin", "1"].startswith("accuracy ")
    text = summary_text(read_results(run))
    assert told["digits", "dense twin", "1"] in text and "outputs" not in text


def test_no_mean_of_different_metrics_decides_or_is_recorded() -> None:
    assert not tiny.experiment(study(tasks=MIXED)).one_metric and tiny.experiment(study(tasks={})).one_metric
    with pytest.raises(StudyError, match="tune.lr: must not be given where tasks have different metrics"):
        resolve(study(tasks=MIXED, tune={"lr": [0.1, 0.2]}))


def test_a_task_that_no_client_has_is_noted() -> None:
    made = study(clients={"count": 2}, federate={"clients_per_round": 1}, partition="natural")
    assert "tasks.signs: has no effect, no client has such examples" in resolve(made)[1]


def test_a_check_says_what_each_task_adds() -> None:
    text = forecast(study())
    assert "task digits, 2 outputs, 2 clients" in text and "head.0.weight" in text
    assert text.count("encoder.weight") == 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"personal": []}}, r"tasks.digits: tensor head.0.bias must be .*\[5\].*model.personal; got \[2\]"),
        ({"model": {"personal": ["head.0*"]}}, r"tasks.shapes: tensor head.2.bias must be .*no such tensor"),
        ({"tasks": {"signs": {"options": {"wide": 9}}}}, r"tasks.signs: tensor encoder.bias .*\[12\].*got \[9\]"),
        (
            {"tasks": {"shapes": {"num_classes": 4}}},
            r"tasks.shapes.num_classes: labels of key shapes .*\[0, 4\), got 4",
        ),
        ({"tasks": {"letters": {}}}, "tasks.letters: must be a natural key of the train examples, got keys digits, sh"),
        ({"partition": "iid"}, "tasks: client 0 must have examples of one task, got some of digits and of shapes and"),
        ({"tasks": {"digits": {"options": {"depth": 2}}}}, "tasks.digits: .*depth"),
        (
            {"tasks": {"digits": {"loss": "focal"}}},
            "tasks.digits: train.loss.name: must be one of cross_.*, got 'focal'",
        ),
        ({"tasks": {"digits": {"metric": "auc"}}}, "tasks.digits: metric: must be one of accuracy, .*, got 'auc'"),
        ({"data": {"name": "tests.tiny:images"}, "partition": "iid"}, "tasks: must have natural keys in the data"),
        ({"partition": {"name": "natural", "clients_per_key": 4}}, "partition.clients_per_key: must divide the 6 cl"),
        ({"tasks": {"digits": {"head": 3}}}, "tasks.digits.head: unknown key"),
        ({"tasks": {"digits": {"num_classes": 0}}}, "tasks.digits.num_classes: .*greater than or equal to 1"),
        ({"tasks": {1.5: {}}}, "tasks.*1.5"),
        ({"tasks": {"digits": {"targets": "labels"}}}, "tasks.digits.targets: input should be 'classes' or 'numbers'"),
        ({"clients": {"label_noise": {"rate": 0.5}}}, "clients.label_noise: must be left out with tasks"),
    ],
)
def test_bad_input_names_its_place(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        resolve(study(**sections))
