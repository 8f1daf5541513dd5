"""Rows 14 to 29: pre-trained tickets, boosting, early tickets, scores at initialisation, learned masks, attacks."""

from __future__ import annotations

import numpy as np
from facts import Facts, Outcome, pt


def row_14(pretrained: Facts) -> Outcome:
    rows = pretrained.probe("pretrained")
    rounds = {r["round"]: r["kept"] / r["size"] for r in rows}
    size = rows[0]["size"]
    exact = all(abs(r["kept"] - (1 - r["round"] / 10) * size) <= 1 for r in rows)
    told, passed = [], True
    for client in sorted({r["client"] for r in rows}):

        def at(arm: str, n: int, client: int = client) -> np.ndarray:
            keep = [r for r in rows if (r["client"], r["arm"], r["round"]) == (client, arm, n)]
            return np.array([r["accuracy"] for r in keep])

        full = at("ticket", 0)
        std = float(full.std(ddof=1))
        good = [n for n in sorted(rounds) if at("ticket", n).mean() >= full.mean() - std]
        top = good[-1]
        random = at("random", top).mean()
        passed &= random <= full.mean() - 3 * std
        told.append(
            f"client {client}: full {pt(full.mean())} +- {pt(std)}; sparsest passing {10 * top} %: ticket "
            f"{pt(at('ticket', top).mean())}, random {pt(random)}"
        )
    return Outcome(exact and passed, f"counts exact: {'yes' if exact else 'no'}; " + "; ".join(told))


def row_15(transfer: Facts) -> Outcome:
    rows = transfer.probe("transfer")
    seeds = len({r["seed"] for r in rows})
    dark = {
        s: sum(r["dark"] for r in rows if r["source"] == s) / seeds for s in dict.fromkeys(r["source"] for r in rows)
    }
    diagonal = all(r["dark"] == 1 for r in rows if r["source"] == r["target"])
    clients = [v for s, v in dark.items() if s.startswith("client")]
    told = ", ".join(f"{s} {v:.1f}" for s, v in dark.items())
    return Outcome(dark["all data"] >= max(clients) and diagonal, f"dark cells a row of 5, mean over seeds: {told}")


def row_16(boosting: Facts) -> Outcome:
    es = {
        "full": boosting.mean("winning", 0, "early_stop"),
        "winning": boosting.mean("winning", 1, "early_stop"),
        "boosting": boosting.mean("boosting", 1, "early_stop"),
        "boosting, reinit": boosting.mean("boosting_reinit", 1, "early_stop"),
        "dense, warm-up": boosting.mean("dense_warm_up", 1, "early_stop"),
    }
    acc = {
        "full": boosting.mean("winning", 0), "winning": boosting.mean("winning", 1),
        "boosting": boosting.mean("boosting", 1), "boosting, reinit": boosting.mean("boosting_reinit", 1),
        "dense, warm-up": boosting.mean("dense_warm_up", 1),
    }  # fmt: skip
    near = max(abs(acc["boosting"] - acc["winning"]), abs(acc["boosting"] - acc["full"])) <= 0.003
    told = ", ".join(f"{n} {es[n]:.0f} ({pt(acc[n])})" for n in es)
    return Outcome(es["boosting"] < es["winning"] < es["full"] and near, f"early stop (accuracy): {told}")


def row_17(robust: Facts) -> Outcome:
    def reached(row: dict, level: float) -> float:
        return next((point[0] for point in row["curve"] if point[2] >= level), float("inf"))

    told, held = [], True
    find = 2 * robust.trainings("fgsm", 0)[0]["curve"][-1][0]  # FGSM: one pass for the attack, one for the step
    for dense in robust.trainings("pgd", 0):
        level = dense["curve"][-1][2] - 0.01
        ticket = next(r for r in robust.trainings("boosting", 1) if r["seed"] == dense["seed"])
        own, plain = find + 11 * reached(ticket, level), 11 * reached(dense, level)
        held &= own < plain
        told.append(f"R = {pt(level)}: {own:.0f} against {plain:.0f}")
    final = {a: np.mean([r["curve"][-1][2] for r in robust.trainings(a, n)]) for a, n in
             (("pgd", 0), ("pgd", 1), ("boosting", 1), ("boosting_reinit", 1))}  # fmt: skip
    dense = np.mean([r["curve"][-1][2] for r in robust.trainings("pgd", 0)])
    return Outcome(
        held,
        f"passes (find + retrain against dense PGD), by seed: {'; '.join(told)}. PGD-10 validation accuracy at "
        f"the end: dense {pt(dense)}, ticket by PGD {pt(final['pgd'])}, boosting "
        f"{pt(final['boosting'])}, its mask with new "
        f"weights {pt(final['boosting_reinit'])}",
    )


def row_18(early: Facts) -> Outcome:
    drawn, later = ([r["trainings"] for r in early.trainings(a, 1)] for a in ("early_bird", "in_each_layer"))
    fan = {"features.0.weight": 9, "features.4.weight": 144, "features.8.weight": 288}
    layers = {a: [[r["layer_kept"][e] / n for e, n in fan.items()] for r in early.trainings(a, 1)] for a in
              ("early_bird", "in_each_layer")}  # fmt: skip
    channels = [sum(kept) for kept in layers["early_bird"]]
    rows = early.probe("settling")
    by = {(r["seed"], r["iteration"], r["other"]): r["distance"] for r in rows}
    metric = all(0 <= d <= 1 and by[s, j, i] == d and (i != j or d == 0) for (s, i, j), d in by.items())
    half = all(5 <= d < 10 for d in drawn)
    first = np.mean([d for (s, i, j), d in by.items() if (i, j) == (100, 200)])
    late = np.mean([d for (s, i, j), d in by.items() if (i, j) == (900, 1000)])
    acc = {a: pt(early.mean(a, 1)) for a in dict.fromkeys(r["arm"] for r in early.rows if "arm" in r)}
    told = (
        f"drawn after epoch {sorted(drawn)} of 20; channels kept {[f'{c:g}' for c in channels]} of 80, by layer (of "
        f"16, 32, 32) {_counts(layers['early_bird'])}; distance of epochs 1 and 2 {first:.3f}, of 9 and 10 {late:.3f}; "
        f"accuracy: dense {acc['dense']}, drawn early {acc['drawn_early']} (from theta_0 "
        f"{acc['drawn_early_from_theta_0']}), random channels, as many a layer, {acc['random_channels']}; one list a "
        f"layer, {_counts(layers['in_each_layer'])}: drawn after epoch {sorted(later)}, {acc['drawn_in_each_layer']}, "
        f"random channels {acc['random_in_each_layer']}"
    )
    return Outcome(half and metric and all(abs(count - 40) <= 1 for count in channels), told)


def _counts(layers: list[list[float]]) -> str:
    return " and ".join(dict.fromkeys("-".join(f"{n:g}" for n in kept) for kept in layers))


def row_19(exact: Facts) -> Outcome:
    rank = min(r["snip_rank"] for r in exact.probe("exact"))
    error = max(r["grasp_error"] for r in exact.probe("exact"))
    size = exact.probe("exact")[0]["weights"]
    return Outcome(
        rank >= 0.9 and error < 1e-4, f"{size} weights: least rank correlation {rank:.3f}, largest error {error:.1e}"
    )


def row_20(synflow: Facts) -> Outcome:
    spread = max(r["spread"] for r in synflow.probe("conservation"))
    differing = max(r["differing"] for r in synflow.probe("conservation"))

    def critical(score: str, steps: int) -> list[float]:
        rows = synflow.probe("collapse", lambda r: (r["score"], r["steps"]) == (score, steps))
        return [r["critical"] for r in rows]

    flow, one, snip = critical("synflow", 100), critical("synflow", 1), critical("snip", 1)
    told = ", ".join(
        f"{s} x{n} 10^{min(critical(s, n)):g}"
        for s, n in (("magnitude", 1), ("random", 1), ("snip", 1), ("snip", 30), ("synflow", 1), ("synflow", 100))
    )
    return Outcome(
        spread < 1e-5 and differing == 0 and min(flow) >= 4.5 and max(snip) < 4.5 and max(one) < 2,
        f"spread {spread:.0e}; other data change {differing:.0f} weights; no empty layer up to (least seed): {told}",
    )


def row_21(pai: Facts, imp: Facts) -> Outcome:
    told, held = [], True
    for density, number, rung in (("21 %", 1, 7), ("8.6 %", 2, 11)):
        own, shuffled, reinit = (pai.mean(a, number) for a in ("synflow", "synflow_shuffled", "synflow_reinit"))
        ticket, moved = imp.mean("imp", rung), imp.mean("shuffle", rung)
        here = shuffled >= own - 0.005 and moved < ticket
        held &= here
        scores = ", ".join(
            f"{s} {pt(pai.mean(s, number))} (shuffled {pt(pai.mean(s + '_shuffled', number))}, reinit "
            f"{pt(pai.mean(s + '_reinit', number))})"
            for s in ("snip", "grasp")
        )
        told.append(
            f"{density} ({'held' if here else 'not held'}): SynFlow {pt(own)} (shuffled {pt(shuffled)}, reinit "
            f"{pt(reinit)}), {scores}, magnitude {pt(pai.mean('magnitude', number))}, "
            f"random {pt(pai.mean('random', number))}; IMP {pt(ticket)} "
            f"(shuffled {pt(moved)})"
        )
    told.append(f"inverted SNIP at 21 % {pt(pai.mean('snip_inverted', 1))}")
    return Outcome(held, "; ".join(told))


def row_22(theory: Facts) -> Outcome:
    rows = theory.probe("tangent", lambda r: "ratio" in r)
    least = min(r["ratio"] for r in rows)
    zero = max(r["at_zero"] for r in rows)
    tuned = theory.probe("tangent", lambda r: "linear" in r)
    mean = {k: np.mean([r[k] for r in tuned]) for k in ("before", "linear", "network")}
    return Outcome(
        least >= 2.3 and zero == 0,
        f"ReLU, ratios {least:.2f} to {max(r['ratio'] for r in rows):.2f}, at 0 {zero:g}; fine-tuned for an epoch: "
        f"before {pt(mean['before'])}, linearised {pt(mean['linear'])}, network {pt(mean['network'])}",
    )


def row_23(strong: Facts) -> Outcome:
    best, dense = strong.mean("edge_popup", 1), strong.mean("untrained_dense", 1)
    gap = max(r["furthest"] for r in strong.probe("frozen"))
    exact = all(
        abs(kept - d * {"1.weight": 235200, "3.weight": 30000, "5.weight": 1000}[name]) <= 0.5
        for n, d in enumerate((0.5, 0.2), 1)
        for row in strong.trainings("edge_popup", n)
        for name, kept in row["layer_kept"].items()
    )
    return Outcome(
        best >= 0.8 and dense <= 0.2 and gap == 0 and exact,
        f"edge-popup kept 50 % {pt(best)}, 20 % {pt(strong.mean('edge_popup', 2))}; biprop at 50 % "
        f"{pt(strong.mean('biprop', 1))}; untrained: dense {pt(dense)}, random half "
        f"{pt(strong.mean('untrained_random', 1))}; weights moved by {gap:g}; the mask trained from signed constants "
        f"{pt(strong.mean('fine_tuned', 1))}",
    )


def row_24(theory: Facts) -> Outcome:
    def needed(k: int, error: str, key: str = "needed") -> list[float]:
        return [r[key] for r in theory.probe("subset_sums", lambda r: (r["k"], r["error"]) == (k, error))]

    few, many = needed(3, "0.01"), needed(3, "0.001")
    held = all(13 <= n <= 24 for n in few) and all(b > a for a, b in zip(few, many, strict=True))
    held &= all(r["needed"] >= r["bound"] for r in theory.probe("subset_sums"))
    least = ", ".join(f"{needed(3, error, 'bound')[0]:.1f}" for error in ("0.01", "0.001"))
    return Outcome(held, f"n* by seed: k = 3, error .01: {few}; .001: {many}; bounds {least}")


def row_26(theory: Facts) -> Outcome:
    rows = theory.probe("spectral_gap")
    ticket, random, dense = (np.mean([r[k] for r in rows]) for k in ("ticket", "random", "dense"))
    held = ticket >= random and all(r["ascending"] == "True" for r in rows)
    kept = ", ".join(f"{r['kept']:g} of {r['weights']}" for r in rows)
    return Outcome(bool(held), f"kept {kept}; dense {pt(dense)}, ticket {pt(ticket)}, random {pt(random)}")


def row_27(theory: Facts) -> Outcome:
    rows = theory.probe("equilibrium")
    last = max(r["epoch"] for r in rows)
    held, told = True, []
    for seed in sorted({r["seed"] for r in rows}):
        own = sorted((r for r in rows if r["seed"] == seed), key=lambda r: r["epoch"])
        held &= own[0]["frozen"] == 0 and own[-1]["frozen"] > own[2]["frozen"]
        held &= all(
            r["moved"] == 0 and r["upload_bytes"] == 4 * round((1 - r["frozen"]) * r["parameters"]) for r in own
        )
    final = [r for r in rows if r["epoch"] == last]
    acc, base = np.mean([r["accuracy"] for r in final]), np.mean([r["baseline"] for r in final])
    held &= acc >= base - 0.005
    for e in (1, 3, 6, 9, last):
        told.append(f"epoch {e} {pt(np.mean([r['frozen'] for r in rows if r['epoch'] == e]))} %")
    return Outcome(bool(held), f"frozen: {', '.join(told)}; accuracy {pt(acc)}, baseline {pt(base)}")


def row_28(imp: Facts) -> Outcome:
    def accuracy(network: str, attack: str, eps: str) -> float:
        rows = imp.probe("attack", lambda r: (r["network"], r["attack"], r["eps"]) == (network, attack, eps))
        return float(np.mean([r["robust_accuracy"] for r in rows]))

    rows = imp.probe("attack")
    strengths = sorted({r["eps"] for r in rows}, key=float)
    by = {(r["seed"], r["network"], r["attack"], r["eps"]): r["robust_accuracy"] for r in rows}
    falling = all(
        by[s, n, a, one] >= by[s, n, a, other]
        for s, n, a, _ in by
        for one, other in zip(strengths, strengths[1:], strict=False)
    )
    stronger = all(by[s, n, "pgd", e] <= by[s, n, "fgsm", e] for s, n, _, e in by)
    clean = all(by[s, n, "fgsm", "0"] == by[s, n, "pgd", "0"] for s, n, _, _ in by)
    names = list(dict.fromkeys(r["network"] for r in rows))
    told = "; ".join(
        f"{n}: clean {pt(accuracy(n, 'pgd', '0'))}, FGSM {pt(accuracy(n, 'fgsm', '0.05'))}, PGD "
        f"{pt(accuracy(n, 'pgd', '0.05'))}" for n in names
    )  # fmt: skip
    return Outcome(falling and stronger and clean, f"eps 0.05: {told}")


def row_29(transfer: Facts) -> Outcome:
    from scipy.stats import spearmanr

    rows = transfer.probe("transfer")
    pairs = [r for r in rows if "shift" in r and r["source"] != r["target"]]
    found = spearmanr([r["shift"] for r in pairs], [r["difference"] for r in pairs])
    union = np.mean([r["accuracy"] for r in rows if r["source"] == "all data"])
    clients = np.mean([r["accuracy"] for r in rows if r["source"].startswith("client")])
    itself = np.mean([r["accuracy"] for r in rows if r["source"] == "theta_0 itself"])
    return Outcome(
        found.statistic < 0 and union >= clients,
        f"Spearman of label shift and accuracy change {found.statistic:+.2f} over {len(pairs)} pairs "
        f"(p {found.pvalue:.2f}); mean accuracy with masks of all data {pt(union)}, of clients "
        f"{pt(clients)}, of theta_0 itself {pt(itself)}",
    )


ROWS = (
    (14, "BERT-Tickets", "kept 90, 80, ..., 10 % of the original +- 1 weight; at the sparsest ticket within "
     "1 sd of full, random is >= 3 sd below", ("pretrained",), row_14),
    (15, "universality", "dark cells of the mask of all data >= of any client's; diagonal dark", ("transfer",), row_15),
    (16, "boosting", "es(boosting) < es(winning) < es(full), accuracies within 0.3 pt", ("boosting",), row_16),
    (17, "boosting, adversarial", "find + retrain to R costs fewer passes than dense PGD to R = its PGD accuracy "
     "- 1 pt, every seed", ("robust",), row_17),
    (18, "Early-Bird", "drawn after 5 looks and before half of the epochs, half of the channels +- 1; distance in "
     "[0, 1], symmetric, 0 to itself",
     ("early_bird",), row_18),
    (19, "SNIP, GraSP", "SNIP's rank correlation with |L(w) - L(w without i)| >= 0.9; GraSP against explicit H < 1e-4",
     ("exact",), row_19),
    (20, "SynFlow", "layer sums agree to 1e-5; same mask for other data; no empty layer at 10^4.5 where SNIP x1 and "
     "SynFlow x1 have one", ("synflow",), row_20),
    (21, "sanity checks at init", "shuffled SynFlow >= SynFlow - 0.5 pt, whereas shuffled IMP < IMP", ("pai", "imp"),
     row_21),
    (22, "tangent space", "remainder falls by >= 2.3 as the step halves, 0 at 0", ("theory",), row_22),
    (23, "strong tickets", "edge-popup at 50 % >= 80 %, untrained dense <= 20 %, weights never move, exact density",
     ("strong",), row_23),
    (24, "subset sums", "n*(3, .01) in [13, 24], n*(3, .001) above it, n* >= the bound", ("theory",), row_24),
    (26, "spectral gap (reconstruction)", "eigenvalues ascend; ticket >= random with as many a layer", ("theory",),
     row_26),
    (27, "neurons at equilibrium", "none frozen in epoch 1, more later, the frozen never move, >= baseline - 0.5 pt, "
     "bytes = (1 - frozen) x full", ("theory",), row_27),
    (28, "attack", "robust(0) = clean; no rise with eps; PGD <= FGSM", ("imp",), row_28),
    (29, "label shift", "Spearman(shift, accuracy change) < 0; masks of all data >= mean of clients'", ("transfer",),
     row_29),
)  # fmt: skip
