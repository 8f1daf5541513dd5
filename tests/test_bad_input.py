"""Bad input: exit code 2, exactly one line on standard error that names the place, and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch import nn

from fedlth import cli
from fedlth.methods.aggregate import FedAvg
from fedlth.methods.method import FederatedMethod, Phase
from tests import tiny


def few(train: int = 6) -> dict[str, Any]:
    return tiny.images(train=train)


def lonely() -> dict[str, Any]:
    """Class 3 stands in train, but not in test."""
    data = tiny.images()
    return {**data, "y_test": np.minimum(data["y_test"], 2)}


def wrong_labels() -> dict[str, Any]:
    return {**tiny.images(), "num_classes": 2}


def raising() -> dict[str, Any]:
    raise RuntimeError("the archive\nis damaged")


def three() -> int:
    return 3


def keyed(**options: Any) -> Any:
    return options["rate"]


def half_a_method() -> FederatedMethod:
    phase = Phase(name="federate", update=3, join=FedAvg())  # type: ignore[arg-type]
    return FederatedMethod(name="half", paper="", summary="", phases=(phase,), arms=("global",))


class Nowhere:
    """A rewind to weights that nobody has."""

    anchor, replay_lr = "theta_x", True


class Chainless:
    """A schedule that fails when it is asked."""

    def __call__(self, targets: tuple[float, ...]) -> Any:
        raise KeyError("targets")


class Scopeless:
    """A scope that fails when it is asked."""

    def __call__(self, *args: Any) -> Any:
        raise AttributeError("no such layer")


HERE = "tests.test_bad_input"


def ragged() -> dict[str, Any]:
    return {**tiny.images(), "y_test": [[0], [1, 2]]}


def nameless() -> dict[str, Any]:
    return {**tiny.images(), "name": np.zeros(2)}


def unprunable(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(tiny.SIDE**2))


def double(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(tiny.SIDE**2, num_classes)).double()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown section": ({"trian": {"lr": 1}}, "trian: unknown key; did you mean train?"),
    "unknown key": ({"train": {"lrr": 1}}, "train.lrr: unknown key"),
    "wrong type": ({"train": {"epochs": "two"}}, "train.epochs"),
    "density above one": ({"finder": {"densities": [1.5]}}, "finder.densities"),
    "density of zero": ({"finder": {"densities": [0.0]}}, "finder.densities"),
    "method's density": ({"method": {"name": "lotteryfl", "density": 1.5}}, "method.density"),
    "zero clients": ({"clients": {"count": 0}}, "clients.count"),
    "negative clients": ({"clients": {"count": -3}}, "clients.count"),
    "more clients than examples": ({"clients": {"count": 500}}, "clients"),
    "an empty client": ({"partition": {"name": "dirichlet", "alpha": 0.01, "min_samples": 61}}, "partition"),
    "a class that no client has": (
        {"partition": {"name": "classes", "classes_per_client": 9}}, "partition"),
    "a class that has no test images": (
        {"data": {"name": "tests.test_bad_input:lonely"}, "clients": {"count": 60},
         "partition": {"name": "classes", "classes_per_client": 1}}, "test"),
    "labels beyond the classes": ({"data": {"name": "tests.test_bad_input:wrong_labels"}}, "y_train"),
    "a data factory that raises": ({"data": {"name": "tests.test_bad_input:raising"}}, "the archive is damaged"),
    "a data set that is not there": ({"data": {"name": "mnist", "root": "/nonexistent"}}, "/nonexistent"),
    "an unknown data set": ({"data": {"name": "mnits"}}, "data.name"),
    "an unknown data option": ({"data": {"options": {"size": 3}}}, "data.options"),
    "too little data": ({"data": {"name": "tests.test_bad_input:few"}}, "clients"),
    "an unknown partition": ({"partition": {"name": "dirichle"}}, "partition.name"),
    "a partition's option": ({"partition": {"name": "iid", "alpha": 1}}, "partition.alpha"),
    "a partition without its option": ({"partition": {"name": "dirichlet"}}, "partition.alpha"),
    "an impossible alpha": ({"partition": {"name": "dirichlet", "alpha": -1.0}}, "partition.alpha"),
    "an unknown method": ({"method": {"name": "fedproxy"}}, "method.name"),
    "a method's option": ({"method": {"name": "fedavg", "mu": 0.1}}, "method.mu"),
    "an unknown arm": ({"personalise": {"arms": ["tickets"]}}, "personalise.arms"),
    "an unknown score": ({"finder": {"score": {"name": "magnitudes"}}}, "finder.score.name"),
    "an unknown schedule": ({"finder": {"schedule": {"name": "slow"}}}, "finder.schedule.name"),
    "an unknown scope": ({"finder": {"scope": {"name": "world"}}}, "finder.scope.name"),
    "a rewind beyond the rounds": ({"finder": {"rewind": {"name": "global", "round": 7}}}, "finder.rewind.round"),
    "an unknown model": ({"model": {"name": "lenet6"}}, "model.name"),
    "a model's option": ({"model": {"options": {"depth": 3}}}, "model.options"),
    "a model's option of a wrong type": ({"model": {"options": {"hidden": ["x"]}}}, "model.options.hidden"),
    "a model for other images": ({"model": {"name": "lenet5", "options": {}}}, "model"),
    "nothing prunable": ({"model": {"name": "tests.test_bad_input:unprunable", "options": {}}}, "model.prunable"),
    "no such tensor": ({"model": {"prunable": ["conv9.*"]}}, "model.prunable"),
    "doubles": ({"model": {"name": "tests.test_bad_input:double", "options": {}}}, "float32"),
    "a module that is not there": ({"model": {"name": "no.such.module:net", "options": {}}}, "no.such.module"),
    "more a round than take part": ({"federate": {"clients_per_round": 4}}, "federate.clients_per_round"),
    "refinement without tickets": (
        {"method": {"name": "fedavg"}, "refine": {"rounds": 1, "clients_per_round": 1}}, "refine.rounds"),
    # Row 16: what lies beyond a training is known from the split, and said before anything trains.
    "row 16: a step beyond the training": (
        {"finder": {"rewind": {"name": "step", "step": 5}}, "train": {"batch_size": 32}},
        "finder.rewind: must stay inside every client's training, got step 5; client 0 has 2 steps: 48 examples"),
    "row 16: a step beyond the training, of which only `local` is as long": (
        {"method": "fedavgm", "finder": {"rewind": {"name": "step", "step": 5}}, "train": {"batch_size": 32}},
        "finder.rewind: must stay inside every client's training, got step 5; client 0 has 2 steps: 48 examples"),
    "row 16: a move beyond the training": (
        {"finder": {"schedule": {"name": "constant", "every": 2, "rounds": 3}, "rewind": "none"}},
        "finder.schedule: must stay inside every client's training, got step 6; client 0 has 3 steps"),
    "row 16: weights that nobody has": (
        {"finder": {"rewind": {"name": f"{HERE}:Nowhere"}}}, "finder.rewind: there are no weights called 'theta_x'"),
    "row 16: a round that no trial reaches": (
        {"finder": {"rewind": {"name": "global", "round": 2}}, "tune": {"lr": [0.1, 0.2], "rounds": 1}},
        "finder.rewind.round: must be at most tune.rounds = 1"),
    "row 16: a floor above the mask": (
        {"finder": {"scope": {"name": "global", "floor": 200}}}, "finder.scope.floor: 200 of each layer"),
    "row 23: a method that is a number": (
        {"method": {"name": f"{HERE}:three"}}, "method: tests.test_bad_input:three must return a fedlth.methods.method."
        "FederatedMethod, got int"),
    "row 23: what cannot be called": ({"method": {"name": f"{HERE}:HERE"}}, "must be a class or a function"),
    "row 23: half a method": (
        {"method": {"name": f"{HERE}:half_a_method"}}, "its federate.update must be a ClientUpdate, got 3"),
    "row 23: a factory that raises": (
        {"method": {"name": f"{HERE}:keyed"}}, "method: tests.test_bad_input:keyed refuses its options: KeyError"),
    "row 23: a method's score that is a number": (
        {"method": {"name": "lotteryfl", "score": f"{HERE}:three"}}, "method.score: tests.test_bad_input:three"),
    "row 23: a method's score without a name": ({"method": {"name": "lotteryfl", "score": 3}}, "method.score.name"),
    "row 23: a partition that is a number": (
        {"partition": {"name": f"{HERE}:three"}}, "three must give a part with __call__(labels"),
    "row 23: a model that is a number": ({"model": {"name": f"{HERE}:three", "options": {}}}, "must return a torch.nn"),
    "row 23: data that are a number": ({"data": {"name": f"{HERE}:three"}}, "must return a Dataset or a dict"),
    "row 23: data that are ragged": ({"data": {"name": f"{HERE}:ragged"}}, "y_test must be an array"),
    "row 23: data with no name": ({"data": {"name": f"{HERE}:nameless"}}, "name must be text, got ndarray"),
    "row 23: a score of a number": ({"finder": {"score": {"name": "shuffled", "of": 3}}}, "finder.score.of"),
    "row 23: a schedule that fails": ({"finder": {"schedule": f"{HERE}:Chainless"}}, "raised KeyError: 'targets'"),
    "row 23: a scope that fails": ({"finder": {"scope": f"{HERE}:Scopeless"}}, "raised AttributeError: no such layer"),
    **{
        f"row 23: a {kind} that is a number": ({"finder": {kind: f"{HERE}:three"}}, f"finder.{kind}: int must have")
        for kind in ("score", "schedule", "scope", "rewind", "granularity", "dead", "gate", "stop")
    },
    "row 35: no arm": ({"personalise": {"arms": []}}, "personalise.arms: must name at least one arm, got []"),
    "row 35: an arm twice": ({"personalise": {"arms": ["dense", "ticket", "dense"]}}, "be given once, got dense 2"),
    "row 35: no frozen weights": ({"personalise": {"arms": ["frozen_random"]}}, "two_step has no frozen weights"),
    "row 35: no own mask": ({"personalise": {"arms": ["own_random"]}}, "method two_step has no own mask"),
    "row 35: no own mask of weights": (
        {"method": {"name": "fedpm"}, "personalise": {"arms": ["own_random"]}}, "method fedpm has no own mask"),
    "row 35: a density of nothing": (
        {"finder": {"densities": [0.5, 0.0001]}}, "finder.densities: must keep at least one of the 816"),
    "row 35: a density of no row": (
        {"finder": {"densities": [0.01], "granularity": "row"}}, "must keep at least one of the 16 prunable groups"),
    "row 35: a method's density of nothing": (
        {"method": {"name": "lotteryfl", "density": 0.0001}}, "method.density: must keep at least one of the 816"),
    "a rate twice": ({"tune": {"lr": [0.1, 0.1]}}, "tune.lr: each must be given once"),
    "rates without a model to score": (
        {"tune": {"lr": [0.1, 0.2]}, "personalise": {"arms": ["random"]}}, "personalise.arms: must hold global or one"),
}  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], place: str) -> None:
    capsys.readouterr()
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("run folder: ")]
    assert len(lines) == 1 and lines[0].startswith("fedlth: "), err
    assert place in lines[0], err


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("name", BAD)
def test_one_line_that_names_the_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    sections, place = BAD[name]
    file, out = tmp_path / "study.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump({**tiny.tree(**sections), "out": str(out)}))
    refused(capsys, [command, str(file)], place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.yaml"], "nothing is half-written"


@pytest.mark.parametrize(
    ("argv", "place"),
    [
        (["run", "{dir}/none.yaml"], "none.yaml: no such study file"),
        (["check", "{dir}"], "no such study file"),
        (["run", "{dir}/s.yaml", "train.lr"], "must be key=value"),
        (["run", "{dir}/s.yaml", "train.lr=fast"], "train.lr"),
        (["run", "{dir}/s.yaml", "engine=rya"], "engine"),
        (["run", "{dir}/s.yaml", "out={dir}/s.yaml"], "must be a folder"),
        (["resume", "{dir}/none"], "no run here"),
        (["report", "{dir}/none"], "none"),
        (["diff", "{dir}/a", "{dir}/b"], "{dir}/a"),
        (["compare", "{dir}/a", "{dir}/b"], "{dir}/a"),
        (["list", "methodz"], "must be one of methods"),
        (["lottery", "{dir}/s.yaml"], "is a federated study; `fedlth run`"),
        (["lottery", "{dir}/s.yaml", "--dry-count", "seeds=[7]"], "is a federated study"),
        (["run", "{dir}/s.yaml", "searches={{}}"], "is a study of the ticket laboratory"),
    ],
)
def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], place: str) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(tiny.tree()))
    refused(capsys, [a.format(dir=tmp_path) for a in argv], place.format(dir=tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.yaml"]


def test_a_study_that_is_fine_is_forecast_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(tiny.tree()))
    assert cli.main(["check", str(tmp_path / "s.yaml")]) == 0
    assert "clients: 4 (1 unseen)" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.yaml"]
