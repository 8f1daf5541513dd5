"""Rows 14 to 29: pre-trained tickets, boosting, early tickets, scores at initialisation, learned masks, attacks."""

from __future__ import annotations

import numpy as np
from facts import Facts, Outcome, pt


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
        held &= shuffled >= own - 0.005 and moved < ticket
        scores = ", ".join(
            f"{s} {pt(pai.mean(s, number))} (shuffled {pt(pai.mean(s + '_shuffled', number))}, reinit "
            f"{pt(pai.mean(s + '_reinit', number))})"
            for s in ("snip", "grasp")
        )
        told.append(
            f"{density}: SynFlow {pt(own)} (shuffled {pt(shuffled)}, reinit {pt(reinit)}), {scores}, magnitude "
            f"{pt(pai.mean('magnitude', number))}, random {pt(pai.mean('random', number))}; IMP {pt(ticket)} "
            f"(shuffled {pt(moved)})"
        )
    told.append(f"inverted SNIP at 21 % {pt(pai.mean('snip_inverted', 1))}")
    return Outcome(held, "; ".join(told))


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


ROWS = (
    (19, "SNIP, GraSP", "SNIP's rank correlation with |L(w) - L(w without i)| >= 0.9; GraSP against explicit H < 1e-4",
     ("exact",), row_19),
    (20, "SynFlow", "layer sums agree to 1e-5; same mask for other data; no empty layer at 10^4.5 where SNIP x1 and "
     "SynFlow x1 have one", ("synflow",), row_20),
    (21, "sanity checks at init", "shuffled SynFlow >= SynFlow - 0.5 pt, whereas shuffled IMP < IMP", ("pai", "imp"),
     row_21),
    (28, "attack", "robust(0) = clean; no rise with eps; PGD <= FGSM", ("imp",), row_28),
)  # fmt: skip
