"""Every control acts, and changes nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlth.errors import StudyError
from fedlth.lab import arms
from fedlth.lab.bench import Bench
from fedlth.lab.controls import MASKS
from fedlth.lab.search import Round, rounds
from fedlth.lab.train_config import TrainConfig
from fedlth.models.layout import Params
from tests.lab import tiny_lottery as tiny


def seen(monkeypatch: pytest.MonkeyPatch, **arm: object) -> tuple[Bench, Round, Params, np.ndarray, TrainConfig, bool]:
    """Return what an arm hands to its training, beside the round whose mask it wears."""
    bench = tiny.bench(arms={"arm": {"of": "imp", "rounds": [2], **arm}})
    one = next(r for r in rounds(bench, "imp") if r.number == 2)
    told: list[tuple[Params, np.ndarray, TrainConfig, bool]] = []
    real = Bench.trained

    def trained(
        self: Bench, start: Params, mask: np.ndarray, config: TrainConfig, *, free: bool = False, **named: object
    ):
        told.append((start, mask, config, free))
        return real(self, start, mask, config, free=free)

    monkeypatch.setattr(Bench, "trained", trained)
    arms.controlled(bench, "arm", one)
    return (bench, one, *told[-1])


def alive(params: Params, mask: np.ndarray) -> np.ndarray:
    return params.floats[: mask.size][mask]


def counts(bench: Bench, mask: np.ndarray) -> list[int]:
    return [int(mask[e.slice].sum()) for e in bench.layout.prunable]


def test_the_plain_arm_is_the_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, one, start, mask, config, free = seen(monkeypatch)
    assert np.array_equal(mask, one.mask)
    assert np.array_equal(start.floats, one.start.floats)
    assert (config, free) == (bench.train_config(), False)
    assert bench.trained(start, mask, config).final.digest() == one.run.final.digest()


def test_reinit_changes_every_weight_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, one, start, mask, config, _ = seen(monkeypatch, start="reinit")
    assert np.array_equal(mask, one.mask) and config == bench.train_config()
    assert (alive(start, mask) != alive(bench.theta_0, mask)).all()


@pytest.mark.parametrize("name", ["shuffle", "random"])
def test_a_mask_control_keeps_counts_and_theta_0(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    bench, one, start, mask, config, _ = seen(monkeypatch, mask=name)
    assert not np.array_equal(mask, one.mask)
    assert mask.sum() == one.mask.sum() and config == bench.train_config()
    assert np.array_equal(alive(start, mask), alive(bench.theta_0, mask))
    assert not start.floats[: mask.size][~mask].any()
    if name == "shuffle":
        assert counts(bench, mask) == counts(bench, one.mask)


def test_noise_moves_survivors_by_so_many_sigmas(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, _, start, mask, _, _ = seen(monkeypatch, start={"name": "noise", "sigmas": 2.0})
    for e in bench.layout.prunable[:1]:
        here = mask[e.slice]
        moved = (start.floats[e.slice] - bench.theta_0.floats[e.slice])[here]
        assert 1.6 < moved.std() / bench.theta_0.floats[e.slice].std() < 2.4
    assert np.array_equal(start.floats[mask.size :], bench.theta_0.floats[mask.size :])


def test_dead_weights_at_init_stay_there_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, one, start, mask, config, free = seen(monkeypatch, dead="init")
    assert free and np.array_equal(mask, one.mask)
    assert np.array_equal(start.floats, bench.theta_0.floats)
    end = bench.trained(start, mask, config, free=True).final
    assert np.array_equal(end.floats[: mask.size][~mask], bench.theta_0.floats[: mask.size][~mask])
    assert (alive(end, mask) != alive(start, mask)).mean() > 0.9


def test_a_late_start_goes_on_where_the_dense_training_was(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, _, start, mask, config, _ = seen(monkeypatch, start={"name": "step", "step": 10})
    dense = bench.trained(bench.theta_0, bench.full, replace(bench.train_config(), last=10)).final
    assert np.array_equal(start.floats, dense.masked(mask).floats)
    assert config.first == 10


@pytest.mark.parametrize(("start", "constant"), [("lr", False), ("none", True)])
def test_an_arm_goes_on_from_the_weights_that_were_scored(
    monkeypatch: pytest.MonkeyPatch, start: str, constant: bool
) -> None:
    bench, one, began, mask, config, _ = seen(monkeypatch, start=start)
    assert np.array_equal(mask, one.mask) and config == replace(bench.train_config(), constant_lr=constant)
    assert np.array_equal(began.floats, one.before.masked(mask).floats)
    assert (alive(began, mask) != alive(bench.theta_0, mask)).mean() > 0.9


@pytest.mark.parametrize("name", ["shuffle", "random"])
def test_a_control_of_a_mask_of_rows_moves_whole_rows(name: str) -> None:
    search = {"densities": [0.5], "granularity": "row", "scope": "layerwise", "schedule": "one_shot"}
    bench = tiny.bench(searches={"imp": search}, arms={"arm": {"of": "imp", "mask": name}})
    one = list(rounds(bench, "imp"))[1]
    mask, _ = arms.controlled(bench, "arm", one)
    assert not np.array_equal(mask, one.mask)
    kept = []
    for e in bench.layout.prunable:
        whole = mask[e.slice].reshape(e.shape[0], -1)
        assert (whole.all(axis=1) | ~whole.any(axis=1)).all(), "a row stays or goes as one"
        kept.append(int(whole.any(axis=1).sum()))
    wanted = [int(one.mask[e.slice].reshape(e.shape[0], -1).any(axis=1).sum()) for e in bench.layout.prunable]
    assert sum(kept) == sum(wanted) and (kept == wanted or name == "random")


def test_an_arm_trains_its_own_way_and_only_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, one, start, mask, config, _ = seen(monkeypatch, train={"lr": 0.01, "warmup": 5})
    assert np.array_equal(start.floats, one.start.floats) and np.array_equal(mask, one.mask)
    assert config.train == bench.study.train.model_copy(update={"lr": 0.01, "warmup": 5})


def test_what_an_arm_does_not_name_is_as_in_its_search() -> None:
    search = {"rounds": 2, "train": {"lr": 0.02, "iterations": 15}}
    bench = tiny.bench(
        searches={"imp": search}, arms={"arm": {"of": "imp"}, "slow": {"of": "imp", "train": {"lr": 0.01}}}
    )
    one = list(rounds(bench, "imp"))[2]
    assert arms.controlled(bench, "arm", one)[1].final.digest() == one.run.final.digest()
    start, slow = one.start, bench.train_config({"lr": 0.01, "iterations": 15})
    assert arms.controlled(bench, "slow", one)[1].final.digest() == bench.trained(start, one.mask, slow).final.digest()


@pytest.mark.parametrize("rewind", [{"name": "step", "step": 10}, "lr", "none", "reinit", "signed_constant"])
@pytest.mark.parametrize("dead", ["zero", "init", "zero_if_shrunk"])
def test_an_arm_that_names_nothing_is_the_ticket_whatever_its_search_does(rewind: object, dead: str) -> None:
    search = {"densities": [0.5], "schedule": "one_shot", "rewind": rewind, "dead": dead}
    bench = tiny.bench(searches={"imp": search}, arms={"arm": {"of": "imp"}})
    one = list(rounds(bench, "imp"))[1]
    mask, run = arms.controlled(bench, "arm", one)
    assert np.array_equal(mask, one.mask) and run.final.digest() == one.run.final.digest()


@pytest.mark.parametrize(
    "search",
    [
        {"densities": [0.5, 0.2], "schedule": "cubic", "rewind": "none"},
        {"rounds": 2, "rewind": {"name": "step", "step": 7}},
        {"rounds": 2, "rewind": {"name": "noise", "sigmas": 1.0}},
        {"rounds": 2, "rewind": "reshuffle"},
        {"rounds": 2, "rewind": "reinit"},
        {"densities": [0.3], "schedule": {"name": "constant", "rounds": 3, "drop": 0.9}, "rewind": "none"},
    ],
)
def test_in_every_round_it_is_the_ticket(search: dict[str, object]) -> None:
    """With falling rates, where a training that stays at the last one hardly learns."""
    train = {"iterations": 20, "batch_size": 16, "lr": 0.1, "evaluate_every": 5, "schedule": "cosine"}
    bench = tiny.bench(searches={"imp": search}, arms={"arm": {"of": "imp"}}, train=train)
    for one in rounds(bench, "imp"):
        run = arms.controlled(bench, "arm", one)[1]
        assert run.final.digest() == one.run.final.digest() and run.curve == one.run.curve, one.number


def test_a_weight_is_shrunk_or_not_by_the_last_training_that_it_took_part_in() -> None:
    bench = tiny.bench(searches={"imp": {"rounds": 3}})
    found = list(rounds(bench, "imp"))
    wanted = bench.theta_0.floats[: bench.layout.num_prunable].copy()
    for before, after in zip(found, found[1:], strict=False):
        wanted[before.mask] = before.run.final.floats[: wanted.size][before.mask]
        assert np.array_equal(after.fallen, wanted)
    assert (wanted[~found[1].mask] != 0).all(), "what fell first is not taken for shrunk"


def test_a_densitys_way_down_counts_too() -> None:
    bench = tiny.bench(searches={"imp": {"densities": [0.4]}})  # through 0.8, 0.64 and 0.512
    _, one = rounds(bench, "imp")
    gone = ~one.mask
    assert (one.fallen[gone] != 0).all() and not one.before.floats[: gone.size][gone].all()


def test_before_is_what_was_scored_under_a_late_rewind_and_under_rescoring() -> None:
    late = tiny.bench(searches={"imp": {"rounds": 2, "rewind": {"name": "step", "step": 10}}})
    dense, one, two = rounds(late, "imp")
    assert one.before.digest() == dense.run.final.digest() and two.before.digest() == one.run.final.digest()
    again = tiny.bench(searches={"imp": {"densities": [0.5, 0.2], "score": "snip", "schedule": "rescore"}})
    for one in rounds(again, "imp"):
        assert not np.array_equal(one.before.floats, one.run.final.floats)
        left = one.before.floats[: one.mask.size]
        assert np.array_equal(left[left != 0], again.theta_0.floats[: one.mask.size][left != 0]), "never a ticket"


def test_a_stop_hands_on_the_training_of_the_ticket_before() -> None:
    search = {"rounds": 4, "stop": {"name": "val_drop", "drop": 0.0}, "train": {"lr": 0.3}}
    for seed in range(20):
        found = list(rounds(tiny.bench(seed=seed, searches={"imp": search}), "imp"))
        same = [(a, b) for a, b in zip(found, found[1:], strict=False) if np.array_equal(a.mask, b.mask)]
        if any(a.number for a, _ in same):
            break
    assert len(found) == 5 and any(a.number for a, _ in same)
    for a, b in same:
        assert b.run.curve == a.run.curve and b.run.early_stop.iteration > 0


def test_an_untrained_arm_is_not_trained() -> None:
    arm = {"of": "imp", "rounds": [2], "start": {"name": "frozen", "weights": "init"}}
    bench = tiny.bench(arms={"arm": arm})
    one = next(r for r in rounds(bench, "imp") if r.number == 2)
    mask, run = arms.controlled(bench, "arm", one)
    assert run.final.digest() == bench.theta_0.masked(mask).digest()
    assert [p.iteration for p in run.curve] == [0]


def test_a_round_is_the_ladder_and_rewinds_exactly() -> None:
    bench = tiny.bench()
    found = list(rounds(bench, "imp"))
    assert [r.number for r in found] == [0, 1, 2, 3]
    size = bench.layout.num_prunable
    for before, after in zip(found, found[1:], strict=False):
        assert not (after.mask & ~before.mask).any()
        assert after.mask.sum() == round(0.8**after.number * size)
        assert np.array_equal(after.start.floats, bench.theta_0.masked(after.mask).floats)
        assert not after.run.final.floats[:size][~after.mask].any()
        assert after.before.digest() == before.run.final.digest()


def test_masks_draw_from_the_generator_alone() -> None:
    bench = tiny.bench()
    state = torch.random.get_rng_state()
    mask = np.arange(bench.layout.num_prunable) % 3 == 0
    for make in MASKS.values():
        one, two = (make()(mask, bench.layout, bench.rng("x")) for _ in range(2))
        assert np.array_equal(one, two)
    assert torch.equal(state, torch.random.get_rng_state())


def test_rigl_moves_its_mask_inside_one_training() -> None:
    rigl = {
        "densities": [0.3], "scope": "erk", "rewind": "none",
        "schedule": {"name": "constant", "rounds": 2, "every": 5, "drop": 0.5},
    }  # fmt: skip
    bench = tiny.bench(searches={"imp": rigl})
    (one,) = rounds(bench, "imp")
    assert [p.iteration for p in one.run.curve] == [15, 20] and one.trainings == 0
    still = tiny.bench(searches={"imp": {**rigl, "schedule": {**rigl["schedule"], "drop": 1e-9}}})  # type: ignore[dict-item]
    (same,) = rounds(still, "imp")
    assert not np.array_equal(one.mask, same.mask), "it acts"
    whole = still.trained(still.theta_0.masked(same.mask), same.mask, still.train_config()).final
    assert whole.digest() == same.run.final.digest(), "with nothing moved it is the plain training"
    late = {**rigl, "schedule": {"name": "constant", "every": 50}}
    with pytest.raises(StudyError, match=r"searches\.imp\.schedule\.every: must lie inside a training's 20 steps"):
        list(rounds(tiny.bench(searches={"imp": late}), "imp"))
