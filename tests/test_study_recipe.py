"""A study's training recipe: what each key means, what is refused, and what is noted."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlth.errors import StudyError
from fedlth.experiment.resolve import read, resolve
from fedlth.forecast import forecast, step2_epochs
from fedlth.study import schema
from fedlth.study.yaml_text import parse
from fedlth.training.budget import Budget
from fedlth.training.local_client import LocalClient
from fedlth.training.loss import CrossEntropy, OfBatch, Restricted
from fedlth.training.optimizer import Adam, AdamW, Sgd
from fedlth.training.pull import Proximal
from fedlth.training.rate_schedule import Cosine, Linear
from fedlth.training.study_recipe import recipes
from tests import tiny

PLAIN = {"momentum": 0.0}


def refused(**sections: Any) -> str:
    with pytest.raises(StudyError) as caught:
        read(tiny.study(**sections))
    return str(caught.value)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "train.steps: "),
    ({"steps": 5, "epochs": 2}, "train: .*must have epochs or steps, not both"),
    ({"epochs": None}, "train: .*must have epochs or steps"),
    ({"optimizer": "adamm"}, "train.optimizer.name: must be one of sgd, adam, adamw or package"),
    ({"optimizer": {"name": "adam", "beta": 1}}, "train.optimizer.beta: adam has no such option; it takes betas, eps"),
    ({"optimizer": {"name": "adam", "betas": [0.9]}}, "train.optimizer: adam refuses its options: .*betas must be two"),
    ({"optimizer": {"name": "adamw", "betas": [0.9, 1.0]}}, r"train.optimizer: .*betas must be in \[0, 1\), got 1.0"),
    ({"optimizer": {"name": "adamw", "eps": 0.0}}, "train.optimizer: .*eps must be above 0"),
    ({"optimizer": {"name": "adamw", "weight_decay": -1.0}}, "train.optimizer: .*weight_decay must be at least 0"),
    ({"optimizer": {"name": "sgd", "nesterov": True}}, "train.optimizer: .*nesterov needs a momentum above 0"),
    ({"optimizer": {"name": "sgd", "nesterov": 1}}, "train.optimizer.nesterov: must be bool, got 1"),
    ({"optimizer": "adam", "momentum": 0.9}, "train.momentum: is an option of sgd; give adam its own"),
    ({"optimizer": "adamw", "weight_decay": 0.1}, "train.weight_decay: is an option of sgd"),
    ({"optimizer": {"name": "sgd", "momentum": 0.5}, "momentum": 0.9}, "train.momentum: must be given once"),
    ({"schedule": "linea"}, "train.schedule.name: must be one of constant, cosine, linear"),
    ({"schedule": {"name": "linear", "warmup": 1.5}}, "train.schedule: .*warmup must be a share"),
    ({"schedule": {"name": "linear", "final": -1.0}}, "train.schedule: .*final must be at least 0"),
    ({"schedule": {"name": "linear", "start": 2.0}}, "train.schedule: .*start must be in"),
    ({"schedule": {"name": "cosine", "final_at": "end"}}, "train.schedule: .*final_at must be last or after"),
    ({"schedule": {"name": "step", "milestones": [2]}}, "train.schedule: .*milestones must be shares"),
    ({"schedule": {"name": "step", "gamma": 0.0}}, "train.schedule: .*gamma must be above 0"),
    ({"schedule": {"name": "exponential", "final": 0.0}}, "train.schedule: .*final must be above 0"),
    ({"schedule": {"name": "linear", "warmup": 2.5}}, "train.schedule: .*or a whole number of them, got 2.5"),
    ({"schedule": {"name": "cosine", "warmup": -1}}, "train.schedule: .*or a whole number of them, got -1"),
    ({"schedule": {"name": "cosine", "warmup": True}}, "train.schedule.warmup: must be float, got True"),
    ({"round_decay": 0.0}, "train.round_decay: "),
    ({"round_schedule": "linea"}, "train.round_schedule.name: must be one of constant, cosine, linear"),
    ({"round_schedule": {"name": "linear", "warm": 2}}, "train.round_schedule.warm: linear has no such option"),
    ({"clip_norm": 0.0}, "train.clip_norm: "),
    ({"loss": "hinge"}, "train.loss.name: must be one of cross_entropy, mse, masked_lm"),
    ({"loss": {"name": "cross_entropy", "label_smoothing": 1.0}}, "train.loss: .*label_smoothing must be in"),
    ({"loss": {"name": "cross_entropy", "classes": "mine"}}, "train.loss: .*classes must be all or own"),
    ({"loss": "masked_lm"}, "train.loss.mask_token: required by masked_lm"),
    ({"loss": {"name": "masked_lm", "mask_token": 1, "rate": 0.0}}, "train.loss: .*rate must be in"),
    ({"loss": "tests.test_study_recipe:missing"}, "train.loss: cannot import"),
    ({"loss": {"name": "torch.nn.functional:cross_entropy", "label_smoothin": 0.1}},
     "train.loss.label_smoothin: torch.nn.functional:cross_entropy has no such option; it takes weight, .*smoothing"),
    ({"loss": {"name": "torch.nn.functional:cross_entropy", "label_smoothing": "much"}},
     "train.loss.label_smoothing: must be .*float.*, got 'much'"),
    ({"loss": {"name": "torch.nn.functional:cross_entropy", "weight": {"a": 1}}}, "train.loss: .*be a frozen value"),
    ({"loss": {"name": "tests.test_study_recipe:powers", "power": 2}}, "train.loss.scale: required by tests"),
    ({"loss": {"name": "tests.test_study_recipe:Weighted", "wait": 2}},
     "train.loss.wait: tests.test_study_recipe:Weighted has no such option; it takes"),
    ({"pull": {"name": "proximal"}}, "train.pull.mu: required by proximal"),
    ({"pull": {"name": "proximal", "mu": -1.0}}, "train.pull: .*mu must be at least 0"),
    ({"augment": "rotate"}, "train.augment.name: must be one of crop, flip"),
    ({"augment": [{"name": "crop", "pad": 0}]}, "train.augment: .*pad must be at least 1"),
    ({"augment": [{"name": "flip", "rate": 0.0}]}, "train.augment: .*rate must be in"),
    ({"augment": 3}, "train.augment: "),
    ({"dropout": 1.0}, "train.dropout: "),
    ({"precision": "f16"}, "train.precision: "),
    ({"optimizer": "tests.test_study_recipe:Melted"}, "train.optimizer: .*must be a frozen value"),
]  # fmt: skip


class Melted:
    __hash__ = None  # type: ignore[assignment]

    def memory(self, like: Tensor) -> tuple[Tensor, ...]:
        return ()


@pytest.mark.parametrize(("train", "says"), REFUSED, ids=[s for _, s in REFUSED])
def test_bad_input_is_refused_in_one_line_that_names_the_place(train: dict[str, Any], says: str) -> None:
    import re

    base = {"momentum": 0.0, **({"lr": 0.1} if "lr" not in train else {})}
    assert re.search(says, refused(train={**base, **train}))


def test_bad_input_of_step_2_names_its_place() -> None:
    assert "personalise.optimizer: adam refuses" in refused(personalise={"optimizer": {"name": "adam", "eps": 0.0}})
    assert "personalise.momentum: is an option" in refused(personalise={"optimizer": "adam", "momentum": 0.5})
    assert "epochs or steps, not both" in refused(personalise={"epochs": 1, "steps": 3})
    assert "personalise.clip_norm" in refused(personalise={"clip_norm": -1.0})


def test_what_the_model_the_data_or_the_device_cannot_do_is_refused() -> None:
    for sections, says in (
        ({"train": {"dropout": 0.1}}, "train.dropout: needs a model with a dropout module, mlp has none"),
        ({"personalise": {"dropout": 0.1}}, "personalise.dropout: needs a model"),
        ({"train": {"precision": "bf16"}}, "train.precision: bf16 needs a GPU, the device is cpu"),
        ({"train": {"loss": {"name": "masked_lm", "mask_token": 0}}}, "train.loss: fails on a batch .* needs tokens"),
        ({"train": {"loss": {"name": "masked_lm", "mask_token": 9}}}, "train.loss: .* one of the 4 tokens, got 9"),
        ({"train": {"augment": "tests.test_study_recipe:Grown"}}, "train.augment: fails on a batch .*Grown must give"),
    ):
        with pytest.raises(StudyError, match=says):
            resolve(tiny.study(**sections))


class Grown:
    def __call__(self, x: Tensor, generator: np.random.Generator) -> Tensor:
        return torch.cat([x, x])


def local(round: int = 1, client: int = 0, **sections: Any) -> LocalClient:
    return LocalClient(tiny.task(**sections), client, round, "federate")


def test_todays_studies_mean_what_they_did() -> None:
    first, second = recipes(
        tiny.study(train={"momentum": 0.5, "weight_decay": 0.1}, personalise={"schedule": "cosine"})
    )
    assert first.optimizer == second.optimizer == Sgd(momentum=0.5, weight_decay=0.1)
    assert first.budget == Budget(epochs=1) and second.schedule == Cosine() and second.lr == first.lr
    assert not first.pulls and first.clip_norm is None and first.augment == ()


def test_step_2_takes_what_it_is_not_given_from_train() -> None:
    train = {
        **PLAIN, "optimizer": {"name": "adamw", "betas": [0.8, 0.9]}, "schedule": "linear", "clip_norm": 1.0,
        "augment": "flip", "pull": {"name": "proximal", "mu": 0.1}, "round_decay": 0.5,
    }  # fmt: skip
    first, second = recipes(tiny.study(train=train))
    assert first.schedule == Linear() and (second.optimizer, second.clip_norm) == (AdamW(betas=(0.8, 0.9)), 1.0)
    assert second.schedule != first.schedule and second.augment == first.augment and second.pull == Proximal(mu=0.1)
    own = {
        "optimizer": "adam", "batch_size": 4, "augment": [], "pull": {"name": "proximal", "mu": 0.0}, "steps": 7,
        "epochs": None, "loss": {"name": "cross_entropy", "label_smoothing": 0.2},
    }  # fmt: skip
    _, second = recipes(tiny.study(train={"momentum": 0.5}, personalise=own))
    assert second.optimizer == Adam() and second.batch_size == 4 and not second.pulls and second.augment == ()
    assert second.budget == Budget(steps=7) and second.loss == CrossEntropy(label_smoothing=0.2)


def test_the_rate_falls_by_round_and_step_2_starts_undecayed() -> None:
    rates = [local(round, train={"round_decay": 0.5}).recipe.lr for round in (1, 2, 3)]
    assert rates == [0.1, 0.05, 0.025]
    assert local(3, train={"round_decay": 0.5}).personal_recipe.lr == 0.1


def test_a_study_with_steps_is_read_back_as_it_was() -> None:
    made = tiny.study(**tiny.RECIPE)
    assert schema.build(parse(schema.dump(made), "dump")) == made
    assert made.personalise.steps == 4 and made.personalise.epochs is None
    assert tiny.study(train={"steps": 3}).train.epochs is None


def test_zero_in_step_2_takes_an_option_of_sgd_away() -> None:
    given = {"momentum": 0.0, "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}}
    assert recipes(tiny.study(train=given, personalise={"momentum": 0.0}))[1].optimizer == Sgd(weight_decay=0.1)
    assert recipes(tiny.study(train=given, personalise={"momentum": 0.5}))[1].optimizer == Sgd(
        momentum=0.5, weight_decay=0.1
    )
    with pytest.raises(StudyError, match="personalise.weight_decay: is an option of sgd; give adamw its own"):
        recipes(tiny.study(train={"momentum": 0.0, "optimizer": "adamw"}, personalise={"weight_decay": 0.0}))


def test_a_loss_of_step_2_is_tried_before_anything_trains() -> None:
    with pytest.raises(StudyError, match="personalise.loss: fails on a batch .*mse: outputs"):
        resolve(tiny.study(personalise={"loss": "mse"}))
    with pytest.raises(StudyError, match="personalise.loss: fails on a batch .*masked_lm needs tokens"):
        resolve(tiny.study(personalise={"loss": {"name": "masked_lm", "mask_token": 1}}))
    resolve(tiny.study(personalise={"loss": {"name": "cross_entropy", "classes": "own"}}))


def test_own_classes_are_the_clients_own() -> None:
    sections: dict[str, Any] = {
        "train": {"loss": {"name": "cross_entropy", "classes": "own"}},
        "partition": {"name": "dirichlet", "alpha": 0.05},
    }
    for client in range(4):
        one = local(client=client, **sections)
        found = tuple(sorted(set(one.train_part.y.tolist())))
        loss = one.recipe.loss
        assert loss == (CrossEntropy() if len(found) == 4 else Restricted(CrossEntropy(), found))
        assert one.task.flat_model.loss == CrossEntropy()


def test_the_rate_follows_a_schedule_over_the_rounds_of_its_phase() -> None:
    train = {"lr": 0.1, "round_schedule": {"name": "linear", "warmup": 2}, "round_decay": 0.5}
    task = tiny.task(train=train)

    def rate(round: int, rounds: int, stage: str = "federate") -> float:
        return LocalClient(task, 0, round, stage, rounds=rounds).recipe.lr

    shape = Linear(warmup=2)
    assert [rate(round, 5) for round in range(1, 6)] == [0.1 * (0.5**r * shape(r, 5)) for r in range(5)]
    assert rate(1, 3, "refine") == 0.1 * shape(0, 3), "rounds inside the tickets count anew"
    assert LocalClient(task, 0, 0, "personalise").recipe.lr == LocalClient(task, 0, 3, "x", rounds=5).personal_recipe.lr
    with pytest.raises(ValueError, match="round 2 must be one of the phase's rounds, got 0"):
        rate(2, 0)


def test_each_phase_tells_its_clients_how_many_rounds_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = dict[tuple[str, int], tuple[int, float]]()
    real = LocalClient.train

    def noted(self: LocalClient, start: Any, **more: Any) -> Any:
        seen[self.stage, self.round] = self.rounds, more["recipe"].lr
        return real(self, start, **more)

    monkeypatch.setattr(LocalClient, "train", noted)
    tiny.run(
        tiny.study(
            train={"round_schedule": {"name": "exponential", "final": 0.25}}, federate={"rounds": 3}, workers=1,
            refine={"rounds": 2, "clients_per_round": 2},
        ),
        tmp_path / "run",
    )  # fmt: skip
    assert {k: v for k, v in seen.items() if k[0] in ("federate", "refine")} == {
        ("federate", 1): (3, 0.1), ("federate", 2): (3, 0.05), ("federate", 3): (3, 0.025),
        ("refine", 1): (2, 0.1), ("refine", 2): (2, 0.025),
    }  # fmt: skip
    assert seen["personalise", 0][1] == 0.1


def test_a_round_without_a_rate_is_refused() -> None:
    for spec, says in (
        (
            {"name": "linear", "final_at": "last"},
            "must give finite numbers above 0, got 0.0 at round 2 of 2 of federate",
        ),
        ({"name": "linear", "warmup": 1, "start": 0.0}, ".* above 0, got 0.0 at round 1 of 2 of federate"),
        ({"name": "tests.test_study_recipe:Raising"}, "fails at round 1 of 2 of federate: ZeroDivisionError: x"),
    ):
        with pytest.raises(StudyError, match=f"train.round_schedule: {says}"):
            resolve(tiny.study(train={"round_schedule": spec}))


@dataclass(frozen=True)
class Raising:
    """Fails as whatever it is used for, if only when it is called."""

    def memory(self, like: Tensor) -> tuple[Tensor, ...]:
        return ()

    def __call__(self, *given: Any) -> Any:
        raise ZeroDivisionError("x")


@dataclass(frozen=True)
class Forgetful(Raising):
    def memory(self, like: Tensor) -> tuple[Tensor, ...]:
        raise KeyError("like")


@dataclass(frozen=True)
class Short(Raising):
    """Gives what is of another shape, or another value, in the place of changing what it is given."""

    def __call__(self, grad: Any, *given: Any) -> Any:
        return grad[1:] if isinstance(grad, Tensor) else float("nan")


@dataclass(frozen=True)
class Masked(Raising):
    """Fails where everything may move."""

    def __call__(self, grad: Tensor, weights: Tensor, memory: Any, step: int, free: Any) -> Tensor:
        return grad * free


FAILING = [
    ("optimizer", "Raising", "train.optimizer: fails on gradients .* at step 1: ZeroDivisionError: x"),
    ("optimizer", "Forgetful", "train.optimizer: memory fails: KeyError: 'like'"),
    ("optimizer", "Masked", "train.optimizer: fails on gradients .* at step 1: TypeError"),
    ("optimizer", "Short", r"train.optimizer: must return a direction \(832,\), got \(831,\)"),
    ("schedule", "Raising", "train.schedule: fails at step 0 of 3: ZeroDivisionError: x"),
    ("schedule", "Short", "train.schedule: must give finite numbers, got nan at step 0 of 3"),
    ("pull", "Raising", r"train.pull: fails on weights \(\d+,\): ZeroDivisionError: x"),
    ("pull", "Short", "train.pull: must change the gradient in place, got Tensor returned"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "says"), FAILING, ids=[f"{kind} {name}" for kind, name, _ in FAILING])
def test_a_users_part_that_fails_is_named_before_anything_trains(kind: str, name: str, says: str) -> None:
    part = {kind: f"tests.test_study_recipe:{name}"}
    with pytest.raises(StudyError, match=says):
        resolve(tiny.study(train={**PLAIN, **part}))
    with pytest.raises(StudyError, match=says.replace("train.", "personalise.", 1)):
        resolve(tiny.study(train=PLAIN, personalise=part))


def powers(outputs: Tensor, y: Tensor, scale: float, *, power: float = 1.0) -> Tensor:
    return scale * functional.cross_entropy(outputs, y) ** power


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ({"name": "torch.nn.functional:cross_entropy", "label_smoothing": 0.1}, CrossEntropy(label_smoothing=0.1)),
        ({"name": "tests.test_study_recipe:powers", "scale": 2.0, "power": 2},
         lambda outputs, y: 2 * CrossEntropy()(outputs, y) ** 2),
    ],
)  # fmt: skip
def test_the_options_of_a_users_function_act(spec: dict[str, Any], wanted: Any, tmp_path: Path) -> None:
    made = tiny.study(train={"loss": spec}, method={"name": "fedavg"})
    loss = recipes(made)[0].loss
    assert hash(loss) == hash(recipes(made)[0].loss)
    outputs, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 3])
    torch.testing.assert_close(loss(outputs, y), wanted(outputs, y))
    assert (loss(outputs, y) - CrossEntropy()(outputs, y)).abs() > 1e-3
    resolve(made)


SIZES = list[int]()


class Weighted:
    """A loss with a row for every class, which would not fit where the number is made up."""

    def __init__(self, num_classes: int, weight: float = 1.0) -> None:
        SIZES.append(num_classes)

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, y)


def test_a_loss_is_given_the_number_of_classes_and_no_other() -> None:
    SIZES.clear()
    made = tiny.study(train={"loss": "tests.test_study_recipe:Weighted"})
    with pytest.raises(TypeError, match="needs the number of classes"):
        recipes(made)[0].loss(torch.zeros(1, 4), torch.zeros(1))
    read(made)
    assert not SIZES
    forecast(made)
    assert set(SIZES) == {4}


def squares(outputs: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(outputs, functional.one_hot(y, outputs.shape[-1]).float())


def test_a_users_function_is_a_loss(tmp_path: Path) -> None:
    made = tiny.study(train={"loss": "tests.test_study_recipe:squares"}, method={"name": "fedavg_ft"})
    assert recipes(made)[0].loss == OfBatch(squares)
    assert tiny.run(made, tmp_path / "run").root.exists()


@pytest.mark.parametrize("method", ["two_step", "fedselect", "fedpm", "sub_fedavg", "lotteryfl"])
def test_a_budget_of_steps_is_one_of_epochs_where_whole(method: str, tmp_path: Path) -> None:
    """48 examples in batches of 16: three steps an epoch."""
    ran = {}
    for name, length in (("epochs", {"epochs": 2}), ("steps", {"steps": 6, "epochs": None})):
        made = tiny.of_method(method, train=length, personalise=length)
        assert made.train.batch_size == 16
        tiny.run(made, tmp_path / name)
        ran[name] = tiny.facts(tmp_path / name)
        assert step2_epochs(tiny.experiment(made)) == pytest.approx(step2_epochs(tiny.experiment(
            tiny.of_method(method, train={"epochs": 2}, personalise={"epochs": 2})
        )))  # fmt: skip
    assert ran["steps"] == ran["epochs"]


def test_flops_and_epochs_of_steps_count_what_was_seen() -> None:
    one = local(train={"steps": 4, "epochs": None, "batch_size": 20})  # 48: 20 + 20 + 8, then 20
    one.train(one.task.theta_0, recipe=one.recipe)
    (cost,) = one.log
    assert cost.steps == 4 and cost.epochs == Fraction(4, 3)
    assert cost.flops == one.flops(one.full, 68)[0] == 3 * 68 * one.task.model.flops[""]


IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("local", {"train": {"steps": 3}}, "train.steps: has no effect, method local has no rounds"),
    ("local", {"train": {"round_decay": 0.9}}, "train.round_decay: has no effect, method local has no rounds"),
    ("local", {"train": {"clip_norm": 1.0}, "personalise": {"clip_norm": 2.0}},
     "train.clip_norm: has no effect, every training takes personalise.clip_norm"),
    ("fedavg", {"personalise": {"optimizer": "adam", "clip_norm": 1.0}},
     "personalise.optimizer, personalise.clip_norm: have no effect, no arm of method fedavg trains"),
    ("fedpm", {"train": {"clip_norm": 1.0}, "personalise": {"arms": ["own_tuned"]}},
     "train.clip_norm: has no effect, no arm of method fedpm trains weights"),
    ("fedavg", {"personalise": {"steps": 3, "epochs": None}},
     "personalise.steps: has no effect, no arm of method fedavg trains"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "sections", "says"), IDLE, ids=[s for _, _, s in IDLE])
def test_an_option_without_effect_is_said(method: str, sections: dict[str, Any], says: str) -> None:
    tree = {"method": {"name": method, **tiny.METHODS[method]}, "clients": {"count": 8}, **sections}
    assert says in read(schema.build(tree))[1]


def test_the_forecast_says_which_backend_trains_and_why() -> None:
    pytest.importorskip("numba")
    text = forecast(tiny.study(compute="sparse", personalise={"optimizer": "adam"}))
    assert "step 1: dense trainings run in the kernel" in text
    assert "step 2: dense trainings run in torch, client by client, because the kernel has no Adam" in text
    text = forecast(tiny.study(train={**PLAIN, "optimizer": "adamw"}, compute="auto"))
    assert "compute: tuned, because the kernel has no AdamW" in text
    text = forecast(tiny.study(**tiny.RECIPE))
    assert "step 1: dense trainings run in torch, client by client\n" in text
    made = tiny.study(train={**PLAIN, "optimizer": "adamw"}, cohort=2, workers=1)
    assert "step 2: trainings run in cohorts" in forecast(made)


def module(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Embedding(num_classes, 8), nn.Linear(8, num_classes))


def texts() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    x = draw.integers(1, 9, (60, 1)) + np.arange(6) % 2
    return {
        "name": "texts", "x_train": x, "y_train": x, "x_test": x[:20], "y_test": x[:20], "num_classes": 11,
    }  # fmt: skip


def test_masked_tokens_are_learned_in_a_federation(tmp_path: Path) -> None:
    made = tiny.study(
        data={"name": "tests.test_study_recipe:texts"}, model={"name": "tests.test_study_recipe:module", "options": {}},
        train={"loss": {"name": "masked_lm", "mask_token": 10}, "lr": 0.5}, clients={"count": 4, "test_samples": 4},
    )  # fmt: skip
    run = tiny.run(made, tmp_path / "run")
    losses = [row["test_loss"] for row in tiny.rows(run.root, "metrics")]
    assert losses and np.isfinite(losses).all() and min(losses) > 0
