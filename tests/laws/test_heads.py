"""Whole heads and channels as a granularity: what a density keeps of them, whatever the schedule and the scope."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

from fedlth import rng
from fedlth.errors import StudyError
from fedlth.models.heads import living, units_of
from fedlth.models.layout import Params, Units, layout_of
from fedlth.tickets.controls import recounted_mask, shuffled_mask
from fedlth.tickets.granularity import HeadsAndChannels
from fedlth.tickets.schedule import SCHEDULES
from fedlth.tickets.search import Walked, find
from tests.laws.fakes import LAYOUT, finder

HEADS, SIZE, WIDTH, CHANNELS = 6, 4, 24, 40  # of each of two layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_head_size = SIZE
        self.q_lin, self.k_lin, self.v_lin, self.out_lin = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(4))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.ffn = nn.ModuleDict({"lin1": nn.Linear(WIDTH, CHANNELS), "lin2": nn.Linear(CHANNELS, WIDTH)})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(), Layer()])

    def units(self) -> dict[str, Units]:
        return units_of(self, "")


WEIGHTS = tuple(name for name, tensor in Net().named_parameters() if tensor.dim() > 1)
NET = layout_of(Net(), WEIGHTS)
GROUPS = HeadsAndChannels().groups(NET)
FULL = np.ones(NET.num_prunable, bool)
HEAD, CHANNEL = 4 * SIZE * WIDTH, 2 * WIDTH
LAYER = HEADS * HEAD + CHANNELS * CHANNEL


def params(seed: int) -> Params:
    draw = np.random.default_rng(seed)
    return Params(draw.normal(size=NET.num_floats).astype(np.float32), np.zeros(0, np.int64))


def test_what_the_groups_are() -> None:
    sizes = np.bincount(GROUPS.of if GROUPS.of is not None else [])
    assert [e.size for e in GROUPS.layout.prunable] == [CHANNELS, HEADS, CHANNELS, HEADS]
    assert sizes.tolist() == 2 * ([CHANNEL] * CHANNELS + [HEAD] * HEADS)
    at = {e.name: GROUPS.spread(np.arange(sizes.size))[e.slice].reshape(e.shape) for e in NET.prunable}
    first = next(e.offset for e in GROUPS.layout.prunable if e.name.endswith("0.heads"))
    rows = at["layer.0.attention.k_lin.weight"]
    assert (rows == first + np.repeat(np.arange(HEADS), SIZE)[:, None]).all()
    assert (at["layer.0.attention.out_lin.weight"] == rows.T).all()
    assert (at["layer.1.ffn.lin2.weight"] == at["layer.1.ffn.lin1.weight"].T).all()
    value = np.random.default_rng(0).random(sizes.size)
    np.testing.assert_allclose(GROUPS.reduced(GROUPS.spread(value)), value, rtol=1e-12)


@pytest.mark.parametrize("scope", ["layerwise", "global", {"name": "global", "floor": 1}])
@pytest.mark.parametrize("density", [0.9, 0.5, 0.3, 0.15])
def test_a_density_counts_weights_and_no_layer_loses_all(scope: Any, density: float) -> None:
    made = finder(granularity="heads_and_channels", scope=scope)
    for seed in range(5):
        score = np.random.default_rng(seed).exponential(size=FULL.size)
        if seed == 4:  # one layer is worth nothing
            score[np.concatenate([np.arange(e.size) + e.offset for e in NET.prunable if ".1." in e.name])] = 0
        mask = made.pick(score, FULL, NET, density)
        kept = GROUPS.reduced(mask)
        assert set(np.unique(kept)) <= {0.0, 1.0}, "whole groups"
        assert abs(int(mask.sum()) - round(density * FULL.size)) <= 2 * CHANNEL / 2 + 1, "half a channel of each layer"
        alive = living(NET, mask)
        assert all(own.any() for own in alive.values())
        means = GROUPS.reduced(score)
        for e in GROUPS.layout.prunable:
            stays = kept[e.slice] > 0
            assert means[e.slice][stays].min() >= means[e.slice][~stays].max(initial=-1), "the best of each kind stay"
            assert (alive[e.name] == stays).all()
    if scope == "layerwise":
        heads, channels = (alive[f"layer.0.{kind}"].sum() for kind in ("heads", "channels"))
        assert heads == max(1, round(density * HEADS))
        assert channels == round((density * LAYER - heads * HEAD) / CHANNEL)
        assert alive["layer.1.heads"].sum() == heads and alive["layer.1.channels"].sum() == channels


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_keeps_whole_groups(schedule: str) -> None:
    quick = {"rescore": {"name": "rescore", "steps": 3}, "constant": {"name": "constant", "rounds": 2}}
    made = finder(granularity="heads_and_channels", schedule=quick.get(schedule, schedule))

    def train(start: Params, mask: np.ndarray, /, **how: Any) -> Walked:
        floats = start.floats.copy()
        floats[: mask.size][mask] += np.float32(0.1)
        return Walked(Params(floats, start.ints))

    found = find(
        made, start=params(2), start_name="theta_g", targets=(0.6, 0.3), layout=NET, anchors=lambda name: params(1),
        train=train, rng=lambda what: rng.stream(0, what), network=lambda at: Gradient(),
    )  # fmt: skip
    for ticket in found:
        assert set(np.unique(GROUPS.reduced(ticket.mask))) <= {0.0, 1.0}
        assert abs(ticket.mask.mean() - ticket.target) < CHANNEL / LAYER


class Gradient:
    def gradient(self, weights: np.ndarray, /) -> np.ndarray:
        return np.sin(np.arange(weights.size, dtype=np.float32))


def test_controls_keep_each_layers_counts() -> None:
    made = finder(granularity="heads_and_channels", scope="global")
    mask = made.pick(np.random.default_rng(0).random(FULL.size), FULL, NET, 0.3)
    dice = np.random.default_rng(1)
    for other in (
        shuffled_mask(mask, NET, dice, HeadsAndChannels()),
        recounted_mask(mask, dice.random(FULL.size), NET, HeadsAndChannels()),
    ):
        assert (other != mask).any() and other.sum() == mask.sum()
        one, two = living(NET, mask), living(NET, other)
        assert {name: own.sum() for name, own in one.items()} == {name: own.sum() for name, own in two.items()}


def test_biases_of_what_is_gone_are_zero_and_nothing_else_changes() -> None:
    mask = finder(granularity="heads_and_channels").pick(np.random.default_rng(0).random(FULL.size), FULL, NET, 0.5)
    start = params(3).masked(mask)
    cleared, alive = HeadsAndChannels().cleared(start, mask, NET), living(NET, mask)
    for e in NET.floats:
        gone = np.zeros(e.size, bool)
        if e.units is not None and not e.prunable:
            gone = ~alive[e.units.of][e.units.along(e.size)]
            assert gone.any()
        assert not cleared.floats[e.slice][gone].any()
        np.testing.assert_array_equal(cleared.floats[e.slice][~gone], start.floats[e.slice][~gone])
    assert sum(e.units is not None for e in NET.floats if not e.prunable) == 2 * 4
    assert HeadsAndChannels().cleared(start, FULL, NET) == start


def test_what_it_cannot_prune_is_named() -> None:
    with pytest.raises(StudyError, match=r"needs a transformer of the form .* got conv.weight \(model.prunable\)"):
        HeadsAndChannels().groups(LAYOUT)
    with pytest.raises(StudyError, match=r"must prune all of layer.1.channels, got layer.1.ffn.lin2.weight"):
        HeadsAndChannels().groups(layout_of(Net(), WEIGHTS[:-1]))
    heads = layout_of(Net(), tuple(name for name in WEIGHTS if "attention" in name))
    assert [e.name for e in HeadsAndChannels().groups(heads).layout.prunable] == ["layer.0.heads", "layer.1.heads"]
    with pytest.raises(StudyError, match=r"densities: must be at least 0.1023 .* a head and a channel in every layer"):
        finder(granularity="heads_and_channels").pick(np.ones(FULL.size), FULL, NET, 0.09)
