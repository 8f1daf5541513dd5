"""A model that brings its weights: another draw of them is no control, and nobody calls it one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlth import api, forecast
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.lab import runner
from fedlth.training.local_client import LocalClient
from tests import tiny
from tests.lab import tiny_lottery

BRINGS = "brings its own weights: another draw gives 1.weight of theta_0 again"
PRETRAINED: dict[str, Any] = {"name": "tests.user_model:pretrained", "options": {}}
DRAWN = {**PRETRAINED, "reinit_options": {"trained": False}}
RANDOM = {"arms": ["ticket", "random"], "epochs": 1}


@pytest.mark.parametrize("arms", [["ticket"], ["one_shot"], ["random"]])
def test_a_rewind_to_another_draw_is_refused_at_the_check(tmp_path: Path, arms: list[str]) -> None:
    """Row 32: before anything trains, in the check, the forecast and the run."""
    made = tiny.study(model=PRETRAINED, finder={"rewind": "reinit"}, personalise={"arms": arms})
    for act in (api.check, forecast.forecast, lambda s: tiny.run(s, tmp_path / "r")):
        with pytest.raises(StudyError, match=f"finder.rewind: model tests.user_model:pretrained {BRINGS}"):
            act(made)
    assert not (tmp_path / "r").exists()
    api.check(made.model_copy(update={"personalise": made.personalise.model_copy(update={"arms": ("dense",)})}))
    api.check(tiny.study(model=DRAWN, finder={"rewind": "reinit"}, personalise={"arms": arms}))


def test_no_other_draw_is_ever_given(tmp_path: Path) -> None:
    """Row 32: not by whoever asks a client for one either."""
    with pytest.raises(StudyError, match=BRINGS):
        LocalClient(tiny.task(model=PRETRAINED), 0, 0, "personalise").fresh_init("reinit")


def test_random_has_two_starts_and_says_so(tmp_path: Path) -> None:
    """Row 32: the control does without its third start; note, header and rows say it."""
    lines: list[str] = []
    made = tiny.study(model=PRETRAINED, personalise=RANDOM)
    tiny.run(made, tmp_path / "r", tell=lines.append)
    (note,) = [line for line in lines if "arm random" in line]
    assert note.startswith("note: arm random: starts from theta_g and theta_0 alone; model") and BRINGS in note
    assert note.removeprefix("note: ") in forecast.forecast(made)
    assert json.loads((tmp_path / "r" / "header.json").read_bytes())["random_starts"] == ["theta_g", "theta_0"]
    rows = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "random"]
    assert rows and all(r["start"] in ("theta_g", "theta_0") and r["search_epochs"] == 1 for r in rows)
    tiny.run(tiny.study(model=DRAWN, personalise=RANDOM), tmp_path / "drawn", tell=lines.append)
    assert [line for line in lines if "arm random" in line] == [note]
    header = json.loads((tmp_path / "drawn" / "header.json").read_bytes())
    assert header["random_starts"] == ["theta_g", "theta_0", "reinit"]


def test_random_does_not_train_equal_starts_twice(tmp_path: Path) -> None:
    """Without rounds theta_g is theta_0: one start where another draw would be theta_0 again, and it costs one."""
    made = tiny.study(model=PRETRAINED, method={"name": "standalone"}, personalise=RANDOM)
    lines: list[str] = []
    tiny.run(made, tmp_path / "r", tell=lines.append)
    assert any(line.startswith("note: arm random: starts from theta_g alone; model") for line in lines)
    assert json.loads((tmp_path / "r" / "header.json").read_bytes())["random_starts"] == ["theta_g"]
    rows = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "random"]
    assert rows and all(r["start"] == "theta_g" and r["search_epochs"] == 0 for r in rows)


def test_named_options_draw_every_weight_anew() -> None:
    """Row 32: model.reinit_options is the light way to a control of a pre-trained model."""
    task = tiny.task(model=DRAWN)
    other = LocalClient(task, 0, 0, "personalise").fresh_init("reinit")
    size = task.layout.num_prunable
    assert (other.floats[:size] != task.theta_0.floats[:size]).all()
    wider = tiny.task(model={**DRAWN, "reinit_options": {"trained": False, "hidden": 9}})
    with pytest.raises(StudyError, match="reinit_options: must give a model of the same tensors"):
        _ = wider.model.brought
    with pytest.raises(StudyError, match="^model.reinit_options: .* takes hidden, trained, got 'deeper'"):
        tiny.task(model={**DRAWN, "reinit_options": {"deeper": True}}).model.fresh("other")


def test_what_nothing_trains_stays_in_another_draw() -> None:
    task = tiny.task(model={"name": "tests.user_model:Mixed", "options": {}})
    other, names = task.model.fresh("other"), {e.name: e for e in task.layout.entries}
    for name, same in (("features.weight", True), ("head.weight", False)):
        at = names[name].slice
        assert np.array_equal(other.floats[at], task.theta_0.floats[at]) is same, name


class Zeros(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.residual = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, num_classes)
        nn.init.zeros_(self.residual.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.body(x.flatten(1)))
        return self.head(x + self.residual(x))


def test_a_branch_that_starts_at_zero_is_drawn() -> None:
    assert not tiny.task(model={"name": "tests.test_brought_weights:Zeros", "options": {}}).model.brought


@pytest.mark.parametrize(
    ("place", "sections"),
    [
        ("searches.imp.rewind", {"searches": {"imp": {"rounds": 2, "rewind": "reinit"}}}),
        ("arms.new.start", {"arms": {"new": {"of": "imp", "start": "reinit"}}}),
    ],
)
def test_the_laboratory_refuses_it_too(tmp_path: Path, place: str, sections: dict[str, Any]) -> None:
    """Row 32: the control `reinit` of a search, before anything trains; a Glorot draw replaces what is brought."""
    with pytest.raises(StudyError, match=f"{place}: model tests.user_model:pretrained {BRINGS}"):
        tiny_lottery.run(tmp_path / "r", model=PRETRAINED, **sections)
    assert not (tmp_path / "r").exists()
    with pytest.raises(StudyError, match=BRINGS):
        tiny_lottery.bench(model=PRETRAINED).model.fresh("reinit")
    for model in (DRAWN, {**PRETRAINED, "init": "glorot_normal"}):
        runner.check(tiny_lottery.made(model=model, **sections))


def test_importing_a_model_does_not_decide_theta_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 32's brother: code that seeds torch where it is imported gave each first build of a process its weights."""
    text = "import torch\nfrom torch import nn\ntorch.manual_seed(0)\n\n\ndef seeds(num_classes):\n"
    (tmp_path / "seeding.py").write_text(text + "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = {"name": "seeding:seeds", "options": {}}
    first, second = tiny.task(model=model), tiny.task(model=model, seed=1)
    again = second.model.module()
    assert torch.equal(
        again[1].weight.reshape(-1), torch.from_numpy(second.theta_0.floats[: second.layout.num_prunable])
    )
    assert first.theta_0.digest() != second.theta_0.digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(nn.Linear(64, 4).weight.reshape(-1), torch.from_numpy(first.theta_0.floats[:256]))


class Lone:
    """Client `client` has two examples, one of which trains; the others share the rest."""

    by_key = False

    def __init__(self, client: int) -> None:
        self.client = client

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        parts = np.array_split(np.arange(2, len(labels)), num_clients - 1)
        return [*parts[: self.client], np.arange(2), *parts[self.client :]]


@pytest.mark.parametrize("client", [0, 3])
def test_one_training_example_costs_its_own_client_alone(tmp_path: Path, client: int) -> None:
    """Row 44: a BatchNorm cannot train on it, whichever client it is; the start says so, the others go on."""
    made = tiny.of_method(
        "two_step", model={"name": "tests.user_model:Mixed", "options": {}}, clients={"unseen": 0.0},
        partition={"name": "tests.test_brought_weights:Lone", "client": client},
        personalise={"arms": ["ticket"]}, federate={"clients_per_round": 4},
    )  # fmt: skip
    lines: list[str] = []
    tiny.run(made, tmp_path / "r", engine=InProcess(), tell=lines.append)
    assert {f["client"] for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]} == {client}
    assert {r["client"] for r in tiny.rows(tmp_path / "r", "metrics")} == {0, 1, 2, 3} - {client}
    (note,) = [line for line in lines if "batch of one example" in line]
    assert f"1 of 4 clients have one training example and fail at every visit: {client};" in note
    assert "partition.min_samples, clients.validation" in note
    assert note.removeprefix("note: ") in forecast.forecast(made)


def test_batches_of_one_for_everyone_are_refused() -> None:
    """Row 44: with one rule for all; a model without a norm trains on them."""
    model = {"name": "tests.user_model:Mixed", "options": {}}
    with pytest.raises(
        StudyError, match=r"train.batch_size: .* cannot be trained on a batch of one example \(ValueError"
    ):
        api.check(tiny.study(model=model, train={"batch_size": 1}))
    with pytest.raises(StudyError, match=r"personalise.batch_size: must be larger, .* a batch of one example"):
        api.check(tiny.study(model=model, personalise={"batch_size": 1}))
    api.check(tiny.study(train={"batch_size": 1}))
    # 36 examples a client in batches of 5: the last, of one, joins the one before
    api.check(tiny.study(model=model, train={"batch_size": 5}))
