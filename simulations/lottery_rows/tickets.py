"""Rows 1 to 13: iterative magnitude pruning, its controls, rewinds, instability, criteria, supermasks."""

from __future__ import annotations

from facts import Facts, Outcome, pt

LADDER = {0: 266200, 1: 213060, 2: 170538, 3: 136511, 4: 109282, 7: 56094, 9: 35981, 11: 23093, 15: 9537, 16: 7650}


def row_1(imp: Facts) -> Outcome:
    kept = {n: {int(v) for v in imp.values("imp", n, "kept")} for n in LADDER}
    return Outcome(all(kept[n] == {LADDER[n]} for n in LADDER), ", ".join(f"{n}: {min(kept[n])}" for n in LADDER))


def row_2(imp: Facts) -> Outcome:
    told, held = [], False
    dense = imp.median("imp", 0)
    for n in (7, 8, 9):
        ticket, reinit, random = (imp.median(arm, n) for arm in ("imp", "reinit", "shuffle"))
        fast, slow = imp.median("imp", n, "early_stop"), imp.median("reinit", n, "early_stop")
        held |= ticket >= reinit + 0.002 and fast < slow and ticket >= dense - 0.003
        told.append(
            f"round {n}: ticket {pt(ticket)} at {fast:.0f}, reinit {pt(reinit)} at {slow:.0f}, random {pt(random)}"
        )
    return Outcome(held, f"dense {pt(dense)}; " + "; ".join(told))


def row_3(imp: Facts) -> Outcome:
    ratio = {n: imp.median("imp", n, "early_stop") / imp.median("imp", 0, "early_stop") for n in imp.rounds("imp")}
    best = min(range(4, 8), key=lambda n: ratio[n])
    up = imp.median("imp", 16, "early_stop") > imp.median("imp", 7, "early_stop")
    return Outcome(
        ratio[best] <= 0.85 and up,
        f"dense stops at {imp.median('imp', 0, 'early_stop'):.0f}; ratio {ratio[best]:.2f} at round {best}; round 7 at "
        f"{imp.median('imp', 7, 'early_stop'):.0f}, round 16 at {imp.median('imp', 16, 'early_stop'):.0f}",
    )


def row_4(imp: Facts) -> Outcome:
    half = imp.mean("imp", 3), imp.mean("one_shot", 1)
    few = imp.mean("imp", 15), imp.mean("one_shot", 3)
    return Outcome(
        few[0] > few[1] and abs(half[0] - half[1]) <= 0.003,
        f"51 %: iterative {pt(half[0])}, one-shot {pt(half[1])}; 3.6 %: {pt(few[0])}, {pt(few[1])}",
    )


def row_5(imp: Facts) -> Outcome:
    rounds = [n for n in imp.rounds("shuffle") if n >= 11]
    pairs = {n: (imp.mean("imp", n), imp.mean("shuffle", n)) for n in rounds}
    told = "; ".join(f"round {n}: ticket {pt(t)}, shuffled {pt(s)}" for n, (t, s) in pairs.items())
    return Outcome(all(s < t for t, s in pairs.values()), told)


def row_6(imp: Facts) -> Outcome:
    rounds = imp.rounds("imp")
    best = max(rounds, key=lambda n: imp.mean("imp", n))
    dense = imp.mean("imp", 0)
    inside = best not in (rounds[0], rounds[-1])
    return Outcome(
        imp.mean("imp", best) >= dense and inside,
        f"dense {pt(dense)}; best {pt(imp.mean('imp', best))} at round {best}; round 16 {pt(imp.mean('imp', 16))}",
    )


def row_7(imp: Facts) -> Outcome:
    base, drops = imp.mean("imp", 8), {}
    for k in (0.5, 1, 2, 3):
        drops[k] = base - imp.mean(f"noise_{k:g}", 8)
    reinit = imp.mean("reinit", 8)
    held = drops[0.5] <= 0.003 and drops[3] >= drops[0.5] and base - drops[3] >= reinit - 0.003
    told = ", ".join(f"{k:g} sigma {pt(base - drop)}" for k, drop in drops.items())
    return Outcome(held, f"round 8: ticket {pt(base)}, {told}, reinit {pt(reinit)}")


def row_8(imp: Facts) -> Outcome:
    ticket, dense = imp.mean("dropout", 7), imp.mean("dropout", 0)
    return Outcome(
        ticket >= dense - 0.003,
        f"with dropout: dense {pt(dense)}, ticket at 21 % {pt(ticket)}; without: {pt(imp.mean('imp', 0))}, "
        f"{pt(imp.mean('imp', 7))}",
    )


def row_9(imp: Facts) -> Outcome:
    found = imp.probe("rewinds")
    gap = max(r["furthest"] for r in found)
    rates = all(r["first_rate"] == r["schedule_there"] for r in found)
    return Outcome(
        gap == 0 and rates, f"{len(found)} rewinds to theta_0, step 300, none + LR replay: largest gap {gap}"
    )


def row_10(imp: Facts) -> Outcome:
    steps = sorted({r["rewind_step"] for r in imp.probe("instability")})
    told, held = [], True
    for number in sorted({r["round"] for r in imp.probe("instability")}):
        line = []
        for k in steps:
            rows = imp.probe("instability", lambda r, k=k, n=number: (r["round"], r["rewind_step"]) == (n, k))
            line.append(sum(r["barrier"] for r in rows) / len(rows))
        held &= line[0] >= line[-1] and line[0] < 0.02
        told.append(f"round {number}: " + ", ".join(f"k={k} {pt(b)} pt" for k, b in zip(steps, line, strict=True)))
    gap = max(r["stored_gap"] for r in imp.probe("instability"))
    return Outcome(held and gap == 0, f"barrier {'; '.join(told)}; ends differ from the stored accuracies by {gap}")


def row_11(criteria: Facts) -> Outcome:
    names = list(dict.fromkeys(r["arm"] for r in criteria.rows if not r["arm"].startswith("supermask")))
    at = {}
    for density, number in (("21 %", 1), ("8.6 %", 2)):
        at[density] = {name: criteria.mean(name, number + (name == "same_sign")) for name in names}
    held = []
    for acc in at.values():
        good = all(acc[n] >= acc["random"] + 0.01 for n in ("large_final", "magnitude_increase", "movement"))
        held.append(good and acc["small_final"] <= acc["random"] and acc["slow_movement"] >= acc["random"])
    told = "; ".join(f"{d}: " + ", ".join(f"{n} {pt(v)}" for n, v in acc.items()) for d, acc in at.items())
    return Outcome(
        held[-1], f"held at 21 %: {'yes' if held[0] else 'no'}, at 8.6 %: {'yes' if held[1] else 'no'}. {told}"
    )


def row_12(imp: Facts) -> Outcome:
    told, held = [], True
    for n in (8, 11):
        zero, frozen, shrunk = (imp.mean(arm, n) for arm in ("imp", "frozen_dead", "zero_if_shrunk"))
        signed, reinit, reshuffle = (imp.mean(arm, n) for arm in ("signed_constant", "reinit", "reshuffle"))
        held &= zero >= frozen and signed >= reinit + 0.002
        told.append(
            f"round {n}: dead zero {pt(zero)}, frozen at init {pt(frozen)}, zero if shrunk {pt(shrunk)}; signed "
            f"constant {pt(signed)}, reshuffled {pt(reshuffle)}, reinit {pt(reinit)}"
        )
    return Outcome(held, "; ".join(told))


def row_13(criteria: Facts) -> Outcome:
    best = max(criteria.rounds("supermask_same_sign"), key=lambda n: criteria.mean("supermask_same_sign", n))
    first = criteria.trainings("supermask_same_sign", best)[0]
    mask, dense = criteria.mean("supermask_same_sign", best), criteria.mean("supermask_large_final", 0)
    plain, random = criteria.mean("supermask_large_final", 1), criteria.mean("supermask_random", 1)
    return Outcome(
        mask >= 0.3 and dense <= 0.2,
        f"nothing trained: dense {pt(dense)}; same-sign mask {pt(mask)} at "
        f"{100 * first['kept'] / first['size']:.0f} %; large_final mask {pt(plain)} and random mask "
        f"{pt(random)} at 21 %",
    )
