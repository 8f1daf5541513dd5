"""privacy.dp: examples' gradients are clipped and noisy under masks, every step is counted, nothing else looks."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth import api, forecast
from fedlth.data.examples import Examples
from fedlth.engines.forked import Forked
from fedlth.errors import MissingExtra, StudyError
from fedlth.experiment import dp_checks
from fedlth.experiment.resolve import resolve
from fedlth.federation.noisy_steps import split_off
from fedlth.federation.spent import spent_by
from fedlth.models.layout import Params, layout_of, read
from fedlth.report.diff import diff
from fedlth.report.facts import read_group
from fedlth.report.privacy import privacy_card
from fedlth.rng import SECRET, stream
from fedlth.storage.records import Failed, NoisySteps, RoundRow
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.spent_privacy import SPENT, read_spent
from fedlth.training.batch_requests import lacks as cohort_lacks
from fedlth.training.dp_accountant import epsilon
from fedlth.training.dp_sgd import DpSgd, each_gradient, poisson, sampled
from fedlth.training.flat_model import FlatModel
from fedlth.training.kernel_backend import lacks as kernel_lacks
from fedlth.training.local_client import LocalClient
from fedlth.training.optimizer import Adam
from fedlth.training.request import TrainingResult, drawn_request
from fedlth.training.train import train
from tests import tiny

# Looked for, not imported: that takes seconds, which only the process that runs these tests should spend.
pytestmark = pytest.mark.skipif(find_spec("opacus") is None, reason="needs the extra: pip install 'fedlth[privacy]'")

DP = {"noise_multiplier": 0.8, "max_grad_norm": 1.0, "delta": 1e-3}
QUIET = DpSgd(noise_multiplier=1e-30, max_grad_norm=1e6, delta=1e-3)  # what is left is the training without noise


def noisy(**sections: Any) -> Any:
    lean = {
        "finder": {"densities": [0.3]}, "personalise": {"arms": ["ticket"], "epochs": 1}, "workers": 1,
        "privacy": {"dp": DP},
    }  # fmt: skip
    return tiny.study(**{**lean, **sections})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(noisy(), tmp_path_factory.mktemp("dp") / "run").root


def net() -> tuple[FlatModel, Params]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Conv2d(1, 3, 3), torch.nn.GroupNorm(1, 3), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(3 * 36, tiny.NUM_CLASSES),
        )  # fmt: skip
    layout = layout_of(module, ("0.weight", "4.weight"))
    return FlatModel(module, layout, "cpu"), read(module, layout)


def data(size: int = 12) -> Examples:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 1, 8, 8), np.float32), rng.integers(0, tiny.NUM_CLASSES, 12)
    return Examples(torch.from_numpy(x[:size]), torch.from_numpy(y[:size]))


def trained(dp: DpSgd | None, *, batch_size: int = 12, size: int = 12, noise_seed: int = 1, **more: Any) -> Any:
    model, start = net()
    recipe = replace(tiny.recipe(epochs=3, batch_size=batch_size, lr=0.1), dp=dp, **more.pop("parts", {}))
    request = drawn_request(
        start, data(size), recipe, order=stream(0, "order"), torch_seed=3, noise_seed=noise_seed, **more
    )  # fmt: skip
    return model, train(model, request)


@pytest.mark.parametrize("parts", [{}, {"optimizer": Adam(eps=0.1)}], ids=["sgd", "adam"])
def test_without_clipping_or_noise_it_is_the_training_that_it_was(parts: dict[str, Any]) -> None:
    """A batch of all examples: then Poisson sampling takes them all, too."""
    mask = np.random.default_rng(1).random(net()[0].layout.num_prunable) < 0.5
    plain, quiet = (trained(dp, active=mask, parts=parts)[1] for dp in (None, QUIET))
    assert np.allclose(plain.params.floats, quiet.params.floats, atol=2e-5)
    assert quiet.loss == pytest.approx(plain.loss, rel=1e-4)


def test_what_is_pruned_or_held_has_no_noise() -> None:
    model, start = net()
    size = model.layout.num_prunable
    mask = np.random.default_rng(1).random(size) < 0.5
    found = trained(DpSgd(noise_multiplier=5.0, max_grad_norm=1.0, delta=1e-3), active=mask)[1].params.floats
    assert not found[:size][~mask].any() and (found[:size][mask] != start.floats[:size][mask]).all()
    free = np.random.default_rng(2).random(model.layout.num_params) < 0.5
    held = trained(DpSgd(noise_multiplier=5.0, max_grad_norm=1.0, delta=1e-3), trainable=free)[1].params.floats
    assert np.array_equal(held[: free.size][~free], start.floats[: free.size][~free])


def test_a_step_is_the_clipped_sum_and_noise_of_the_stated_size() -> None:
    """One example more or less moves the sum by the norm at most; what is added has its standard deviation."""
    norm, rate = 0.01, 0.1
    once = {"batch_size": 12, "parts": {"budget": tiny.recipe(epochs=1, batch_size=12, lr=rate).budget}}

    def sum_of(size: int, multiplier: float, seed: int = 1) -> np.ndarray:
        dp = DpSgd(noise_multiplier=multiplier, max_grad_norm=norm, delta=1e-3)
        model, result = trained(dp, size=size, noise_seed=seed, **{**once, "batch_size": size})
        return (net()[1].floats - result.params.floats)[: model.layout.num_params] / rate * size

    more, less = sum_of(12, 1e-9), sum_of(11, 1e-9)
    assert 0.5 * norm < np.linalg.norm(more - less) <= 1.01 * norm
    noise = np.concatenate([sum_of(12, 3.0, seed) - more for seed in range(1, 9)])
    assert noise.std() == pytest.approx(3.0 * norm, rel=0.05) and abs(noise.mean()) < 0.1 * 3.0 * norm


def test_a_batch_is_a_poisson_sample_and_may_be_empty() -> None:
    drawn = [poisson(100, 20, stream(seed, "batch")) for seed in range(300)]
    sizes = np.array([len(one) for one in drawn])
    assert sizes.mean() == pytest.approx(20, abs=0.8) and sizes.std() == pytest.approx(4, abs=0.6)
    assert np.bincount(np.concatenate(drawn), minlength=100).min() > 30
    assert any(len(poisson(3, 1, stream(seed, "batch"))) == 0 for seed in range(10))
    result = trained(DpSgd(noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-3), batch_size=1, size=3)[1]
    assert isinstance(result, TrainingResult) and np.isfinite(result.params.floats).all()


def test_an_example_that_breaks_counts_as_none() -> None:
    model, start = net()
    model.load(start)
    model.module.train()
    broken = data(3)
    broken.tensor[1] = float("inf")
    recipe = replace(tiny.recipe(batch_size=3, lr=0.1), dp=QUIET)
    with sampled(model):
        rows = each_gradient(model, recipe.loss, broken)[0]
    assert torch.isfinite(rows[[0, 2]]).all() and not torch.isfinite(rows[1]).all()
    request = drawn_request(start, broken, recipe, order=stream(0, "order"), torch_seed=3)
    assert np.isfinite(train(model, request).params.floats).all(), "and it ends no training: that would tell of it"


def test_no_two_trainings_of_a_visit_have_one_noise() -> None:
    """Else the difference of two models would be that of two gradients without noise."""
    experiment = resolve(noisy())[0]
    task = experiment.task

    def moved() -> tuple[np.ndarray, np.ndarray]:
        local = LocalClient(task, 1, 1, "federate", rounds=2)
        recipe = replace(local.recipe, lr=1e-3)
        both = [local.train(task.theta_0, recipe=recipe).params.floats - task.theta_0.floats for _ in range(2)]
        assert local.noisy == [(16, 3), (16, 3)]
        return both[0], both[1]

    first, second = moved()
    assert np.corrcoef(first, second)[0, 1] < 0.9 and all(map(np.array_equal, moved(), (first, second)))


def test_a_devices_secret_makes_other_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    task = resolve(noisy())[0].task
    local = LocalClient(task, 1, 1, "federate", rounds=2)
    known = local.train(task.theta_0, recipe=local.recipe).params.floats
    monkeypatch.setenv(SECRET, "known here alone")
    other = LocalClient(task, 1, 1, "federate", rounds=2)
    assert not np.array_equal(known, other.train(task.theta_0, recipe=other.recipe).params.floats)


def test_epsilon_is_opacus_own_and_adds_up() -> None:
    from opacus.accountants import RDPAccountant

    dp, theirs = DpSgd(noise_multiplier=1.1, max_grad_norm=1.0, delta=1e-5), RDPAccountant()
    for size, steps in ((16, 10), (32, 5)):
        for _ in range(steps):
            theirs.step(noise_multiplier=1.1, sample_rate=size / 100)
    assert epsilon(dp, 100, {16: 10, 32: 5}) == pytest.approx(theirs.get_epsilon(delta=1e-5))
    assert epsilon(dp, 100, {}) == 0 and epsilon(dp, 100, {16: 11, 32: 5}) > epsilon(dp, 100, {16: 10, 32: 5})
    # Without sampling a step is the Gaussian mechanism: known by its own formula, at the accountant's best order.
    orders = np.array(RDPAccountant.DEFAULT_ALPHAS)
    bound = 4 * orders / (2 * 1.1**2) + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)
    assert epsilon(dp, 10, {64: 4}) == pytest.approx(bound.min(), rel=1e-6)


def test_every_step_is_told_and_counted(run: Path) -> None:
    found, steps = read_spent(run), dict.fromkeys(range(4), 0)
    assert found is not None and (found.accountant, found.sampling, found.delta) == ("rdp", "poisson", 1e-3)
    for row in tiny.rows(run, "rounds"):
        assert row["noisy"] and {one["batch_size"] for one in row["noisy"]} == {16}
        for one in row["noisy"]:
            steps[one["client"]] += one["steps"]
    # By hand: 48 training examples are 3 steps an epoch; a visit is one, a search for one ticket is two trainings.
    visits = [row["clients"] for row in tiny.rows(run, "rounds") if row["phase"] == "federate"]
    for one in found.clients:
        assert (
            one.steps
            == steps[one.client]
            == 3 * (2 + sum(one.client in clients for clients in visits)) * (one.examples / 48)
        )
        assert one.assumed == 0 and one.epsilon == epsilon(DpSgd(**DP), one.examples, {16: one.steps})
    assert all("loss" not in str(row.get("metrics")) for row in tiny.rows(run, "rounds"))


def test_a_stop_and_other_engines_change_neither_bits_nor_epsilon(run: Path, tmp_path: Path) -> None:
    other = tiny.run(noisy(), tmp_path / "forked", engine=Forked(2)).root
    folder = RunFolder(tmp_path / "cut")
    folder.create(tiny.experiment(noisy()).study)
    tiny.opened(folder).run(stop_after=3)
    api.resume(folder.root)
    for one in (other, folder.root):
        assert tiny.facts(one) == tiny.facts(run) and (one / SPENT).read_bytes() == (run / SPENT).read_bytes()


@pytest.mark.long
# Ray's own: it forgets its daemons and what it opened for them when it is shut down.
@pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")  # typer's, which Flower imports
@pytest.mark.filterwarnings(r"ignore:subprocess \d+ is still running:ResourceWarning")
@pytest.mark.filterwarnings(r"ignore:unclosed file <_io\.\w+ name='/dev/null':ResourceWarning")
@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_engines_on_other_processes_change_nothing(engine: str, run: Path, tmp_path: Path) -> None:
    out = api.run(noisy(engine=engine, out=str(tmp_path / engine)))
    assert engine == "flower" or tiny.facts(out) == tiny.facts(run)  # Flower's rows have framed bytes
    assert diff(run, out) == [] and (out / SPENT).read_bytes() == (run / SPENT).read_bytes()
    gc.collect()


def test_the_card_and_the_check_say_what_it_comes_to(run: Path) -> None:
    card = " ".join(privacy_card(read_group(run)))
    worst = max(one.epsilon for one in read_spent(run).clients)  # type: ignore[union-attr]
    assert f"epsilon at most {worst:.2f} at delta 0.001" in card and "no noise on values" not in card
    assert "its number of examples and its validation score" in card
    told = forecast.foreseen(noisy(cohort=2)).text
    assert "because a cohort has no privacy.dp" in told
    assert f"epsilon about {worst:.1f} at most" in told


def test_visits_whose_answer_was_not_used_count_as_the_longest() -> None:
    experiment = resolve(noisy())[0]
    rows = [
        RoundRow(round=1, phase="federate", clients=[0, 1], up_bytes=0, down_bytes=0, noisy=[NoisySteps(0, 16, 5)],
                 failed=[Failed(1, "refused", "why"), Failed(2, "dropped", "why")]),
        RoundRow(round=2, phase="federate", clients=[0, 1], up_bytes=0, down_bytes=0, noisy=[NoisySteps(1, 16, 3)],
                 failed=[Failed(1, "late", "told of all the same")], void=True),
    ]  # fmt: skip
    found = spent_by(experiment, rows)
    assert found is not None and [(c.client, c.steps, c.assumed) for c in found.clients] == [(0, 5, 0), (1, 3, 5)]
    assert spent_by(resolve(tiny.study())[0], rows) is None


@pytest.mark.parametrize("told", [None, {"x": 1}, {"16": 0}, {"16": 1.5}, {"16": True}, {"0": 3}, {"16": 2**31}])
def test_the_door_refuses_steps_that_are_no_counts(told: Any) -> None:
    with pytest.raises(ValueError, match="noisy_steps must be"):
        split_off({"rows": [], "noisy_steps": told}, 0)
    assert split_off({"a": 1, "noisy_steps": {"16": 3}}, 2) == ({"a": 1}, (NoisySteps(2, 16, 3),))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"privacy": {"dp": {**DP, "delta": 0.1}}}, r"privacy.dp.delta: must be below 1 / 48 = 0.021, .* got 0.1"),
        ({"model": {"name": "tests.tiny:Small", "options": {}}}, "layer norm: BatchNorm cannot support"),
        ({"method": {"name": "fedpm"}, "personalise": {"arms": None}}, "method: must not be fedpm with privacy.dp"),
        ({"finder": {"score": "snip"}}, "finder.score: must not be Snip"),
        ({"finder": {"score": {"name": "inverted", "of": "fisher"}}}, "finder.score: must not be Fisher"),
        ({"finder": {"schedule": "constant", "rewind": "none"}}, "finder.schedule.by: must be random"),
        ({"train": {"loss": {"name": "cross_entropy", "classes": "own"}}}, "train.loss.classes: must be all"),
        ({"tune": {"lr": [0.1, 0.2]}}, "tune.lr: must be left out with privacy.dp"),
        ({"privacy": {"dp": {"noise_multiplier": 0.0, "delta": 1e-3}}}, "noise_multiplier"),
    ],
)  # fmt: skip
def test_what_would_not_hold_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        resolve(noisy(**sections))


class Mixed(torch.nn.Module):
    """A network in which each example sees the others, and opacus' own rules do not notice."""

    def __init__(self, num_classes: int = tiny.NUM_CLASSES) -> None:
        super().__init__()
        self.head = torch.nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.head(x - x.mean(0, keepdim=True) / 2)


def test_a_network_that_mixes_examples_is_found_by_trial() -> None:
    with pytest.raises(StudyError, match="gradients of single examples differ from their own"):
        resolve(noisy(model={"name": "tests.test_dp:Mixed", "options": {}}))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlth.errors.find_spec", lambda name: None if name == "opacus" else object())
    with pytest.raises(MissingExtra, match=r"privacy.dp needs the extra: pip install 'fedlth\[privacy\]'"):
        dp_checks.check_dp(tiny.experiment(noisy()))


def test_a_client_lets_nothing_else_look() -> None:
    local = LocalClient(resolve(noisy())[0].task, 0, 1, "federate", rounds=2)
    looks = (
        lambda: local.train_part, lambda: next(local.gradients(local.task.theta_0)),
        lambda: local.network(local.task.theta_0).gradient(local.task.theta_0.floats[: local.full.size]),
        lambda: local.network(local.task.theta_0).squared_gradient(local.task.theta_0.floats[: local.full.size]),
    )  # fmt: skip
    for look in looks:
        with pytest.raises(StudyError, match="looks at training examples without noise"):
            look()


def test_other_backends_have_none() -> None:
    model, start = net()
    recipe = replace(tiny.recipe(batch_size=4, lr=0.1), dp=QUIET)
    request = drawn_request(start, data(), recipe, order=stream(0, "order"), torch_seed=3)
    assert kernel_lacks(recipe) == "privacy.dp" and cohort_lacks(request) == "a cohort has no privacy.dp"


def test_a_study_without_it_is_the_text_that_it_was() -> None:
    assert "dp" not in json.loads(tiny.study().science())["privacy"]


@pytest.mark.long
@pytest.mark.parametrize("name", list(tiny.METHODS))
def test_every_method_trains_with_noise_alone_or_is_refused(name: str, tmp_path: Path) -> None:
    made = tiny.of_method(name, privacy={"dp": DP}, workers=1)
    try:
        out = tiny.run(made, tmp_path / "run").root
    except StudyError as error:
        assert "privacy.dp" in str(error) and (name in dp_checks.METHODS or "BatchNorm" in str(error))
        return
    assert name not in dp_checks.METHODS
    assert not [row["failed"] for row in tiny.rows(out, "rounds") if row["failed"]]
