"""A laboratory training: rates, batches, optimisers, early stop, what is kept on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.lab import runner
from fedlth.lab.attack import attacked, evaluate_attacked
from fedlth.lab.bench import Bench
from fedlth.lab.study import Train
from fedlth.lab.train_config import TrainConfig
from fedlth.lab.training import Point, Run, batches, packed, unpacked
from fedlth.models.layout import Params
from fedlth.rng import stream
from fedlth.training.evaluation import gradient
from tests import tiny as federated
from tests.lab import tiny_lottery as tiny
from tests.training.test_recipe import OPTIMIZERS


def test_rates_warm_up_then_fall_at_milestones() -> None:
    config = TrainConfig(train=Train(iterations=100, lr=1.0, warmup=10, warmup_lr=0.1, milestones=(0.5, 0.75)))
    assert config.rate(0) == pytest.approx(0.1 + 0.9 / 10)
    assert config.rate(9) == config.rate(10) == config.rate(49) == pytest.approx(1.0)
    assert config.rate(50) == pytest.approx(0.1) and config.rate(99) == pytest.approx(0.01)
    assert replace(config, constant_lr=True).rate(0) == pytest.approx(0.01)
    assert TrainConfig(train=Train(iterations=100, schedule="cosine")).rate(99) == pytest.approx(0.001)


def test_a_training_from_step_k_has_the_batches_of_step_k() -> None:
    whole = TrainConfig(train=Train(iterations=30, batch_size=7))
    late = batches(40, replace(whole, first=12), stream(0, "order"))
    for one, other in zip(batches(40, whole, stream(0, "order"))[12:], late, strict=True):
        assert np.array_equal(one, other)
    first = np.concatenate(batches(40, whole, stream(0, "order")))[:40]
    assert np.array_equal(np.sort(first), np.arange(40))  # an epoch has every example once


def test_two_halves_are_the_whole() -> None:
    bench = tiny.bench()
    config = bench.train_config()
    whole = bench.trained(bench.theta_0, bench.full, config)
    half = bench.trained(bench.theta_0, bench.full, replace(config, last=10))
    rest = bench.trained(half.final, bench.full, replace(config, first=10))
    assert rest.final.digest() == whole.final.digest()
    assert half.curve + rest.curve == whole.curve


@pytest.mark.parametrize("train", [{"optimiser": "adam", "lr": 0.01}, {"momentum": 0.9, "weight_decay": 1e-3}])
def test_torch_and_ours_take_the_same_steps(train: dict[str, float]) -> None:
    bench = tiny.bench()
    config = replace(bench.train_config({**train, "dropout": 1e-12}), last=5)  # dropout: the plain torch way
    ours = bench.trained(bench.theta_0, bench.full, config).final
    module, layout = bench.model.module(), bench.layout
    named = dict(module.named_parameters())
    with torch.no_grad():
        for e in layout.floats:
            named[e.name].copy_(torch.from_numpy(bench.theta_0.floats[e.slice].reshape(e.shape)))
    t = config.train
    if t.optimiser == "adam":
        optimiser: torch.optim.Optimizer = torch.optim.Adam(module.parameters(), lr=t.lr)
    else:
        optimiser = torch.optim.SGD(module.parameters(), lr=t.lr, momentum=t.momentum, weight_decay=t.weight_decay)
    x, y = bench.parts["train"].tensor, bench.parts["train"].y
    for part in batches(len(y), config, stream(bench.seed, "order")):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(module(x[part]), y[part]).backward()
        optimiser.step()
    for e in layout.floats:
        got, wanted = ours.floats[e.slice], named[e.name].detach().reshape(-1).numpy()
        np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("train", [{"optimiser": "adam"}, {"momentum": 0.9, "dropout": 0.3}, {"momentum": 0.9}])
def test_the_dead_stay_dead_under_every_optimiser(train: dict[str, object]) -> None:
    bench = tiny.bench()
    mask = bench.rng("mask").random(bench.layout.num_prunable) < 0.3
    end = bench.trained(bench.theta_0, mask, bench.train_config(train)).final
    assert not end.floats[: mask.size][~mask].any()
    assert (end.floats[: mask.size][mask] != bench.theta_0.floats[: mask.size][mask]).any()


@pytest.mark.parametrize("free", [False, True], ids=["zero", "frozen"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_what_is_pruned_stays_as_it_was_under_a_users_optimiser(optimizer: Any, free: bool) -> None:
    bench, kind = tiny.bench(), type(optimizer)
    spec = {"name": f"{kind.__module__}:{kind.__qualname__}", **asdict(optimizer)}
    config = bench.train_config(
        {"optimiser": spec, "lr": 0.01, "clip_norm": 0.5, "pull": {"name": "l1", "strength": 0.1}}
    )
    mask = bench.rng("mask").random(bench.layout.num_prunable) < 0.3
    begun = bench.theta_0 if free else bench.theta_0.masked(mask)
    end = bench.trained(bench.theta_0, mask, config, free=free).final.floats[: mask.size]
    np.testing.assert_array_equal(end[~mask], begun.floats[: mask.size][~mask])
    assert (end[mask] != begun.floats[: mask.size][mask]).mean() > 0.9


@dataclass(frozen=True)
class Raising:
    def memory(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()

    def __call__(self, *given: object) -> torch.Tensor:
        raise ZeroDivisionError("x")


def fields() -> dict[str, Any]:
    made = federated.images()
    return {**made, "mean": (), "std": (), **{f"x_{p}": {"a": made[f"x_{p}"], "b": made[f"x_{p}"]} for p in PARTS}}


def numbers() -> dict[str, Any]:
    made = federated.images()
    return {**made, "num_classes": 1, **{f"y_{part}": made[f"y_{part}"].astype(float) for part in PARTS}}


PARTS, HERE = ("train", "test"), "tests.lab.test_lottery_training"
FAILS: list[tuple[dict[str, Any], str]] = [
    ({"train": {"optimiser": f"{HERE}:Raising"}}, "searches.imp.train.optimizer: fails on .*ZeroDivisionError: x"),
    ({"train": {"schedule": f"{HERE}:Raising"}}, "searches.imp.train.schedule: fails at iteration 0: ZeroDivision"),
    ({"train": {"pull": f"{HERE}:Raising"}}, "searches.imp.train.pull: fails on weights .*ZeroDivisionError: x"),
    ({"data": f"{HERE}:numbers"}, "data: must have classes in the laboratory, .*, got real-number targets"),
    ({"data": f"{HERE}:fields"}, r"data: must be one array of inputs in the laboratory, got the fields \['a', 'b'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "says"), FAILS, ids=[says[:30] for _, says in FAILS])
def test_what_the_laboratory_cannot_do_is_said_by_its_check(sections: dict[str, Any], says: str) -> None:
    base = tiny.tree()
    if "train" in sections:
        sections = {"train": {**base["train"], **sections["train"]}}
    if "data" in sections:
        sections = {"data": {"name": sections["data"], "validation": 60}}
    with pytest.raises(StudyError, match=says):
        runner.check(tiny.made(**sections))


def test_the_early_stop_is_the_first_least_loss() -> None:
    nothing = Params(np.zeros(1, np.float32), np.zeros(0, np.int64))
    curve = tuple(Point(i, loss, 0.5) for i, loss in ((10, 0.9), (20, 0.4), (30, 0.4), (40, 0.7)))
    assert Run(nothing, nothing, curve, 0.0, 0.0).early_stop.iteration == 20


@pytest.mark.parametrize("masked", [True, False])
def test_what_is_kept_on_disk_comes_back(masked: bool) -> None:
    bench = tiny.bench()
    mask = bench.rng("mask").random(bench.layout.num_prunable) < 0.2 if masked else bench.full
    run = bench.trained(bench.theta_0, mask, bench.train_config(), window=2)
    back = unpacked(packed(run, mask), bench.theta_0, mask)
    assert back.final.digest() == run.final.digest() and back.best.digest() == run.best.digest()
    assert (back.curve, back.test, back.test_final) == (run.curve, run.test, run.test_final)
    assert len(back.previous) == 2
    assert all(np.array_equal(a, b) for a, b in zip(back.previous, run.previous, strict=True))


def test_a_training_is_done_once(tmp_path: Path) -> None:
    bench = tiny.bench(tmp_path)
    one = bench.trained(bench.theta_0, bench.full, bench.train_config())
    assert len(list((tmp_path / "trainings").iterdir())) == 1
    assert bench.trained(bench.theta_0, bench.full, bench.train_config()).final.digest() == one.final.digest()
    bench.trained(bench.theta_0, bench.full, bench.train_config({"lr": 0.2}))
    assert len(list((tmp_path / "trainings").iterdir())) == 2


def test_a_diverging_training_ends_where_it_was_numbers_last(tmp_path: Path) -> None:
    """Row 10: it was an error, and ended the whole study."""
    bench = tiny.bench(tmp_path)
    config = bench.train_config({"lr": 1e30, "evaluate_every": 1})
    for run in (bench.trained(bench.theta_0, bench.full, config) for _ in range(2)):  # done, then read back
        assert run.diverged and np.isfinite(run.final.floats).all()
        assert run.curve[-1].iteration < config.end and all(np.isfinite(p.loss) for p in run.curve)
    assert len(bench.diverged) == 2 and not bench.trained(bench.theta_0, bench.full, bench.train_config()).diverged


def test_glorot_has_its_variance_and_no_bias() -> None:
    bench = tiny.bench(model={"name": "lenet300", "init": "glorot_normal"})
    for e in bench.layout.floats:
        values = bench.theta_0.floats[e.slice]
        if len(e.shape) == 1:
            assert not values.any()
        elif e.size > 1000:
            assert values.std() == pytest.approx((2 / sum(e.shape)) ** 0.5, rel=0.1)


def normed(**train: object) -> Bench:
    return tiny.bench(
        model={"name": "tests.test_finders:Normed", "prunable": ["conv*.weight"]},
        train={"iterations": 20, "batch_size": 16, "lr": 0.1, "evaluate_every": 5, **train},
    )


def test_an_l1_penalty_on_norm_scales_acts_and_on_nothing_else_at_the_first_step() -> None:
    plain, pulled = normed(), normed(norm_l1=0.5)
    configs = [replace(bench.train_config(), last=1) for bench in (plain, pulled)]
    ends = [b.trained(b.theta_0, b.full, r).final.floats for b, r in zip((plain, pulled), configs, strict=True)]
    for e in plain.layout.floats:
        moved = ends[0][e.slice] - ends[1][e.slice]
        if e.norm and e.role == "param" and e.name.endswith("weight"):
            np.testing.assert_allclose(moved, 0.1 * 0.5, rtol=1e-4)  # lr x penalty x sign of a scale that is 1
        else:
            assert np.abs(moved).max() < 1e-5, e.name
    scale = next(e for e in plain.layout.floats if e.norm and e.name.endswith("weight"))
    long = [b.trained(b.theta_0, b.full, b.train_config()).final.floats[scale.slice] for b in (plain, pulled)]
    assert np.abs(long[1]).mean() < np.abs(long[0]).mean() - 0.2


def test_dropout_acts_while_training_and_only_then() -> None:
    bench = tiny.bench()
    plain, dropped = (bench.trained(bench.theta_0, bench.full, bench.train_config({"dropout": p})) for p in (0.0, 0.5))
    assert plain.final.digest() != dropped.final.digest()
    assert dropped.test_final == bench.accuracy(dropped.final), "evaluated without"
    again = bench.trained(bench.theta_0, bench.full, bench.train_config({"dropout": 0.5}))
    assert again.final.digest() == dropped.final.digest()


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_a_step_on_attacked_images_is_a_step_on_those_images(kind: str) -> None:
    bench = tiny.bench()
    config = bench.train_config({"attack": kind, "attack_eps": 0.1, "attack_steps": 3})
    one = bench.trained(bench.theta_0, bench.full, replace(config, last=1))
    (part,) = batches(len(bench.parts["train"]), replace(config, last=1), stream(bench.seed, "order"))
    batch = bench.parts["train"].batch(torch.from_numpy(part))
    x, y = batch.tensor, batch.y
    bench.flat_model.load(bench.theta_0)
    moved = attacked(bench.flat_model, bench.dataset, x, y, kind=kind, eps=0.1, steps=3)
    assert not torch.equal(moved, x)
    slope = gradient(bench.flat_model, bench.theta_0, Examples(moved, y))
    size = bench.layout.num_prunable
    np.testing.assert_allclose(one.final.floats[:size], bench.theta_0.floats[:size] - 0.1 * slope, atol=1e-6)
    told = evaluate_attacked(
        bench.flat_model, bench.dataset, one.final, bench.parts["validation"], kind="pgd", eps=0.1, steps=3
    )
    assert one.curve[-1].accuracy == told[0], "validation is on PGD's images, whatever it trained on"


RECIPE = {
    "optimiser": {"name": "adamw", "weight_decay": 0.1, "eps": 1e-4}, "lr": 0.01, "clip_norm": 0.5,
    "schedule": {"name": "linear", "warmup": 0.2}, "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("start", [0, 5])
def test_a_whole_recipe_takes_torchs_steps(start: int) -> None:
    bench = tiny.bench()
    config = replace(bench.train_config(RECIPE), first=start, last=start + 8)
    ours = bench.trained(bench.theta_0, bench.full, config).final
    module, layout = bench.model.module(), bench.layout
    named = dict(module.named_parameters())
    with torch.no_grad():
        for e in layout.floats:
            named[e.name].copy_(torch.from_numpy(bench.theta_0.floats[e.slice].reshape(e.shape)))
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1, eps=1e-4)
    x, y = bench.parts["train"].tensor, bench.parts["train"].y
    for step, part in enumerate(batches(len(y), config, stream(bench.seed, "order")), start):
        optimiser.param_groups[0]["lr"] = 0.01 * ((step + 1) / 5 if step < 4 else (20 - step) / 16)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(module(x[part]), y[part], label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimiser.step()
    for e in layout.floats:
        np.testing.assert_allclose(ours.floats[e.slice], named[e.name].detach().reshape(-1).numpy(), atol=2e-6)


@pytest.mark.parametrize(
    "change", [{"augment": "flip"}, {"pull": {"name": "proximal", "mu": 1.0}}, {"clip_norm": 0.01}]
)
def test_each_part_of_a_recipe_changes_a_training_and_its_name(change: dict[str, object]) -> None:
    bench = tiny.bench()
    plain, other = bench.train_config(), bench.train_config(change)
    assert plain.text() != other.text()
    one, two = (bench.trained(bench.theta_0, bench.full, config).final for config in (plain, other))
    assert one.digest() != two.digest()
    half = bench.trained(bench.theta_0, bench.full, replace(other, last=10)).final
    if "pull" not in change:
        rest = bench.trained(half, bench.full, replace(other, first=10)).final
        assert rest.digest() == two.digest(), "a training that goes on sees what the whole one sees"


def test_keys_that_came_later_do_not_rename_what_a_folder_holds() -> None:
    text = TrainConfig(train=Train()).text()
    assert not any(f'"{key}"' in text for key in ("clip_norm", "loss", "pull", "augment"))
    assert '"optimiser": "sgd"' in text and '"schedule": "constant"' in text


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"optimiser": "adamm"}, "train.optimizer.name: must be one of"),
        ({"optimiser": {"name": "adamw"}, "momentum": 0.9}, "train.momentum must be given once"),
        ({"schedule": {"name": "linear", "warmup": 2.0}}, "train.schedule: .*warmup must be"),
        ({"loss": "hinge"}, "train.loss.name: must be one of"),
        ({"pull": "elastic"}, "train.pull.name: must be one of"),
        ({"augment": {"name": "crop", "pad": 0}}, "train.augment: .*pad must be"),
        ({"clip_norm": 0.0}, "train.clip_norm: "),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_bad_part_of_a_recipe_names_its_place(train: dict[str, object], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        runner.check(tiny.made(train={"iterations": 20, "batch_size": 16, "lr": 0.1, **train}))
