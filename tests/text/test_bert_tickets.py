"""configs/bert_tickets.yaml in small: from rounds or without, stopped between two tasks and resumed; what it says of
itself, and what bench/bert.yaml says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlth.bench import matrix
from fedlth.engines.inprocess import InProcess
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import read, resolve
from fedlth.federation import session
from fedlth.federation.rounds import Federation
from fedlth.forecast import own_epochs, step2_epochs
from fedlth.study import schema
from fedlth.training.batches import steps_an_epoch
from tests import tiny
from tests.test_server_state import Stopped, stop
from tests.text.sentences import BENCH, BERT_MLM, BERT_TICKETS, IN_ROUNDS, bert_tickets, shrunk

pytest.importorskip("transformers")
ARMS = {"dense", "ticket", "init_mask", "random", "shuffled_values"}


@pytest.mark.parametrize("sections", [{}, IN_ROUNDS], ids=["without rounds", "after a round"])
def test_the_study_resumes_task_by_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    made = bert_tickets(tmp_path, **sections)
    tiny.run(made, tmp_path / "whole")
    rows = tiny.rows(tmp_path / "whole", "metrics")
    assert {row["arm"] for row in rows} == ARMS
    assert {row["client"] for row in rows if row["arm"] == "ticket"} == set(range(5))
    assert len(list((tmp_path / "whole" / "tickets").glob("*.safetensors"))) == 5
    with monkeypatch.context() as patch:
        patch.setattr(Federation, "run", lambda loop: stop(loop, 2))
        with pytest.raises(Stopped):
            tiny.run(made, tmp_path / "stopped")
    assert 0 < len({row["client"] for row in tiny.rows(tmp_path / "stopped", "metrics")}) < 5
    session.resume(tmp_path / "stopped", InProcess())
    assert tiny.facts(tmp_path / "stopped") == tiny.facts(tmp_path / "whole")


def commands(file: Path) -> list[list[str]]:
    """Return the overrides of each `fedlth run` that the head of a study names, the data's folder left out."""
    lines = re.findall(rf"^#   fedlth run configs/{file.name} data.root=DIR *([^#\n]*)", file.read_text(), re.M)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize(("file", "count"), [(BERT_TICKETS, 5), (BERT_MLM, 1)], ids=["tickets", "mlm"])
def test_every_command_of_the_head_is_a_study(file: Path, count: int) -> None:
    assert len(commands(file)) == count
    for overrides in commands(file):
        _, notes = read(schema.load(file, overrides))
        assert not [note for note in notes if "no effect" in note], overrides


def chain(overrides: list[str]) -> tuple[float, ...]:
    experiment, _ = read(schema.load(BERT_TICKETS, overrides))
    (only,) = experiment.finder.chains(experiment.study.finder.densities)
    return only


def test_both_conventions_of_ten_percent() -> None:
    ladders = [chain(overrides) for overrides in commands(BERT_TICKETS) if "finder.schedule" in " ".join(overrides)]
    original, survivors = ladders
    assert original == pytest.approx([k / 10 for k in range(9, 0, -1)])
    assert survivors[:3] == pytest.approx([0.9, 0.81, 0.729]) and {0.7, 0.5, 0.3} <= set(survivors)
    assert all(after / before >= 0.9 - 1e-9 for before, after in zip(survivors[:-1], survivors[1:], strict=True))


def test_structured_tickets_fit_the_study(tmp_path: Path) -> None:
    (asked,) = [one for one in commands(BERT_TICKETS) if "finder.granularity=heads_and_channels" in one]
    key, _, value = asked[0].partition("=")
    own = schema.load(BERT_TICKETS).finder.densities
    made = bert_tickets(tmp_path, finder={key.removeprefix("finder."): value, "densities": list(own), "main": own[1]})
    experiment, _ = resolve(made)
    assert experiment.finder.granularity.groups(experiment.task.layout).weights is not None


def small_bench(folder: Path) -> matrix.Matrix:
    tree = yaml.safe_load(BENCH.read_text())
    shrunk(tree["study"], folder)
    (folder / "bench.yaml").write_text(yaml.safe_dump(tree))
    return matrix.load(folder / "bench.yaml")


def steps_of(experiment: Experiment) -> tuple[float, int]:
    """Return how many steps all of a cell's trainings take, and how many one client's longest way to a model."""
    study, arms, finder = experiment.study, experiment.arms, experiment.finder
    sizes = [len(client.train) for client in experiment.task.splits.clients]
    an_epoch = sum(steps_an_epoch(size, study.train.batch_size) for size in sizes) / len(sizes)
    epochs = sum(own_epochs(experiment)) + len(sizes) * step2_epochs(experiment)
    search = finder.trainings(study.finder.densities)[0]
    after = max(
        (search if arm in ("local", "ticket", "dense_total") else 1 for arm in arms if arm != "global"), default=0
    )
    in_rounds = study.federate.rounds * (study.train.steps or 0)
    return epochs * an_epoch, in_rounds + after * (study.personalise.steps or 0)


def test_the_bench_is_as_long_as_it_says(tmp_path: Path) -> None:
    """So many steps a seed, and no client trains longer than that of `local`; every row has the same rates to try."""
    made = small_bench(tmp_path)
    found = {cell.method: steps_of(read(cell.study)[0]) for cell in made.firsts}
    said = re.search(r"A seed is ([\d,]+) training steps .*, ([\d,]+) of them of the whole encoder", BENCH.read_text())
    assert said
    whole = ("local", "fedavg", "fedavg_ft", "two_step", "standalone")
    counts = sum(steps for steps, _ in found.values()), sum(found[name][0] for name in whole)
    assert counts == pytest.approx([float(number.replace(",", "")) for number in said.groups()])
    assert found["local"][1] == max(longest for _, longest in found.values()) == 150
    for cell in made.firsts:
        assert cell.study.tune.lr == made.tune.lr and cell.study.tune.rounds == cell.study.federate.rounds
