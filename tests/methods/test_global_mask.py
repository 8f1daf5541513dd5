"""Methods with one mask for all: numbers on a few elements, what each reduces to, and what its ledger says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read, resolve
from fedlth.federation import session
from fedlth.federation.downloads import mask_name
from fedlth.federation.forecast_bytes import forecast_bytes
from fedlth.federation.jobs import Failure, Job, Message, Reply
from fedlth.methods.aggregate import Contribution, FedAvg, join
from fedlth.methods.client_update import THETA_G, sends_in
from fedlth.methods.feddst import feddst
from fedlth.methods.fedtiny import GRADIENTS, Blocks, Choose, GrowAndPrune, Pool, fedtiny
from fedlth.methods.flash import DrawMask, ShareOf, flash
from fedlth.methods.global_mask import ErkMask, HeldMean, Readjust, TopMask, cosine, numbers, readjusted, scores
from fedlth.methods.lotteryfl import lotteryfl
from fedlth.methods.method import FederatedMethod, Sampled
from fedlth.methods.prunefl import GAIN, Adjust, RoundTime, adjusted, prunefl
from fedlth.methods.salient import Saliency, salientgrads, ssfl
from fedlth.models.layout import Entry, Layout, Params
from fedlth.report.facts import read_run
from fedlth.report.traffic import traffic
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.tickets.scope import survivors
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content
from tests import tiny

NAMES = ("salientgrads", "ssfl", "prunefl", "fedtiny", "feddst", "flash")
FOUR = Layout((Entry("w", (4,), "param", 0, prunable=True),))
TWO = Layout((Entry("a", (4,), "param", 0, prunable=True), Entry("b", (4,), "param", 4, prunable=True, place=1)))
NO_INTS = np.zeros(0, np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def bits(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


def values(mask: str, *numbers: float, client: int = 0, examples: int = 1, **others: Content) -> Contribution:
    kept = bits(mask)
    return Contribution(client, examples, Content(kept, floats(*numbers) * kept, NO_INTS), others)


def state(mask: str | None, *numbers: float) -> ServerState:
    return ServerState(Params(floats(*numbers), NO_INTS), mask=None if mask is None else bits(mask))


def shown(mask: np.ndarray | None) -> str:
    assert mask is not None
    return "".join("01"[int(bit)] for bit in mask)


def of_run(name: str, out: Path, rounds: int = 4, **options: Any) -> RunFolder:
    method = {"name": name, **tiny.METHODS[name], **options}
    return tiny.run(tiny.study(method=method, federate={"rounds": rounds}, wire="raw"), out)


# What each rule does with four weights.


def test_top_mask_is_exact_and_breaks_ties_by_position() -> None:
    came = [Contribution(0, 1, scores(floats(1, 2, 2, 2))), Contribution(1, 9, scores(floats(1, 2, 2, 2)))]
    new = join(TopMask(0.5), state(None, 5, 6, 7, 8), came, FOUR)
    assert shown(new.mask) == "0110" and new.theta.floats.tolist() == [0, 6, 7, 0], "the first model is masked"


def test_top_mask_means_by_clients_or_by_examples() -> None:
    came = [Contribution(0, 1, scores(floats(4, 0, 0, 0))), Contribution(1, 9, scores(floats(0, 1, 0, 0)))]
    start = state(None, 1, 1, 1, 1)
    assert shown(join(TopMask(0.25), start, came, FOUR).mask) == "1000"
    assert shown(join(TopMask(0.25, FedAvg()), start, came, FOUR).mask) == "0100"


def test_the_control_keeps_as_many_of_each_tensor_by_chance() -> None:
    came = [Contribution(0, 1, scores(floats(9, 8, 7, 0, 1, 0, 0, 0)))]
    start = state(None, *range(1, 9))
    found, other = (join(TopMask(0.5, random=True, seed=seed), start, came, TWO).mask for seed in (0, 1))
    plain = join(TopMask(0.5), start, came, TWO).mask
    assert shown(plain) == "11101000"
    for mask in (found, other):
        assert mask is not None and (int(mask[:4].sum()), int(mask[4:].sum())) == (3, 1)
    assert shown(found) != shown(other)


def test_readjusting_drops_the_smallest_and_grows_by_gradient() -> None:
    weights, mask = floats(5, 1, 0, 0), bits("1100")
    assert shown(readjusted(weights, mask, floats(0, 1, 3, -9), FOUR, 0.5)) == "1001"
    assert shown(readjusted(weights, mask, floats(0, 9, 3, -1), FOUR, 0.5)) == "1100", "what was dropped may come back"
    assert shown(readjusted(weights, mask, floats(0, 0, 0, 0), FOUR, 0.5)) == "1100", "ties by position"
    assert shown(readjusted(weights, mask, floats(0, 1, 3, -9), FOUR, 0.0)) == "1100"


def test_across_tensors_the_sensitive_ones_grow() -> None:
    weights, mask = floats(4, 3, 2, 1, 4, 3, 2, 1), bits("1110" + "1100")
    slope = floats(0, 0, 0, 0, 5, 5, 6, 7)
    found = readjusted(weights, mask, slope, TWO, 0.5, across=True)
    assert int(found.sum()) == 5 and shown(found) == "1000" + "1111"
    assert cosine(0.4, 0, 10) == 0.4 and cosine(0.4, 5, 10) == pytest.approx(0.2) and cosine(0.4, 10, 10) == 0


def test_held_mean_weighs_by_examples_zeroes_the_uncovered_and_prunes_back() -> None:
    came = [values("1100", 2, 4, 0, 0, examples=1), values("1010", 6, 0, 1, 0, client=1, examples=3)]
    new = join(HeldMean(), state("1100", 1, 1, 0, 0), came, FOUR)
    assert shown(new.mask) == "1100", "three are held, two were there: the largest stay"
    assert new.theta.floats.tolist() == [5, 4, 0, 0]
    few = join(HeldMean(min_votes=1), state("1100", 1, 1, 0, 0), came, FOUR)
    assert shown(few.mask) == "1000" and few.theta.floats.tolist() == [5, 0, 0, 0]


@pytest.mark.parametrize("min_votes", [2, 3, 9])
def test_where_no_more_reply_than_the_votes_that_drop_a_weight_what_all_hold_stays(min_votes: int) -> None:
    """Two reply, then one: else nothing is elected, and everyone's mask is empty for good."""
    came = [values("1100", 2, 4, 0, 0), values("1010", 6, 0, 1, 0, client=1)]
    two = join(HeldMean(min_votes), state("1100", 1, 1, 0, 0), came, FOUR)
    assert shown(two.mask) == "1000" and two.theta.floats.tolist() == [4, 0, 0, 0]
    one = join(HeldMean(min_votes), state("1100", 1, 1, 0, 0), came[:1], FOUR)
    assert shown(one.mask) == "1100" and one.theta.floats.tolist() == [2, 4, 0, 0]
    many = [values("1100", 2, 4, 0, 0, client=k) for k in range(10)]
    assert shown(join(HeldMean(min_votes), state("1100", 1, 1, 0, 0), many, FOUR).mask) == "1100"


def test_more_votes_than_a_round_has_clients_are_refused() -> None:
    shape: dict[str, Any] = {"clients": {"count": 4}, "federate": {"rounds": 1, "clients_per_round": 2}}
    resolve(tiny.study(method={"name": "feddst", "min_votes": 1}, **shape))
    with pytest.raises(StudyError, match=r"method.min_votes must be below the 2 clients of federate 1, got 2"):
        resolve(tiny.study(method={"name": "feddst", "min_votes": 2}, **shape))


def test_an_adjustment_takes_back_what_gains_most_a_second() -> None:
    weights, mask = floats(4, 3, 2, 1), bits("1111")
    same = np.ones(4)

    def kept(gain: np.ndarray, seconds: np.ndarray = same, mask: np.ndarray = mask, most: int = 4) -> str:
        return shown(
            adjusted(weights, mask, gain, seconds, FOUR, max_dec=0.5, constant_s=1.0, most=most)
        )  # fmt: skip

    assert kept(floats(9, 9, 0, 0)) == "1100", "nothing to gain: both are dropped"
    assert kept(floats(3, 3, 2.5, 0)) == "1110", "6 / 3 < 8.5 / 4, and no more"
    assert kept(floats(3, 3, 2.5, 2.5), np.array([1, 1, 9, 1.0])) == "1101", "the same gain, and dear"
    assert kept(floats(0, 0, 9, 9), mask=bits("1100")) == "1011", "what was dead comes back"
    assert kept(floats(3, 3, 9, 9), most=3) == "1110"


def test_a_round_s_time_is_flops_and_bytes() -> None:
    task = tiny.task(train={"epochs": 2})
    found = RoundTime(1.0, 1e6, 1e3).of_weights(task, task.exchange)
    examples = 2 * round(np.mean([len(split.train) for split in task.splits.clients]))
    assert found == pytest.approx(np.full(found.size, 3 * examples * 2 / 1e6 + 8 / 1e3)), "2 FLOPs a weight, in an MLP"


def test_prunefl_adjusts_only_where_squared_gradients_came() -> None:
    task = tiny.task()
    rule = Adjust(0.5, 1e4, 1.0, RoundTime(1e-9, 1e9, 1e6)).of_task(task)
    size, start = task.exchange.num_prunable, ServerState(task.theta_0)
    sent = Content(np.ones(size, bool), task.theta_0.floats, task.theta_0.ints)
    plain = join(rule, start, [Contribution(0, 5, sent)], task.exchange)
    assert plain.mask is None and plain.memory["rounds"] == 1
    gain = np.zeros(size)
    new = join(rule, plain, [Contribution(0, 5, sent, {GAIN: scores(gain)})], task.exchange)
    assert new.mask is not None and new.memory["rounds"] == 2 and 0.4 < new.mask.mean() < 0.6


def test_fedtiny_grows_by_the_mean_of_what_clients_name_and_drops_as_many() -> None:
    def named(mask: str, *slope: float) -> dict[str, Content]:
        return {GRADIENTS: scores(floats(*slope), bits(mask))}

    came = [
        values("1100", 4, 1, 0, 0, examples=1, **named("0010", 0, 0, 8, 0)),
        values("1100", 4, 1, 0, 0, client=1, examples=3, **named("0001", 0, 0, 0, 4)),
    ]
    new = join(GrowAndPrune(), state("1100", 4, 1, 0, 0), came, FOUR)
    assert shown(new.mask) == "1001" and new.theta.floats.tolist() == [4, 0, 0, 0], "8 x 1 < 4 x 3; what grows is 0"
    assert join(GrowAndPrune(), state("1100", 4, 1, 0, 0), [values("1100", 4, 1, 0, 0)], FOUR).mask is None


def test_fedtiny_goes_from_the_last_block_to_the_first() -> None:
    plan, mask = Blocks(2, 10, 100, 0.5), bits("1100" + "1100")
    assert [plan.counts(mask, TWO, round).tolist() for round in (10, 20, 30)] == [[0, 1], [1, 0], [0, 1]]
    assert [round for round in range(120) if plan.due(round)] == list(range(10, 100, 10))


def test_fedtiny_takes_the_candidate_of_least_mean_loss() -> None:
    task, pool = tiny.task(), Pool(3, 0.3, 0.5)
    masks = pool(task)
    assert {int(mask.sum()) for mask in masks} == {survivors(task.exchange, 0.3)}
    assert len({mask.tobytes() for mask in masks}) == 3
    assert all(np.array_equal(a, b) for a, b in zip(masks, pool(tiny.task()), strict=True)), "equal at both ends"
    start, size = ServerState(task.theta_0), task.exchange.num_floats - task.exchange.num_params
    measured = [Contribution(c, 1, numbers(np.zeros(3 * size))) for c in range(2)]
    now = join(Choose(pool).of_task(task), start, measured, task.exchange)
    for number, losses in enumerate(((9, 2), (2, 3), (3, 1))):
        assert np.array_equal(now.mask, masks[number]), "they are sent one after the other"
        came = [Contribution(c, 1 + 8 * c, numbers(floats(loss))) for c, loss in enumerate(losses)]
        now = join(Choose(pool, judging=True).of_task(task), now, came, task.exchange)
    assert np.array_equal(now.mask, masks[2]) and not now.memory
    assert np.array_equal(now.theta.floats, task.theta_0.masked(masks[2]).floats)


def test_fedtiny_means_the_statistics_of_norms(tmp_path: Path) -> None:
    options = {"name": "fedtiny", **tiny.METHODS["fedtiny"], "end": 1}
    made = tiny.study(
        method=options, model={"name": "tests.tiny:Small", "options": {}}, train={"lr": 1e-6}, federate={"rounds": 1}
    )
    folder = RunFolder(tmp_path / "r")
    folder.create(resolve(made)[0].study)
    tiny.opened(folder).run(stop_after=1)
    rows = [r for r in tiny.rows(folder.root, "ledger") if r["kind"] == "statistics"]
    assert {r["value_bytes"] for r in rows} == {4 * 3 * 6}, "of three candidates 2 x 3 statistics"
    task, chosen = tiny.task_of(folder.root), tiny.opened(folder).state
    assert chosen.mask is not None
    wanted, examples = np.zeros(task.layout.num_floats), 0
    for client in sorted(set(range(4)) - set(task.splits.unseen)):
        local = LocalClient(task, client, 1, "measure")
        own = local.normalised(task.theta_0.masked(chosen.mask), chosen.mask)
        wanted += own.floats * np.float64(local.num_train)
        examples += local.num_train
    where = slice(task.layout.num_params, None)
    assert chosen.theta.floats[where] == pytest.approx(wanted[where] / examples, rel=1e-5)


def test_statistics_are_those_of_one_pass_and_counted_as_a_forward() -> None:
    task = tiny.task(model={"name": "tests.tiny:Small", "options": {}})
    local = LocalClient(task, 1, 1, "try")
    found = local.normalised(task.theta_0, local.full)
    module = tiny.Small()
    named = {e.name: torch.from_numpy(task.theta_0.floats[e.slice].reshape(e.shape)) for e in task.layout.floats}
    module.load_state_dict(named, strict=False)
    with torch.no_grad():
        maps = module.conv(local.train_part.tensor)
    (mean,) = (e for e in task.layout.floats if e.name.endswith("running_mean"))
    assert found.floats[mean.slice] == pytest.approx(maps.mean((0, 2, 3)).numpy(), abs=0.02)
    rest = np.ones(found.floats.size, bool)
    rest[task.layout.num_params :] = False
    assert np.array_equal(found.floats[rest], task.theta_0.floats[rest]), "no weight moves"
    assert local.log[0].flops == pytest.approx(task.model.flops[""] * local.num_train)
    plain = LocalClient(tiny.task(), 1, 1, "try")
    assert plain.normalised(plain.task.theta_0, plain.full) is plain.task.theta_0 and not plain.log


def test_flash_draws_exactly_as_many_in_the_proportion_that_was_found() -> None:
    came = [Contribution(0, 1, numbers(floats(0.2, 0.8))), Contribution(1, 9, numbers(floats(0.3, 0.7)))]
    new = join(DrawMask(0.5), state(None, *range(1, 9)), came, TWO)
    assert new.mask is not None and (int(new.mask[:4].sum()), int(new.mask[4:].sum())) == (1, 3)
    other = join(DrawMask(0.5, seed=3), state(None, *range(1, 9)), came, TWO)
    assert shown(other.mask) != shown(new.mask)


def test_flash_asks_a_share_of_the_clients_once_each() -> None:
    draw = np.random.default_rng(0)
    found = ShareOf(0.5)(1, seen=[2, 3, 5, 7, 9], everyone=[], rng=draw)
    assert len(found) == len(set(found)) == 3 and found == sorted(found)
    assert len(ShareOf(0.01)(1, seen=[2, 3], everyone=[], rng=draw)) == 1


RULES: dict[str, tuple[Any, Callable[[int, np.random.Generator], Contribution]]] = {
    "TopMask": (TopMask(0.5), lambda c, draw: Contribution(c, 3 + c, scores(draw.random(8)))),
    "DrawMask": (DrawMask(0.5), lambda c, draw: Contribution(c, 3 + c, numbers(draw.random(2)))),
    "HeldMean": (HeldMean(), lambda c, draw: values("11101100", *draw.random(8), client=c, examples=3 + c)),
    "GrowAndPrune": (
        GrowAndPrune(),
        lambda c, draw: values(
            "11101100", *draw.random(8), client=c, examples=3 + c,
            gradients=scores(draw.random(8), bits("00010001")),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_clients_does_not_matter(name: str) -> None:
    rule, made = RULES[name]
    came = [made(c, np.random.default_rng(c)) for c in range(3)]
    found = [join(rule, state("11101100", *range(1, 9)), list(order), TWO) for order in permutations(came)]
    assert len({one.mask.tobytes() for one in found if one.mask is not None}) == 1
    assert all(np.allclose(one.theta.floats, found[0].theta.floats) for one in found)


# Equivalences.

DENSE: list[tuple[str, dict[str, Any]]] = [
    ("salientgrads", {"density": 1.0}),
    ("ssfl", {"density": 1.0}),
    ("prunefl", {"initial": 0, "max_dec": 0.0}),
    ("fedtiny", {"density": 1.0}),
    ("feddst", {"density": 1.0}),
    ("flash", {"density": 1.0, "every": 0}),
    ("flash", {"density": 1.0, "every": 2}),
]


@pytest.mark.parametrize(("name", "options"), DENSE)
def test_with_every_weight_it_is_fedavg_to_the_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    of_run(name, tmp_path / "dense", rounds=3, **options)
    tiny.run(tiny.of_method("fedavg", federate={"rounds": 3}, wire="raw"), tmp_path / "fedavg")
    assert tiny.digests(tmp_path / "dense")["theta_g"] == tiny.digests(tmp_path / "fedavg")["theta_g"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_pruned_is_zero_and_the_density_exact(name: str, tmp_path: Path) -> None:
    run = of_run(name, tmp_path / "r")
    found = tiny.opened(run).state
    assert found.mask is not None and not found.theta.floats[: found.mask.size][~found.mask].any()
    if name != "prunefl":
        assert int(found.mask.sum()) == survivors(tiny.task_of(run.root).exchange, 0.3)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("salientgrads", {"random": True}), ("salientgrads", {"batches": 1}),
        ("ssfl", {"random": True}), ("prunefl", {"max_dec": 0.0}), ("prunefl", {"initial": 0}),
        ("prunefl", {"chosen": 1}), ("prunefl", {"constant_s": 1.0}), ("fedtiny", {"spread": 0.0}),
        ("fedtiny", {"blocks": 1}), ("fedtiny", {"end": 1}), ("feddst", {"rate": 0.0}), ("feddst", {"after": 0.5}),
        ("feddst", {"batches": 2}), ("feddst", {"min_votes": 1}), ("flash", {"every": 0}), ("flash", {"rate": 0.1}),
    ],
)  # fmt: skip
def test_each_option_changes_the_model(name: str, option: dict[str, Any], tmp_path: Path) -> None:
    runs = [of_run(name, tmp_path / str(i), rounds=3, **more) for i, more in enumerate(({}, option))]
    assert tiny.digests(runs[0].root)["theta_g"] != tiny.digests(runs[1].root)["theta_g"]


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (salientgrads, {"density": 0.0}, "method.density"), (ssfl, {"batches": -1}, "method.batches"),
        (prunefl, {"max_dec": 1.0}, "method.max_dec"), (prunefl, {"flops_s": 0.0}, "method.flops_s"),
        (fedtiny, {"pool": 0}, "method.pool"), (feddst, {"after": 1.0}, "method.after"),
        (flash, {"share": 0.0}, "method.share"),
    ],
)  # fmt: skip
def test_what_no_study_could_mean_is_refused(make: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        make(**options)


# Clients.


@pytest.mark.parametrize("signed", [False, True])
def test_saliency_is_of_the_real_loss(signed: bool) -> None:
    """The public SalientGrads takes nll_loss of raw logits."""
    task = tiny.task()
    local, theta = LocalClient(task, 1, 1, "saliency"), task.theta_0
    inbox = {THETA_G: Content(local.full, theta.floats, theta.ints)}
    told = Saliency(signed=signed)(local, inbox, ClientState()).contents["saliency"].floats
    order, size = local.rng("gradients"), task.study.train.batch_size
    weights = [torch.from_numpy(theta.floats[e.slice].reshape(e.shape)).requires_grad_() for e in task.layout.floats]
    named = dict(zip((e.name for e in task.layout.floats), weights, strict=True))
    total = np.zeros(local.full.size)
    parts = np.split(order.permutation(local.num_train), range(size, local.num_train, size))
    for part in parts:
        batch = local.train_part.batch(torch.from_numpy(part))
        hidden = torch.relu(batch.tensor.flatten(1) @ named["1.weight"].T + named["1.bias"])
        logits = hidden @ named["3.weight"].T + named["3.bias"]
        slopes = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, batch.y), weights)
        flat = np.concatenate([s.reshape(-1).numpy() for s in slopes])[: total.size]
        product = flat.astype(np.float64) * theta.floats[: total.size]
        total += product if signed else np.abs(product)
    assert len(parts) > 1 and told == pytest.approx(np.abs(total) / len(parts), rel=1e-4, abs=1e-9)


def test_gradients_are_counted_as_trainings_are() -> None:
    task = tiny.task()
    local = LocalClient(task, 1, 1, "try")
    assert sum(1 for _ in local.gradients(task.theta_0)) == local.steps_an_epoch
    one, two = local.log[0], local.flops(local.full, local.num_train)
    assert (one.flops, one.alive_flops, one.epochs) == (two[0], two[0], 1)
    half = task.theta_0.masked(np.arange(local.full.size) % 2 == 0)
    next(local.gradients(half, count=1))
    dense, sparse = local.flops(half.floats[: local.full.size] != 0, task.study.train.batch_size)
    assert local.log[1].flops == dense and local.log[1].alive_flops == pytest.approx((2 * sparse + dense) / 3)
    assert len(local.work) == 2


def test_feddst_samples_without_replacement_and_counts_examples(tmp_path: Path) -> None:
    """The public code draws clients with replacement, and counts minibatches twice in place of examples."""
    (phase,) = feddst().phases
    assert isinstance(phase.who, Sampled) and isinstance(phase.join, HeldMean)
    for seed in range(20):
        found = phase.who.__class__(4)(1, seen=range(6), everyone=range(6), rng=np.random.default_rng(seed))
        assert len(set(found)) == 4
    came = [values("1000", 1, 0, 0, 0, examples=10), values("1000", 5, 0, 0, 0, client=1, examples=30)]
    assert join(phase.join, state("1000", 0, 0, 0, 0), came, FOUR).theta.floats[0] == 4


def test_feddst_begins_with_a_mask_that_both_ends_draw(tmp_path: Path) -> None:
    task = tiny.task()
    mask = ErkMask(0.3)(task, 0)
    assert np.array_equal(mask, ErkMask(0.3)(tiny.task(), 7)) and int(mask.sum()) == survivors(task.layout, 0.3)
    run = of_run("feddst", tmp_path / "r", rounds=1)
    first = [r for r in tiny.rows(run.root, "ledger") if r["kind"] == "install"]
    assert {r["mask_bytes"] for r in first} == {0} and {round(r["density"], 1) for r in first} == {0.3}
    assert not tiny.experiment(run.study()).start().theta.floats[: mask.size][~mask].any()


def test_feddst_pays_for_a_mask_when_it_is_readjusted(tmp_path: Path) -> None:
    run = of_run("feddst", tmp_path / "r", rounds=5)
    ups = [r for r in tiny.rows(run.root, "ledger") if (r["phase"], r["kind"]) == ("federate", "values")]
    ups = [r for r in ups if r["receiver"] == "server"]
    bitmap = -(-tiny.task_of(run.root).exchange.num_prunable // 8)
    assert {(r["round"] % 2, r["mask_bytes"]) for r in ups} == {(0, bitmap), (1, 0)}


def test_a_readjustment_trains_no_more_and_no_less() -> None:
    task = tiny.task(train={"epochs": 2})
    update = feddst(density=0.3, rate=0.4, every=2, end=8, after=0.5).phases[0].update
    mask = ErkMask(0.3)(task, 0)
    theta = task.theta_0.masked(mask)
    for round in (1, 2):
        local = LocalClient(task, 1, round, "federate")
        update(local, {THETA_G: Content(mask, theta.floats, theta.ints)}, ClientState())
        steps = 2 * local.steps_an_epoch
        assert [c.steps for c in local.log] == [[steps], [steps // 2, 1, steps - steps // 2]][round - 1]


def test_a_weight_that_stays_keeps_its_value_and_a_new_one_begins_at_zero() -> None:
    task = tiny.task()
    mask = ErkMask(0.3)(task, 0)
    local, event = LocalClient(task, 1, 2, "federate"), Readjust(2, 8, 0.4)
    params, new = event(local, task.theta_0.masked(mask), mask, None)
    assert (new != mask).any() and int(new.sum()) == int(mask.sum())
    assert not params.floats[: mask.size][~(mask & new)].any()
    assert np.array_equal(params.floats[: mask.size][mask & new], task.theta_0.floats[: mask.size][mask & new])


# Messages.


def test_prunefl_s_squared_gradients_are_dense_and_in_the_ledger(tmp_path: Path) -> None:
    run = of_run("prunefl", tmp_path / "r", rounds=5)
    rows = [r for r in tiny.rows(run.root, "ledger") if r["name"] == GAIN]
    size = tiny.task_of(run.root).exchange.num_prunable
    assert sorted({r["round"] for r in rows}) == [2, 4] and len(rows) == 4
    assert all(r["kind"] == "scores" and r["value_bytes"] == 4 * size and r["density"] == 1 for r in rows)


def test_both_ends_know_in_which_rounds_a_message_is_skipped() -> None:
    update = prunefl(every=3).phases[1].update
    assert [len(sends_in(update, round)) for round in (1, 2, 3, 6)] == [1, 1, 2, 2]


class Talkative(tiny.Lists):
    """A client that sends its squared gradients in a round that skips them, and one that leaves them out."""

    def __init__(self, client: int) -> None:
        self.client = client
        self.kept: tuple[Message, ...] = ()

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        answers = super().run(jobs)
        for i, answer in enumerate(answers):
            if not isinstance(answer, Reply) or answer.client != self.client or jobs[i].phase != "federate":
                continue
            gains = tuple(m for m in answer.outbox if m.name == GAIN)
            if answer.round == 2:
                self.kept = gains
                answers[i] = replace(answer, outbox=tuple(m for m in answer.outbox if m.name != GAIN))
            if answer.round == 3:
                answers[i] = replace(answer, outbox=(*answer.outbox, *self.kept))
        return answers


def test_the_door_refuses_what_a_round_does_not_ask_for_or_misses(tmp_path: Path) -> None:
    made = tiny.of_method("prunefl", federate={"rounds": 3, "clients_per_round": 3})
    run = tiny.run(made, tmp_path / "r", engine=Talkative(1))
    failed = {r["round"]: r["failed"] for r in tiny.rows(run.root, "rounds") if r["phase"] == "federate"}
    assert [len(found) for found in failed.values()] == [0, 1, 1]
    assert "no scores came" in failed[2][0]["reason"] and "was not asked for" in failed[3][0]["reason"]


def halved() -> FederatedMethod:
    return replace(lotteryfl(), name="halved", start_mask=ErkMask(0.5))


def test_a_mask_of_the_start_is_refused_where_slices_go_down() -> None:
    with pytest.raises(StudyError, match="its start_mask must be Dense where a phase sends slices"):
        read(tiny.study(method="tests.methods.test_global_mask:halved"))


@pytest.mark.parametrize("name", NAMES)
def test_bits_of_everyone_s_mask_cross_when_it_changed_and_for_whoever_is_new(name: str, tmp_path: Path) -> None:
    run = of_run(name, tmp_path / "r", rounds=6)
    held: dict[str, str] = {}
    both = set()
    start = mask_name(tiny.experiment(run.study()).start_mask)  # of FedDST, what both ends draw
    for row in tiny.rows(run.root, "ledger"):
        if row["sender"] != "server":
            continue
        changed = row["ticket"] != held.get(row["receiver"], start)
        assert (row["mask_bytes"] > 0) == changed, row
        both.add(changed)
        held[row["receiver"]] = row["ticket"]
    assert both == {False, True}
    unseen = next(iter(tiny.task_of(run.root).splits.unseen))
    assert held[f"client:{unseen}"], "a client that only comes in step 2 is sent the mask as well"


def test_a_broadcast_in_two_forms_is_counted_once_a_form(tmp_path: Path) -> None:
    run = of_run("salientgrads", tmp_path / "r", rounds=6)
    found = traffic(read_run(run.root))
    downs = {
        (r["phase"], r["round"], r["payload_bytes"])
        for r in tiny.rows(run.root, "ledger")
        if r["sender"] == "server"
    }  # fmt: skip
    assert found.once.down_bytes == sum(size for _, _, size in downs) < found.unicast.down_bytes
    assert max(Counter((phase, round) for phase, round, _ in downs).values()) == 2


@pytest.mark.parametrize("wire", ["raw", "lossless", pytest.param("step", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_at_most_what_was_forecast(name: str, wire: str, tmp_path: Path) -> None:
    made = tiny.of_method(name, wire=wire, federate={"rounds": 4})
    told = forecast_bytes(read(made)[0], 0.01)
    run = tiny.run(made, tmp_path / "r")
    rows = tiny.rows(run.root, "ledger")
    for one, where, party in ((told.down, "sender", "server"), (told.up, "receiver", "server")):
        moved = sum(r["payload_bytes"] for r in rows if r[where] == party)
        assert "no mask that all clients share" in one.bounds
        assert moved <= one.size <= max(5 * moved, moved + 4000)


@pytest.mark.parametrize("name", ["prunefl", "fedtiny", "feddst", "flash"])
def test_a_stop_in_any_phase_changes_nothing(name: str, tmp_path: Path) -> None:
    made = tiny.of_method(name, federate={"rounds": 4})
    whole = tiny.run(made, tmp_path / "whole")
    folder = RunFolder(tmp_path / "stopped")
    folder.create(resolve(made)[0].study)
    for stop in range(1, len(tiny.experiment(folder.study()).steps)):
        tiny.opened(folder).run(stop_after=stop)
    session.resume(folder.root, InProcess())
    assert tiny.facts(folder.root) == tiny.facts(whole.root)


def test_methods_with_one_mask_have_the_arm_own_random() -> None:
    for made in (salientgrads(), ssfl(), prunefl(), fedtiny(), feddst(), flash()):
        assert made.masks_all and "own_random" in made.arms
