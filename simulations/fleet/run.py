"""python run.py OUT: run every method on the fleet, with dense kernels and with sparse ones, and print what it takes.

A run that has ended is not run again: the same command goes on after a stop, or only prints the tables.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedlth import api
from fedlth.report.choice import main_choice, rows_of
from fedlth.report.facts import Facts, read_run
from fedlth.report.fleet import duration, simulated_s, time_to
from fedlth.report.traffic import SERVER, clients_of

STUDY = Path(__file__).parent / "study.yaml"
OPEN = "method.val_accuracy=-1.0"  # every prune happens: what costs are compared at is a density that is reached
TICKETS = ["method=two_step", "finder.densities=[0.5,0.2,0.1]", "personalise.arms=[ticket,global_mask,random]"]
REFINE = ["refine.rounds=10", "refine.clients_per_round=8"]
RUNS = {
    "FedAvg, fine-tuned": ["personalise.arms=[dense,global]"],
    "LotteryFL .5": ["method=lotteryfl", OPEN, "method.density=0.5", "personalise.arms=[own_tuned]"],
    "LotteryFL .2": ["method=lotteryfl", OPEN, "method.density=0.2", "personalise.arms=[own_tuned]"],
    "Sub-FedAvg .5": ["method=sub_fedavg", OPEN, "method.distance=-1.0", "method.density=0.5", "method.rate=0.2",
                      "personalise.arms=[own_tuned]"],
    "Sub-FedAvg .2": ["method=sub_fedavg", OPEN, "method.distance=-1.0", "method.density=0.2", "method.rate=0.2",
                      "personalise.arms=[own_tuned]"],
    "two_step, auto": [*TICKETS, "finder.main=auto", *REFINE],
    "two_step, capacity": [*TICKETS, "finder.main=capacity", *REFINE],
}  # fmt: skip
LAST = 10  # rounds in which every mask has reached its density
LITTLE = 0.1
TARGETS = (0.5, 0.7)


def facts_of(out: Path, name: str, flops: str) -> Facts:
    """Return the facts of one run, which runs now if it has not."""
    run = out / f"{name.replace(' ', '_').replace(',', '')}-{flops}"
    if (run / "config.yaml").exists():
        api.resume(run)
    else:
        api.run(api.load(STUDY, [*RUNS[name], f"fleet.flops={flops}", f"out={run}"]))
    return read_run(run)


@dataclass(frozen=True)
class Visit:
    """The mean visit of the last rounds in which updates are joined: bytes both ways, FLOPs, seconds by tier."""

    moved: float
    flops: float
    seconds: dict[str, float]


def visit_of(facts: Facts, speeds: dict[str, tuple[float, float, float]], flops_s: float) -> Visit:
    phase = [p.name for p in facts.header.phases if p.joins][-1]
    last = max(row.round for row in facts.rounds if row.phase == phase) - LAST
    moved: dict[tuple[int, int], int] = {}
    for row in facts.ledger:
        if row.phase == phase and row.round > last:
            key = row.round, clients_of(row)[0]
            moved[key] = moved.get(key, 0) + row.payload_bytes
    seconds: dict[str, list[float]] = {}
    flops = []
    for one in facts.times:
        if one.phase != phase or one.round <= last or one.client is None or one.simulated_s is None:
            continue
        tier = facts.header.client_tiers[one.client]
        speed, rate, latency = speeds[tier]
        seconds.setdefault(tier, []).append(one.simulated_s)
        link = 2 * latency + moved[one.round, one.client] / rate
        flops.append((one.simulated_s - link) * speed * flops_s)
    means = {tier: float(np.mean(found)) for tier, found in seconds.items()}
    return Visit(float(np.mean(list(moved.values()))), float(np.mean(flops)), means)


def limit(dense: Visit, sparse: Visit, power: float) -> str:
    """Return the link (both ways) above which a visit saves less than LITTLE of its time on the reference device."""
    bytes_less, flops_less = dense.moved - sparse.moved, dense.flops - sparse.flops
    # saved = (bytes_less / r + flops_less / power) / (moved / r + flops / power) = LITTLE, solved for r
    over, under = bytes_less - LITTLE * dense.moved, (LITTLE * dense.flops - flops_less) / power
    if under <= 0:
        return "never"  # what it trains less is enough, on any link
    return f"{8e-6 * over / under:,.1f} Mbit/s" if over > 0 else "any link"


def main(out: Path) -> None:
    study = api.load(STUDY)
    assert study.fleet is not None
    power = study.fleet.flops_s
    tiers = {t.name: (t.speed, t.down_bytes_s or 0.0, t.latency_s or 0.0) for t in study.clients.capacity}
    runs = {flops: {name: facts_of(out, name, flops) for name in RUNS} for flops in ("dense", "alive")}
    first = next(iter(RUNS))
    last = " | ".join(f"to {100 * target:.0f} % val" for target in TARGETS)
    print(f"| method | density | test % | MB up | MB down | step 1 | step 1, alive | step 2 | {last} |")
    print("|---|" + "---:|" * 9)
    for name, facts in runs["dense"].items():
        alive = runs["alive"][name]
        kept = list(rows_of(facts, main_choice((facts,))).values())
        up, down = (
            sum(r.payload_bytes for r in facts.ledger if (r.receiver == SERVER) == way) / 1e6 for way in (True, False)
        )
        cells = (
            f"{np.mean([r.density for r in kept]):.2g}", f"{100 * np.mean([r.test_accuracy for r in kept]):.1f}",
            f"{up:.1f}", f"{down:.1f}", duration(simulated_s(facts, step=1)), duration(simulated_s(alive, step=1)),
            duration(simulated_s(facts, step=2)), *(duration(time_to(facts, target)) for target in TARGETS),
        )  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")
    visits = {flops: {name: visit_of(facts, tiers, power) for name, facts in of.items()} for flops, of in runs.items()}
    print(f"\nOne visit of the last {LAST} federated rounds, in seconds, and as a share of FedAvg's:\n")
    print(f"| method | flops | kB both ways | MFLOP | {' | '.join(tiers)} | little saved above |")
    print("|---|---|" + "---:|" * (len(tiers) + 3))
    for flops, of in visits.items():
        dense = of[first]
        for name, visit in of.items():
            shares = (f"{visit.seconds[t]:.2f} ({visit.seconds[t] / dense.seconds[t]:.2f})" for t in tiers)
            # dense kernels take equal time, whatever clients were sampled in the rounds of either
            alike = replace(visit, flops=dense.flops) if flops == "dense" else visit
            last = "" if name == first else limit(dense, alike, power)
            cells = (f"{visit.moved / 1e3:.0f}", f"{visit.flops / 1e6:.0f}", *shares, last)
            print(f"| {name} | {flops} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
