"""Any data, any targets, any metric: small studies of each kind end to end, and what is wrong with them by name."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedlth.catalogue import listing
from fedlth.data.dataset import Dataset, checked
from fedlth.data.factory import user_dataset
from fedlth.data.split import label_counts
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.forecast import forecast
from fedlth.report.build import read_results, write_report
from fedlth.report.compare import compare
from fedlth.report.headline import honest_notes, summary_text
from fedlth.training.local_client import LocalClient
from fedlth.training.metrics import METRICS
from tests import own_tasks, tiny

HERE, ROOT = "tests.own_tasks", Path(__file__).parent.parent
MLP = {"name": "mlp", "options": {"hidden": [12]}}
TASKS: dict[str, dict[str, Any]] = {
    "mapping by keyword": {"data": f"{HERE}:mapping", "model": f"{HERE}:ByName", "metrics": ["macro_f1", "perplexity"]},
    "mapping as one": {"data": f"{HERE}:mapping", "model": f"{HERE}:ByMapping", "metric": "balanced_accuracy"},
    "ragged tokens": {"data": f"{HERE}:tokens", "model": f"{HERE}:Recurrent", "metrics": ["loss"]},
    "ragged mapping": {"data": f"{HERE}:sentences", "model": f"{HERE}:Attentive"},
    "positions": {"data": f"{HERE}:tagged", "model": f"{HERE}:Tagger", "metric": "perplexity"},
    "numbers": {"data": f"{HERE}:numbers", "model": MLP, "metrics": ["mae", "r2", "pearson", "rmse"]},
    "several numbers": {
        "data": {"name": f"{HERE}:numbers", "options": {"outputs": 3}}, "model": MLP, "metric": f"{HERE}:WorstError",
        "partition": "natural",
    },
    "a user's metric": {"data": f"{HERE}:mapping", "model": f"{HERE}:ByName", "metric": f"{HERE}:hits"},
}  # fmt: skip


def tree(task: str, **sections: Any) -> dict[str, Any]:
    made = {
        key: {"name": v} if isinstance(v, str) and key in ("data", "model") else v for key, v in TASKS[task].items()
    }
    base = tiny.tree(**sections)
    return {**base, "finder": {"densities": [0.5]}, **made}


def study(task: str, **sections: Any) -> Any:
    return tiny.schema.build(tree(task, **sections))


@pytest.mark.parametrize(
    ("task", "method"), [*((task, "two_step") for task in TASKS), ("numbers", "fedavg"), ("positions", "fedavg")]
)
def test_a_study_of_each_kind(task: str, method: str, tmp_path: Path) -> None:
    made = study(task, method={"name": method, **tiny.METHODS[method]}, train={"lr": 0.05})
    folder = tiny.run(made, tmp_path / "r")
    rows, rounds = tiny.rows(folder.root, "metrics"), tiny.rows(folder.root, "rounds")
    judged = tiny.task_of(folder.root).judged
    assert rows and {r["client"] for r in rows} == {0, 1, 2, 3}
    for row in rows:
        assert (row["test_accuracy"] is not None) == ("numbers" not in task)
        for part in ("val", "test"):
            told = row.get(f"{part}_metrics", {})
            assert set(told) == set(judged.named) and all(map(math.isfinite, told.values()))
    if judged.main.name != "accuracy":
        assert all(isinstance(r["val_metric"], float) for r in rounds if r["phase"] == "federate")
    text = summary_text(read_results(folder.root))
    assert text.count("\n") > 5
    if method == "two_step":
        assert load_ticket(folder.root, 0) is not None
    if method == "two_step" and task in ("mapping as one", "several numbers", "a user's metric"):  # pictures take long
        write_report(folder.root)
        page = (folder.root / "report.html").read_text()
        assert judged.main.name.rpartition(":")[2].replace("_", " ") in page


def test_engines_agree_on_a_mapping(tmp_path: Path) -> None:
    made = study("mapping by keyword")
    for name, engine in (("here", None), ("lists", tiny.Lists())):
        tiny.run(made, tmp_path / name, engine=engine)
    assert tiny.facts(tmp_path / "here") == tiny.facts(tmp_path / "lists")


@pytest.mark.parametrize("task", ["numbers", "positions"])
def test_a_cohort_equals_its_members(task: str, tmp_path: Path) -> None:
    for size in (1, 2):
        made = study(task, cohort=size, workers=1)
        if task == "positions":  # every position has a class, and all rows one length
            made = made.model_copy(update={"data": made.data.model_copy(update={"options": {"plain": True}})})
        experiment, notes = resolve(made)
        assert experiment.study.cohort == size, notes
        tiny.run(made, tmp_path / str(size), engine=None)
    one, two = (tiny.rows(tmp_path / str(size), "metrics") for size in (1, 2))
    for ours, theirs in zip(one, two, strict=True):
        assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-3)
        assert ours["test_metrics"] == pytest.approx(theirs["test_metrics"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("task", ["ragged mapping", "numbers"])
def test_a_study_is_forecast(task: str) -> None:
    assert "bytes" in forecast(study(task))


def test_several_numbers_are_evaluated_in_a_forecast() -> None:
    """Found: it asked for accuracy, of targets (N, 2)."""
    assert "evaluation between rounds" in forecast(study("several numbers", evaluate={"every": 1}))


@pytest.mark.parametrize(
    ("task", "why"), [("mapping by keyword", "must be no mapping"), ("ragged tokens", "got ragged")]
)
def test_a_gate_refuses_inputs_that_it_cannot_take_the_mean_of(task: str, why: str) -> None:
    with pytest.raises(StudyError, match=f"method: pfedgate gates the mean of .*{why}"):
        resolve(study(task, method={"name": "pfedgate", "density": 0.5}))
    resolve(study(task, method={"name": "pfedgate", "density": 1.0}))


def test_ragged_data_train_one_client_at_a_time() -> None:
    experiment, notes = resolve(study("ragged tokens", cohort=2))
    assert experiment.study.cohort == 1 and any("its examples are ragged" in note for note in notes)


def test_a_batch_is_as_long_as_its_longest() -> None:
    part = tiny.experiment(study("ragged mapping")).task.part(0, "train")
    lengths = part.lengths["input_ids"]
    short = torch.argsort(lengths)[:3]
    batch = part.batch(short)
    assert set(part.lengths) == {"input_ids", "attention_mask"}
    assert batch.x["input_ids"].shape == batch.x["attention_mask"].shape == (3, int(lengths[short].max()))
    assert batch.x["input_ids"].shape[1] < part.x["input_ids"].shape[1]
    assert torch.equal(batch.x["attention_mask"].sum(1), lengths[short])


def test_what_stands_behind_a_batchs_longest_changes_nothing() -> None:
    task = tiny.experiment(study("ragged tokens")).task
    local = LocalClient(task, 0, 1, "federate")
    longer = task.part(0, "val")
    wide = type(longer)(torch.nn.functional.pad(longer.x, (0, 5)), longer.y, longer.lengths)
    assert local.evaluate(task.theta_0, longer) == local.evaluate(task.theta_0, wide)


def test_ignored_positions_count_nowhere() -> None:
    task = tiny.experiment(study("positions")).task
    local = LocalClient(task, 0, 1, "federate")
    part, model = task.part(0, "val"), task.model.module().eval()
    right, lost, count = 0, 0.0, 0
    with torch.no_grad():
        for i in range(len(part)):
            one = part.batch(torch.tensor([i]))
            logits, y = model(one.x)[0], one.y[0]
            kept = y != -100
            right += int((logits.argmax(-1) == y)[kept].sum())
            lost += float(torch.nn.functional.cross_entropy(logits[kept], y[kept], reduction="sum"))
            count += int(kept.sum())
    found = local.evaluate(task.theta_0, part)
    assert found.accuracy == right / count and found.loss == pytest.approx(lost / count, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(lost / count), rel=1e-5)
    labels = task.dataset.y_train[task.splits.clients[0].train]
    assert sum(label_counts(task.dataset, task.splits.clients[0])) == int((labels != -100).sum())


def test_a_diverged_regression_counts_as_the_training_mean(tmp_path: Path) -> None:
    made = study("numbers", train={"lr": 1e12}, federate={"rounds": 0})
    folder = tiny.run(made, tmp_path / "r")
    task = tiny.task_of(folder.root)
    (row,) = [r for r in tiny.rows(folder.root, "metrics") if r["client"] == 0 and r["arm"] == "ticket"]
    train, test = task.part(0, "train").y.double(), task.part(0, "test").y.double()
    assert row["diverged"] and row["test_metrics"]["pearson"] == 0
    assert row["test_metrics"]["mse"] == pytest.approx(float((test - train.mean()).square().mean()), rel=1e-5)
    assert row["test_metrics"]["mse"] == pytest.approx(row["test_loss"], rel=1e-5)
    assert "each counts as the mean of its training targets" in " ".join(honest_notes(read_results(folder.root)))


def test_less_is_better_in_decisions_and_reports(tmp_path: Path) -> None:
    task = tiny.experiment(study("numbers")).task
    local = LocalClient(task, 0, 1, "federate")
    trained = local.train(task.theta_0, recipe=local.recipe).params
    mse = [local.evaluate(p, local.val_part).metrics["mse"] for p in (task.theta_0, trained)]
    assert mse[1] < mse[0] and local.val_score(trained) == -mse[1] > local.val_score(task.theta_0)
    weak, strong = study("numbers"), study("numbers", personalise={"epochs": 6})
    for name, made in (("weak", weak), ("strong", strong)):
        tiny.run(made, tmp_path / name)
    found = compare([tmp_path / "weak", tmp_path / "strong"], arm="ticket")
    (contrast,) = found.contrasts
    assert contrast.difference.mean < 0 and contrast.better > contrast.worse and contrast.effect > 0
    assert "mean mse" in found.table().header


def test_a_rate_is_chosen_by_the_studys_metric(tmp_path: Path) -> None:
    from fedlth.tune import tuned

    made = study("numbers", tune={"lr": [1e-5, 0.05], "rounds": 1}, personalise={"epochs": 1})
    lines: list[str] = []
    with tiny.lines_to(lines.append):
        chosen = tuned(made, tmp_path)
    assert chosen.train.lr == 0.05 and any("validation mse" in line for line in lines)
    written = (tmp_path / "tune" / "chosen.json").stat()
    assert tuned(made, tmp_path).train.lr == 0.05, "read back"
    again = (tmp_path / "tune" / "chosen.json").stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns), "two that read it write nothing"


def test_the_task_shown_in_the_docs_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "study.md").read_text()
    code, sections = (re.search(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("python\n# tasks.py", "yaml"))
    assert code and sections
    (tmp_path / "tasks.py").write_text(code.group(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = tiny.schema.build({**tiny.tree(finder={"densities": [0.5]}), **yaml.safe_load(sections.group(1))})
    lines: list[str] = []
    run = tiny.run(made, tmp_path / "run", tell=lines.append)
    shown = summary_text(read_results(run.root))
    assert "mean mae" in shown and "within %" in shown and any("val mae" in line for line in lines)


def test_every_metric_is_documented_and_listed() -> None:
    text = (ROOT / "docs" / "study.md").read_text()
    for name in METRICS:
        assert f"`{name}`" in text and f"  {name} " in listing("metrics")
    lines = [line.split(maxsplit=1)[1] for line in listing("metrics").splitlines()[1:-1]]
    assert len(set(lines)) == len(METRICS), "each says what it alone is"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown metric": ({"metric": "acuracy"}, "metric: must be one of accuracy, loss"),
    "a metric of numbers": (
        {"metrics": ["macro_f1", "mse"]},
        "metrics.1: must be one of .* targets are classes",
    ),
    "no such function": ({"metric": f"{HERE}:nothing"}, "metric: cannot import"),
    "no function": ({"metric": f"{HERE}:WORDS"}, "must be called as"),
    "a metric that is a number": ({"metric": 3}, "metric: input should be a valid string"),
    "a metric twice": ({"metric": "macro_f1", "metrics": ["macro_f1"]}, "metrics: each must be given once"),
    "a metric that returns text": (
        {"metrics": [f"{HERE}:wordy"]},
        f"metrics: {HERE}:wordy must return one number: Val",
    ),
    "the metric gives a row": ({"metric": f"{HERE}:rowwise"}, f"^metric: {HERE}:rowwise must return one number: "),
    "metrics that are text": ({"metrics": "mae"}, "metrics: input should be a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_metrics_are_named(case: str) -> None:
    sections, said = BAD[case]
    with pytest.raises(StudyError, match=said):
        resolve(tiny.schema.build({**tree("mapping by keyword"), **sections}))


MISREAD = {
    "a column": r"must return logits of shape \(4, 1, 3\), got \(4, 3\); y of whole numbers \(N, 1\) .* give \(N,\)",
    "several": r"got \(4, 3\); y of whole numbers \(N, 3\) .*give floats for several labels .*_with_logits",
    "ragged floats": r"labelled: y_train of real numbers must be \(N,\) or \(N, k\), .*, got ragged rows",
}  # fmt: skip


@pytest.mark.parametrize("kind", MISREAD)
def test_targets_that_are_mistaken_are_told_what_they_are(kind: str) -> None:
    data = {"name": f"{HERE}:labelled", "options": {"kind": kind}}
    with pytest.raises(StudyError, match=MISREAD[kind]):
        resolve(tiny.study(data=data, model=MLP))
    if kind == "ragged floats":
        data["options"]["num_classes"] = None
        with pytest.raises(StudyError, match=MISREAD[kind]):
            resolve(tiny.study(data=data, model=MLP))


def test_several_labels_an_example_are_floats() -> None:
    loss = "torch.nn.functional:binary_cross_entropy_with_logits"
    data = {"name": f"{HERE}:labelled", "options": {"kind": "several floats"}}
    resolve(tiny.study(data=data, model=MLP, train={"loss": loss}))


@pytest.mark.parametrize("count", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=["int64", "uint8", "tensor"])
def test_a_number_of_classes_may_be_any_whole_number(count: Any) -> None:
    found = user_dataset(f"{HERE}:labelled", None, {"kind": "classes", "num_classes": count})
    assert type(checked(found).num_classes) is int and found.num_classes == 3


@pytest.mark.parametrize("count", [True, 3.0, "3"])
def test_what_is_no_number_of_classes_is_refused(count: Any) -> None:
    found = user_dataset(f"{HERE}:labelled", None, {"kind": "classes", "num_classes": count})
    with pytest.raises(StudyError, match="num_classes must be an integer of at least 2"):
        checked(found)


def test_a_metric_that_fails_on_few_examples_is_noted() -> None:
    made = tiny.schema.build({**tree("mapping by keyword"), "metrics": [f"{HERE}:needs_many"]})
    assert (
        f"metrics: {HERE}:needs_many fails on 4 examples, and so may clients: ValueError: too few" in resolve(made)[1]
    )


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_does_not_broadcast_numbers_against_their_outputs(tmp_path: Path) -> None:
    """(N, 1) minus (N,) is (N, N), with which a network learns the mean of all targets and nobody sees an error."""
    given = {**tree("numbers"), "train": {"epochs": 5, "lr": 0.1, "loss": f"{HERE}:huber"}}
    tiny.run(tiny.schema.build({**given, "method": {"name": "fedavg"}}), tmp_path / "r")
    rows = [row for row in tiny.rows(tmp_path / "r", "metrics") if row["arm"] == "global"]
    assert np.mean([row["test_metrics"]["r2"] for row in rows]) > 0.5
    given["train"]["loss"] = f"{HERE}:Huber"
    with pytest.raises(StudyError, match=r"train.loss: must bring outputs \(4, 1\) to the shape of targets \(4,\)"):
        resolve(tiny.schema.build(given))


def test_a_metric_that_is_no_number_costs_its_client_and_says_so(tmp_path: Path) -> None:
    made = tiny.schema.build({**tree("mapping by keyword"), "metrics": [f"{HERE}:not_finite"]})
    with pytest.raises(StudyError, match="not_finite must be a finite number, got nan"):
        tiny.run(made, tmp_path / "r")
    with pytest.raises(StudyError, match=r"metric, metrics: fail on the examples of client \d+: .*got nan"):
        forecast(made)


@pytest.mark.parametrize("partition", [{"name": "dirichlet", "alpha": 1.0}, {"name": "shards", "shard_size": 5},
                                       {"name": "classes", "classes_per_client": 2}])  # fmt: skip
def test_partitions_by_class_refuse_real_numbers(partition: dict[str, Any]) -> None:
    with pytest.raises(StudyError, match="must have classes as targets, got real numbers"):
        resolve(tiny.schema.build({**tree("numbers"), "partition": partition}))


@pytest.mark.parametrize("partition", [{"name": "iid"}, {"name": "quantity", "alpha": 5.0}, {"name": "natural"}])
def test_other_partitions_take_real_numbers(partition: dict[str, Any]) -> None:
    task = tiny.experiment(tiny.schema.build({**tree("numbers"), "partition": partition})).task
    assert all(len(split.test) for split in task.splits.clients)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"method": {"name": "lotteryfl"}}, "method.val_accuracy: must be below 0 .* left at its default 0.5"),
        ({"method": {"name": "lotteryfl", "val_accuracy": 0.4}}, "method.val_accuracy: must be below 0 .* got 0.4"),
        ({"finder": {"gate": "val_accuracy"}}, "finder.gate: must not be ValAccuracy"),
        ({"model": {"name": "tests.own_tasks:Tagger"}}, "fails on a batch"),
        ({"finder": {"score": "synflow"}, "data": {"name": "tests.own_tasks:mapping"},
          "model": {"name": "tests.own_tasks:ByName"}, "metrics": []}, "synflow"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(sections: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = tiny.schema.build({**tree("numbers"), **sections})
    with pytest.raises(StudyError, match=said):
        tiny.run(made, tmp_path / "r")


def dataset(**changes: Any) -> Dataset:
    x = {"a": np.zeros((4, 3), np.float32), "b": np.zeros(4, np.int64)}
    y = np.array([0, 1, 0, 1])
    return Dataset(**{"name": "d", "x_train": x, "y_train": y, "x_test": x, "y_test": y, "num_classes": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x_test": {"a": np.zeros((4, 3), np.float32)}}, "must have the same fields"),
        ({"x_train": {"a": np.zeros((4, 3), np.float32), "b": np.zeros(3, np.int64)}}, "as many examples"),
        ({"x_train": {"a": np.zeros((4, 2), np.float32), "b": np.zeros(4, np.int64)}}, r"x_train\['a'\] and x_test"),
        ({"y_train": np.array([0.5, np.nan, 1, 2], np.float32), "y_test": np.zeros(4, np.float32)}, "must be finite"),
        ({"y_train": np.zeros(4, np.float32)}, "y_train and y_test must be of one kind"),
        ({"y_train": np.zeros((4, 3), np.float32), "y_test": np.zeros((4, 3), np.float32)}, "at least 3, got 2"),
        ({"y_train": np.zeros(4, np.float32), "y_test": np.zeros(4, np.float32)}, "got 2; classes are whole numbers"),
        ({"y_train": np.full((4, 2), -100), "y_test": np.zeros((4, 2), np.int64)}, "example 0 has none"),
        ({"y_train": np.array([0, 1, -100, 1])}, r"must lie in \[0, 2\)"),
        ({"lengths_train": {"c": np.ones(4, np.int64)}}, "must name fields with positions"),
        ({"lengths_train": {"a": np.full(4, 9)}, "lengths_test": {"a": np.ones(4, np.int64)}}, "from 1 to 3"),
        ({f"lengths_{part}": {"a": np.array([2, 3, 0, 1])} for part in ("train", "test")},
         r"x_train\['a'\]: each row must have at least one entry, row 2 has none"),
    ],
)  # fmt: skip
def test_data_that_break_the_contract_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        checked(dataset(**changes))


def test_a_digest_sees_names_and_lengths() -> None:
    one = checked(dataset())
    renamed = {"a": one.x_train["a"], "c": one.x_train["b"]}
    lengths = {"a": np.array([1, 2, 3, 3])}
    changed = [
        dataset(x_train=renamed, x_test=renamed), dataset(lengths_train=lengths, lengths_test=lengths),
        dataset(x_train={**one.x_train, "b": np.ones(4, np.int64)}),
    ]  # fmt: skip
    assert len({checked(d).digest() for d in (one, *changed)}) == 4
    backwards = dict(reversed(one.x_train.items()))
    assert dataset(x_train=backwards, x_test=backwards).digest() == one.digest()


def test_fields_of_unequal_lengths_in_one_example_are_told() -> None:
    told = (
        "data: attention_mask and input_ids are of different lengths in 1 of 240 training examples, first in example 5"
    )
    for longer in (0, 3):
        data = {"name": f"{HERE}:uneven", "options": {"by": longer}}
        _, notes = resolve(tiny.schema.build({**tree("ragged mapping"), "data": data}))
        assert any(note.startswith(told) for note in notes) == bool(longer)
    broken = {**tree("ragged mapping"), "data": data, "model": {"name": f"{HERE}:Tagger"}}
    with pytest.raises(StudyError, match=f"fails on a batch .*; {told}"):
        resolve(tiny.schema.build(broken))


def test_ragged_rows_are_padded_once() -> None:
    found = user_dataset(f"{HERE}:tagged", None, {})
    assert found.x_train.shape[1] == found.x_test.shape[1] == found.y_train.shape[1] == 8
    first = own_tasks.tagged()
    for i in range(5):
        n = found.lengths_train["x"][i]
        assert found.x_train[i, :n].tolist() == first["x_train"][i] and not found.x_train[i, n:].any()
        assert found.y_train[i, :n].tolist() == first["y_train"][i] and (found.y_train[i, n:] == -100).all()
    assert found.targets == "positions" and checked(found) is found
    numbers = user_dataset(f"{HERE}:numbers", None, {"outputs": 3})
    assert numbers.num_classes == 3 and numbers.y_train.dtype == numbers.x_train.dtype == np.float32


def test_the_loss_of_a_training_is_a_mean_over_positions() -> None:
    """As an evaluation's is: the rate is as good as none, so that every batch sees theta_0."""
    task = tiny.experiment(study("positions")).task
    local = LocalClient(task, 0, 1, "federate")
    still = replace(local.recipe, lr=1e-30, batch_size=3)
    batches = local.steps_of(still)
    found = local.train(task.theta_0, recipe=still)
    assert batches > 1 and found.loss == pytest.approx(
        local.evaluate(task.theta_0, task.part(0, "train")).loss, rel=1e-5
    )
