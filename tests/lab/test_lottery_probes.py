"""Diagnostics on cases whose answer is known, and every probe on a small study."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlth.lab.attack import attacked, evaluate_attacked, scale_of
from fedlth.lab.bench import Bench, few
from fedlth.lab.instability import barrier, between
from fedlth.lab.masks import chance, jaccard
from fedlth.lab.pooled import pooled
from fedlth.lab.probes import PROBES
from fedlth.lab.search import rounds
from fedlth.lab.tasks import deal, distance
from fedlth.models.layout import Entry, Layout, Params
from fedlth.study.parts import make
from tests.lab import tiny_lottery as tiny
from tests.tiny import images

LAYOUT = Layout((Entry("a", (10,), "param", 0, prunable=True), Entry("b", (10,), "param", 10, prunable=True)))


def probed(spec: dict[str, Any], **sections: Any) -> list[dict[str, Any]]:
    return list(make(PROBES, spec, "probes.x")(tiny.bench(**sections)))


def test_the_line_between_two_copies() -> None:
    one, other = (Params(np.array(v, np.float32), np.zeros(0, np.int64)) for v in ([0, 1], [1, 3]))
    assert between(one, other, 0.0) is one and between(one, other, 1.0) is other
    assert between(one, other, 0.5).floats.tolist() == [0.5, 2.0]
    assert barrier([0.1, 0.5, 0.3]) == pytest.approx(0.3)
    assert barrier([0.2, 0.1, 0.2]) == 0.0


def test_overlap_and_its_chance() -> None:
    one = np.zeros(20, bool)
    one[:5] = True
    other = one.copy()
    assert jaccard(one, other) == 1.0
    assert jaccard(one, ~one) == 0.0
    assert jaccard(np.zeros(20, bool), np.zeros(20, bool)) == 1.0
    # five of ten in the same layer: 2.5 shared of 7.5; in different layers nothing can be shared
    assert chance(one, other, LAYOUT) == pytest.approx(1 / 3)
    assert chance(one, np.roll(one, 10), LAYOUT) == 0.0


def test_distance_of_label_shares() -> None:
    assert distance(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0.0
    assert distance(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1.0


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_an_attack_stays_in_its_ball_and_in_the_image_and_hurts(kind: str) -> None:
    bench = tiny.bench()
    trained = bench.trained(bench.theta_0, bench.full, bench.train_config()).final
    data = bench.parts["test"]
    x, y = data.tensor, data.y
    bench.flat_model.load(trained)
    moved = attacked(bench.flat_model, bench.dataset, x, y, kind=kind, eps=0.1, steps=5)
    _, std = scale_of(bench.dataset)
    assert float(((moved - x) * std).abs().max()) <= 0.1 + 1e-6
    mean, _ = scale_of(bench.dataset)
    pixels = moved * std + mean
    assert float(pixels.min()) >= -1e-6 and float(pixels.max()) <= 1 + 1e-6
    assert torch.equal(attacked(bench.flat_model, bench.dataset, x, y, kind=kind, eps=0.0, steps=5), x)
    clean = evaluate_attacked(bench.flat_model, bench.dataset, trained, data, kind=kind, eps=0.0)
    hurt = evaluate_attacked(bench.flat_model, bench.dataset, trained, data, kind=kind, eps=0.1)
    assert clean[0] == bench.accuracy(trained)
    assert hurt[0] < clean[0] and hurt[1] > clean[1]


def test_fgsm_on_a_linear_network_is_the_sign_of_the_weights() -> None:
    bench = tiny.bench(model={"name": "mlp", "options": {"hidden": []}})
    bench.flat_model.load(bench.theta_0)
    x, y = bench.parts["test"].tensor[:1], bench.parts["test"].y[:1]
    weight = bench.theta_0.floats[bench.layout.prunable[0].slice].reshape(4, 64)
    share = torch.softmax(bench.flat_model.module(x), -1)[0].detach().numpy()
    share[int(y)] -= 1
    _, std = scale_of(bench.dataset)
    step = (
        ((attacked(bench.flat_model, bench.dataset, x, y, kind="fgsm", eps=0.001, steps=1) - x) * std)
        .reshape(-1)
        .numpy()
    )
    np.testing.assert_allclose(step, 0.001 * np.sign(share @ weight), atol=1e-6)


def test_clients_own_their_labels_and_share_no_example() -> None:
    bench = tiny.bench()
    shares = deal(bench, 3, 0.5, most=20)
    seen = []
    for client, share in enumerate(shares):
        part = bench.parts[f"client{client}/train"]
        x, y = part.tensor, part.y
        assert len(y) <= 20 and share.sum() == pytest.approx(1)
        assert np.allclose(np.bincount(y.numpy(), minlength=4) / len(y), share)
        tested = bench.parts[f"client{client}/test"].y.numpy()
        assert set(tested) <= set(y.tolist())
        seen += [row.numpy().tobytes() for row in x]
    assert len(set(seen)) == len(seen)


def test_rewinds_are_exact() -> None:
    searches = {
        "imp": {"rounds": 2},
        "late": {"rounds": 2, "rewind": {"name": "step", "step": 10}},
        "lr": {"rounds": 2, "rewind": "lr"},
        "again": {"densities": [0.5, 0.2], "schedule": "rescore", "rewind": "lr"},
        "new": {"rounds": 2, "rewind": "reinit"},
        "noisy": {"rounds": 2, "rewind": {"name": "noise", "sigmas": 0.5}},
        "shuffled": {"rounds": 2, "rewind": "reshuffle"},
        "held": {"rounds": 2, "dead": "init"},
        "shrunk": {"rounds": 2, "dead": "zero_if_shrunk"},
        "strong": {
            "densities": [0.5], "score": {"name": "edge_popup", "epochs": 1},
            "schedule": {"name": "rescore", "steps": 1}, "rewind": "frozen",
        },
    }  # fmt: skip
    train = {"iterations": 20, "batch_size": 16, "lr": 0.1, "schedule": "cosine", "evaluate_every": 5}
    rows = probed({"name": "rewinds", "searches": list(searches)}, searches=searches, train=train)
    assert {r["search"] for r in rows} == set(searches)
    assert all(r["furthest"] == 0 for r in rows)
    assert all(r["first_rate"] == r["schedule_there"] for r in rows)
    assert {r["first_rate"] < 0.1 for r in rows if r["search"] == "late"} == {True}


def test_what_a_moving_mask_brought_back_begins_at_zero() -> None:
    searches = {
        name: {"densities": [0.3], "rewind": "none", "schedule": {"name": "constant", "rounds": 3, **moves}}
        for name, moves in (("inside", {"every": 4, "drop": 0.6}), ("between", {"drop": 0.9}))
    }
    train = {"iterations": 20, "batch_size": 16, "lr": 0.1, "schedule": "cosine", "evaluate_every": 5}
    rows = probed({"name": "rewinds", "searches": list(searches)}, searches=searches, train=train)
    assert [r["furthest"] for r in rows] == [0, 0]
    inside = next(r for r in rows if r["search"] == "inside")
    assert inside["first_rate"] == inside["schedule_there"] < 0.1, "of the step of its last move"


def test_two_copies_train_as_their_search_does() -> None:
    search = {"imp": {"rounds": 1, "train": {"lr": 1e-6}}}
    rows = probed({"name": "instability", "search": "imp", "alphas": 3}, searches=search)
    bench = tiny.bench(searches=search)
    assert {r["error"] for r in rows} == {1 - bench.accuracy(bench.theta_0)}, "nothing has moved"


def normed(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, num_classes))


def test_between_two_copies_norms_have_their_own_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny.bench(model={"name": "tests.lab.test_lottery_probes:normed"})
    seen, real = list[Params](), Bench.accuracy

    def accuracy(self: Bench, params: Params, part: str = "test") -> float:
        seen.append(params)
        return real(self, params, part)

    monkeypatch.setattr(Bench, "accuracy", accuracy)
    rows = list(make(PROBES, {"name": "instability", "search": "imp", "alphas": 3}, "probes.x")(bench))
    one, middle, other = seen
    assert rows[0]["stored_gap"] == 0
    wanted = bench.normalised(between(one, other, 0.5))
    mean = next(e for e in bench.layout.floats if e.name.endswith("running_mean"))
    assert np.array_equal(middle.floats, wanted.floats)
    assert not np.allclose(
        middle.floats[mean.slice], (one.floats[mean.slice] + other.floats[mean.slice]) / 2, atol=1e-3
    )


def in_order() -> dict[str, Any]:
    """Return the made-up images sorted by class, as a folder a class is read."""
    found = images()
    for part in ("train", "test"):
        order = np.argsort(found[f"y_{part}"], kind="stable")
        found |= {f"{name}_{part}": found[f"{name}_{part}"][order] for name in ("x", "y")}
    return found


def test_data_that_are_sorted_by_class_are_not_cut_to_the_first_classes() -> None:
    sections = {"data": {"name": "tests.lab.test_lottery_probes:in_order", "validation": 60}}
    bench = tiny.bench(**sections)
    for name, count in (("train", 50), ("test", 20)):
        part = bench.parts[name]
        assert len(part.y[:count].unique()) < 4 == len(few(part, count).y.unique()) and len(few(part, count)) == count
        assert len(few(part, None)) == len(few(part, 10**6)) == len(part)
    plain = tiny.bench().parts["train"]
    assert torch.equal(few(plain, 50).tensor, plain.tensor[:50]), "else they are the first"
    spec = {"name": "attack", "search": "imp", "round": 2, "eps": [0.0], "examples": 20}
    clean = {r["network"]: r["robust_accuracy"] for r in probed(spec, **sections)}
    dense = next(rounds(bench, "imp")).run
    assert abs(clean["dense"] - dense.test) < 0.15
    rows = probed({"name": "equilibrium", "epochs": 12, "examples": 80, "held_out": 20, "lr": 0.2}, **sections)
    assert rows[-1]["baseline"] > 0.65, "it has seen all classes"


def test_instability_falls_and_its_ends_are_the_stored_accuracies() -> None:
    rows = probed({"name": "instability", "search": "imp", "rounds": [0, 2], "steps": [0, 19], "alphas": 3})
    assert len(rows) == 2 * 2 * 3
    assert all(r["stored_gap"] == 0 for r in rows)


def test_attack_at_strength_zero_is_clean_and_pgd_is_at_least_fgsm() -> None:
    spec = {"name": "attack", "search": "imp", "round": 2, "eps": [0.0, 0.1], "examples": 100}
    found = {(r["network"], r["attack"], r["eps"]): r["robust_accuracy"] for r in probed(spec)}
    for network in ("dense", "imp"):
        assert found[network, "fgsm", "0"] == found[network, "pgd", "0"]
        assert found[network, "pgd", "0.1"] <= found[network, "fgsm", "0.1"] <= found[network, "fgsm", "0"]


def test_two_searches_overlap_as_far_as_they_are_alike() -> None:
    searches = {
        "imp": {"rounds": 2}, "same": {"rounds": 2}, "random": {"rounds": 2, "score": "random"},
        "inverse": {"rounds": 2, "score": "small_final"},
    }  # fmt: skip
    spec = {"name": "overlap", "searches": list(searches), "rounds": [0, 2]}
    found = {(r["round"], r["one"], r["other"]): r for r in probed(spec, searches=searches)}
    assert len(found) == 2 * 6 and found[2, "imp", "same"]["overlap"] == 1.0
    assert all(r["overlap"] == r["chance"] == 1.0 for (number, *_), r in found.items() if number == 0)
    chanced = found[2, "imp", "random"]
    assert abs(chanced["overlap"] - chanced["chance"]) < 0.06
    assert found[2, "imp", "inverse"]["overlap"] < chanced["chance"] - 0.1


def test_settling_is_a_distance() -> None:
    rows = probed({"name": "settling", "search": "imp", "density": 0.3})
    found = {(r["iteration"], r["other"]): r["distance"] for r in rows}
    assert len(found) == 25
    for (i, j), d in found.items():
        assert 0 <= d <= 1 and d == found[j, i] and (d == 0 if i == j else True)
    assert found[0, 20] > found[15, 20]


@pytest.mark.parametrize("score", ["movement", "magnitude_increase", "large_init"])
def test_settling_sees_what_a_score_that_looks_back_sees(score: str) -> None:
    search = {"imp": {"rounds": 2, "score": score}}
    rows = probed({"name": "settling", "search": "imp", "density": 0.3, "iterations": 13}, searches=search)
    found = {(r["iteration"], r["other"]): r["distance"] for r in rows}
    assert {i for i, _ in found} == {0, 5, 10, 13}, "the last stretch is shorter"
    assert (found[5, 13] > 0) == (score != "large_init")


def test_scores_are_what_they_stand_for() -> None:
    (row,) = probed({"name": "exact", "examples": 100})
    assert row["snip_rank"] > 0.9 and row["grasp_error"] < 1e-10
    (row,) = probed({"name": "conservation", "density": 0.05})
    assert row["spread"] < 1e-10 and row["differing"] == 0


def test_synflow_reaches_the_most_and_one_shot_does_not() -> None:
    model = {"name": "mlp", "options": {"hidden": [30, 20, 20]}}
    spec = {"name": "collapse", "scores": ["synflow", "synflow"], "steps": [1, 100]}
    one, many = probed(spec, model=model)
    assert one["critical"] < many["critical"]
    assert many["critical"] > float(many["most"]) - 0.25


def test_the_transfer_matrix_has_a_dark_diagonal() -> None:
    rows = probed({"name": "transfer", "clients": 3, "density": 0.5, "examples": 20, "pretraining": 20})
    assert len(rows) == 3 * 5
    assert all(r["dark"] == 1 for r in rows if r["source"] == r["target"])
    assert all(r["shift"] == 0 for r in rows if r["source"] == r["target"])
    assert {r["source"] for r in rows if "shift" not in r} == {"all data", "theta_0 itself"}


def test_pretrained_tickets_go_down_by_tenths_of_the_original() -> None:
    rows = probed({"name": "pretrained", "clients": 2, "examples": 20, "pretraining": 10})
    size = rows[0]["size"]
    for r in rows:
        assert abs(r["kept"] - (1 - r["round"] / 10) * size) <= 1
    assert {(r["client"], r["arm"]) for r in rows} == {(c, a) for c in (0, 1) for a in ("ticket", "random")}


def test_neurons_at_equilibrium_never_move_and_the_bytes_say_so() -> None:
    rows = probed({"name": "equilibrium", "epochs": 5, "examples": 100, "held_out": 20, "epsilon": 0.05})
    assert rows[0]["frozen"] == rows[1]["frozen"] == 0
    assert any(r["frozen"] > 0 for r in rows)
    for r in rows:
        assert r["moved"] == 0
        assert r["upload_bytes"] == 4 * round((1 - r["frozen"]) * r["parameters"])


def test_theories_give_rows() -> None:
    rows = probed({"name": "tangent", "iterations": 10, "halvings": 2, "examples": 20})
    assert all(r["ratio"] > 2 and r["at_zero"] == 0 for r in rows if "ratio" in r)
    (row,) = probed({"name": "spectral_gap", "side": 3, "hidden": 4, "examples": 60, "most": 0.5})
    assert row["ascending"] == "True" and row["kept"] <= row["weights"] / 2
    rows = probed({"name": "subset_sums", "k": [2], "errors": [0.05], "draws": 3})
    assert rows[0]["needed"] >= rows[0]["bound"]


def test_a_pooled_bench_is_small_and_its_own() -> None:
    bench = tiny.bench()
    small = pooled(bench, side=2, hidden=3)
    assert small.layout.num_prunable == 4 * 3 + 3 * 4
    assert bench.layout.num_prunable != small.layout.num_prunable
    assert torch.allclose(
        small.parts["test"].tensor.mean((1, 2, 3)), bench.parts["test"].tensor.mean((1, 2, 3)), atol=1e-5
    )


def test_clients_are_the_same_for_every_seed() -> None:
    one, other = tiny.bench(seed=0), tiny.bench(seed=1)
    deal(one, 3, 0.5, most=20)
    deal(other, 3, 0.5, most=20)
    for name, part in one.parts.items():
        assert torch.equal(part.tensor, other.parts[name].tensor) and torch.equal(part.y, other.parts[name].y)
