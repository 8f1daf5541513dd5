"""Every metric against its formula written out, filled in one batch and in many; values where it is undefined."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.personalization.personalise import row_of
from fedlth.personalization.step2 import Result
from fedlth.training.local_client import LocalClient
from fedlth.training.loss import MeanSquaredError, OfBatch, takes_logits
from fedlth.training.metrics import METRICS, OfAll, constant_outputs, counted, guessed, judged, metric_of, rows
from tests import tiny

LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [1.0, 4.0, 0.0], [0.5, 0.0, 0.2]])
CLASSES = torch.tensor([0, 2, 0, 1])  # guessed 0, 2, 1, 0
OUTPUTS, NUMBERS = torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([1.5, 2.0, 3.0, 5.0])


def value(name: str, outputs: Tensor, y: Tensor, size: int = 4) -> float:
    metric, state = METRICS[name], None
    for at in range(0, len(y), size):
        state = metric.add(state, outputs[at : at + size], y[at : at + size])
    return metric.value(state)


def r2(o: np.ndarray, y: np.ndarray) -> float:
    return float(1 - ((o - y) ** 2).sum() / ((y - y.mean()) ** 2).sum())


REFERENCE: dict[str, Callable[[], float]] = {
    "accuracy": lambda: 2 / 4,
    "balanced_accuracy": lambda: (1 / 2 + 0 / 1 + 1 / 1) / 3,
    "macro_f1": lambda: (2 * 1 / (2 + 2) + 0.0 + 2 * 1 / (1 + 1)) / 3,
    "majority": lambda: 2 / 4,
    "perplexity": lambda: float(
        np.exp(np.mean([-math.log(math.exp(z[c]) / sum(map(math.exp, z)))
                        for z, c in zip(LOGITS.tolist(), CLASSES.tolist(), strict=True)]))
    ),
    "mse": lambda: (0.25 + 0 + 1 + 4) / 4,
    "rmse": lambda: math.sqrt(5.25 / 4),
    "mae": lambda: (0.5 + 0 + 1 + 2) / 4,
    "r2": lambda: r2(OUTPUTS.numpy(), NUMBERS.numpy()),
    "pearson": lambda: float(np.corrcoef(OUTPUTS.numpy(), NUMBERS.numpy())[0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("name", REFERENCE)
def test_four_examples_by_hand(name: str, size: int) -> None:
    classes = "classes" in METRICS[name].fits
    given = (LOGITS, CLASSES) if classes else (OUTPUTS, NUMBERS)
    assert value(name, *given, size=size) == pytest.approx(REFERENCE[name](), rel=1e-6)


def test_every_metric_has_a_reference() -> None:
    assert REFERENCE.keys() == METRICS.keys() - {"loss"}


def test_several_outputs_are_averaged() -> None:
    o, y = torch.stack([OUTPUTS, NUMBERS], 1), torch.stack([NUMBERS, OUTPUTS], 1)
    ours = [r2(a, b) for a, b in ((OUTPUTS.numpy(), NUMBERS.numpy()), (NUMBERS.numpy(), OUTPUTS.numpy()))]
    assert value("r2", o, y, size=3) == pytest.approx(np.mean(ours), rel=1e-6)
    assert value("mse", o, y) == value("mse", OUTPUTS, NUMBERS)


def test_a_large_mean_costs_no_digits() -> None:
    far = torch.tensor([1e6 + k for k in (0.0, 1.0, 2.0, 4.0)])
    assert value("pearson", far, far, size=1) == 1 and value("r2", far, far, size=1) == 1


def test_what_is_undefined_has_a_value() -> None:
    one_class = torch.zeros(4, dtype=torch.int64)
    assert value("balanced_accuracy", LOGITS, one_class) == value("accuracy", LOGITS, one_class) == 0.5
    same = torch.full((4,), 0.1)
    assert value("r2", OUTPUTS, same, size=3) == 0 and value("r2", same, same, size=3) == 1
    assert value("pearson", OUTPUTS, same, size=1) == value("pearson", same, OUTPUTS, size=1) == 0
    assert value("perplexity", torch.tensor([[0.0, 1e4]]), torch.tensor([0])) == pytest.approx(1e30)


def test_rows_lay_positions_out_and_leave_ignored_ones() -> None:
    y = torch.tensor([[0, -100, 1], [-100, 2, -100]])
    outputs, told = rows(torch.arange(18.0).reshape(2, 3, 3), y)
    assert told.tolist() == [0, 1, 2] and outputs[:, 0].tolist() == [0, 6, 12] and counted(y).tolist() == [2, 1]
    assert rows(torch.zeros(4, 1), NUMBERS)[0].shape == (4,)


def test_defaults_and_what_is_always_there() -> None:
    assert judged(None, (), "classes").main.name == "accuracy" and judged(None, ("mae",), "numbers").named == (
        "mse",
        "mae",
    )
    found = judged("macro_f1", ("accuracy", "loss", "macro_f1"), "positions")
    assert [m.name for m in found.all] == ["accuracy", "macro_f1", "loss"] and found.named == ("macro_f1",)
    assert judged("mse", (), "numbers").score(2.0) == -2.0
    assert judged(None, ("majority",), "classes").named == ("majority",)
    with pytest.raises(StudyError, match="metric must be what a model decides"):
        judged("majority", (), "classes")


def test_a_users_metric_sees_everything_at_once() -> None:
    metric = metric_of("tests.own_tasks:hits", "metric", "classes")
    assert isinstance(metric, OfAll) and metric.higher_is_better
    state = None
    for i in range(4):
        state = metric.add(state, LOGITS[i : i + 1], CLASSES[i : i + 1])
    assert metric.value(state) == 2.0
    assert not metric_of("tests.own_tasks:WorstError", "metric", "numbers").higher_is_better


def with_logits(outputs: Tensor, y: Tensor) -> Tensor:
    """A user's own loss that says nothing of what it takes."""
    return functional.binary_cross_entropy_with_logits(2 * outputs, y)


def test_a_loss_is_asked_whether_it_takes_logits() -> None:
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    logits: list[Any] = [functional.binary_cross_entropy_with_logits, with_logits]
    others: list[Any] = [functional.binary_cross_entropy, functional.l1_loss, functional.smooth_l1_loss]
    others += [functional.mse_loss, functional.poisson_nll_loss]
    assert [takes_logits(OfBatch(one), y) for one in logits] == [True, True]
    assert [takes_logits(OfBatch(one), y) for one in others] == [False] * 5
    assert takes_logits(OfBatch(logits[0]), y[:, 0]) and not takes_logits(OfBatch(logits[0]), 2 * y)
    assert not takes_logits(MeanSquaredError(), y[:1])


def test_the_guess_of_several_labels_is_a_logit_where_the_loss_takes_one() -> None:
    """By hand: labels of shares 0.01, 0.5 and none; a constant 0.01 as a logit would have cost 0.69."""
    y = torch.zeros(100, 3)
    y[0, 0], y[:50, 1] = 1, 1
    positive = OfAll("positive", lambda outputs, y: float((outputs[:, 0] > 0).float().mean()), True, False)
    loss = OfBatch(functional.binary_cross_entropy_with_logits)
    outputs = constant_outputs(y, loss)
    assert torch.sigmoid(outputs).tolist() == pytest.approx([0.01, 0.5, 0.005], rel=1e-5)
    found = guessed(Examples(torch.zeros(100, 1), y), [METRICS["loss"], positive, METRICS["mse"]], 3, outputs, loss)
    entropy = [-0.01 * math.log(0.01) - 0.99 * math.log(0.99), math.log(2), -math.log(0.995)]
    assert entropy[0] == pytest.approx(0.056, abs=1e-4)
    assert found.loss == found.metrics["loss"] == pytest.approx(sum(entropy) / 3, rel=1e-5)
    assert found.metrics["positive"] == 0, "the label that one example in a hundred has is not told of all"
    for taken in (MeanSquaredError(), OfBatch(functional.binary_cross_entropy)):
        assert torch.equal(constant_outputs(y, taken), y.mean(0))


def test_an_arm_that_diverged_is_charged_that_guess() -> None:
    made = tiny.study(
        data={"name": "tests.training.test_study_metrics:labels"}, partition={"name": "iid"}, metric="mae",
        train={"loss": {"name": "torch.nn.functional:binary_cross_entropy_with_logits"}}, finder={"densities": [0.5]},
    )  # fmt: skip
    local = LocalClient(tiny.experiment(made).task, 0, 1, "personalise")
    row = row_of(local, Result(arm="dense", params=local.task.theta_0, mask=local.full, diverged=True))
    share = local.train_part.y.mean(0).clamp(0.5 / local.num_train, 1 - 0.5 / local.num_train)
    test = local.task.part(0, "test").y
    wanted = functional.binary_cross_entropy(share.expand(test.shape), test)
    assert row.diverged and row.test_loss == pytest.approx(float(wanted), rel=1e-5)


def labels() -> dict[str, object]:
    """Return the tiny images with three labels each, one of them rare."""
    made = tiny.images()
    made.pop("num_classes")
    draw = np.random.default_rng(0)
    for part in ("y_train", "y_test"):
        made[part] = (draw.random((len(made[part]), 3)) < (0.02, 0.3, 0.9)).astype(np.float32)
    return made
