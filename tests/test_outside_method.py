"""A method that was not written here: the same on every engine, after any stop, in listings and in forecasts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedlth import catalogue, cli, forecast
from fedlth.engines.choose import drive
from fedlth.engines.forked import Forked
from fedlth.errors import NothingUsable
from fedlth.experiment.experiment import Experiment
from fedlth.federation.rounds import Federation
from fedlth.models.layout import Params
from fedlth.storage.run_folder import RunFolder
from fedlth.study.schema import Study
from tests import tiny

NAME = "tests.outside_method:method"


def study(**sections: object) -> Study:
    return tiny.study(method={"name": NAME}, federate={"rounds": 3, "clients_per_round": 2}, **sections)


def test_it_is_short() -> None:
    lines = (Path(__file__).parent / "outside_method.py").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.startswith(("from ", "import ")) and '"""' not in line]
    assert len(code) < 60


def test_its_ledger_says_what_it_does(tmp_path: Path) -> None:
    run = tiny.run(study(), tmp_path / "r")
    rows = tiny.rows(tmp_path / "r", "ledger")
    up = [r for r in rows if r["receiver"] == "server" and r["kind"] != "metrics"]
    assert {(r["phase"], r["kind"]) for r in up} == {("saliency", "scores"), ("federate", "values")}
    assert [r["density"] for r in up if r["phase"] == "federate"] == [pytest.approx(0.3, abs=0.01)] * 6
    header = json.loads((run.root / "header.json").read_bytes())
    assert [(p["name"], p["step"], p["joins"]) for p in header["phases"]] == [
        ("saliency", 1, True), ("federate", 1, True), ("personalise", 2, False)
    ]  # fmt: skip
    assert header["num_exchanged"] < header["num_parameters"], "the head stays with its client"
    metrics = tiny.rows(tmp_path / "r", "metrics")
    assert {r["arm"] for r in metrics} == {"global", "own_tuned", "head_only"}
    federation = tiny.opened(run)
    assert federation.state.mask is not None and "velocity" in federation.state.memory


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_stop_anywhere_changes_nothing(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.run(study(), tmp_path / "whole")
    run = Federation.run
    monkeypatch.setattr(Federation, "run", lambda self: run(self, stop_after=after))
    with pytest.raises(NothingUsable, match="no client finished step 2"):  # as of a run that is stopped so early
        tiny.run(study(), tmp_path / "stopped")
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "stopped")
    drive(Experiment.of(folder.study()), folder.root, again=True)
    assert tiny.facts(tmp_path / "whole") == tiny.facts(tmp_path / "stopped")


def test_any_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    tiny.run(study(), tmp_path / "one")
    tiny.run(study(), tmp_path / "two", engine=Forked(2))
    assert tiny.facts(tmp_path / "one") == tiny.facts(tmp_path / "two")


def test_it_is_listed_with_its_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(tiny.tree(federate={"rounds": 3, "clients_per_round": 2})))  # JSON is YAML
    assert cli.main(["list", "methods", NAME, str(file)]) == 0
    text = capsys.readouterr().out
    assert "one mask for all, server momentum, private heads" in text and "density=0.3" in text
    assert "phase saliency: 1 x 3 clients; down all weights; up scores (saliency)" in text
    assert "down at most" in text and "up at most" in text
    assert "model.personal: '3.*' must match" in catalogue.listing("methods", NAME), "LeNet-5 has no such head"
    assert "salient_momentum" in forecast.forecast(study())


@pytest.mark.parametrize("compute", ["reference", "tuned", "auto"])
def test_a_method_may_have_a_local_objective_of_its_own(compute: str, tmp_path: Path) -> None:
    def theta(name: str, **options: float) -> Params:
        train = {"epochs": 2, "momentum": 0.5, "weight_decay": 0.01}
        made = tiny.study(method={"name": name, **options}, federate={"rounds": 1}, train=train, compute=compute)
        return tiny.opened(tiny.run(made, tmp_path / f"{name}-{options.get('mu')}")).state.theta

    pulled = "tests.outside_objective:method"
    plain, free, near = theta("fedavg"), theta(pulled, mu=0.0), theta(pulled, mu=3.0)
    start = tiny.experiment(study()).task.theta_0.floats
    assert np.allclose(free.floats, plain.floats, atol=1e-6), "the kernel (auto) adds in another order"
    assert compute == "auto" or np.array_equal(free.floats, plain.floats)
    assert np.linalg.norm(near.floats - start) < 0.6 * np.linalg.norm(free.floats - start)
