"""What a ticket costs to find and saves to train, against its dense twin in the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlth.report.choice import Choice, rows_of, same_density
from fedlth.report.facts import Facts, grouped
from fedlth.report.results import Results, alive_flops
from fedlth.storage.records import Work

CPU, GFLOP = "CPU s", "GFLOP"
MEASURE = {CPU: "in CPU time, as measured", GFLOP: "in FLOPs, as counted"}
SHORT_S = 0.05  # an epoch of fewer CPU seconds: two runs of equal bits have told 5 and 242 rounds


@dataclass(frozen=True)
class Cost:
    """One client's mean cost of `unit`: an epoch of its dense twin, an epoch in its ticket, and the search.

    The search is every training before the last one, which any model would need.
    """

    unit: str
    dense: float
    ticket: float
    search: float

    def rounds(self, epochs: float) -> float:
        """Return after how many rounds of `epochs` epochs the ticket has paid for its search; inf for never."""
        saved = (self.dense - self.ticket) * epochs
        return self.search / saved if saved > 0 else math.inf


def costs(results: Results) -> tuple[Cost, ...]:
    """Return the cost of the run's main arm in CPU seconds, where they were measured, and in FLOPs.

    Empty where the main arm is no sparse model that was searched for.
    """
    choice = results.main
    if choice is None or choice.target_density >= 1:
        return ()
    found = (_cpu(results.group, choice), _flops(results, choice))
    return tuple(cost for cost in found if cost is not None)


def cost_text(results: Results) -> str:
    """Return the costs as sentences, "" where nothing was measured; a round is as long as `train` says."""
    epochs = _round_epochs(results.group[0])
    many = f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"
    parts = []
    for cost in costs(results):
        rounds = cost.rounds(epochs)
        paid = "a ticket never pays for its search"
        if math.isfinite(rounds):
            paid = f"a ticket has paid for its search after {math.ceil(rounds)} rounds of {many}"
        short = cost.unit == CPU and cost.dense < SHORT_S
        parts.append(
            f"An epoch inside the ticket takes {cost.ticket:.3g} {cost.unit} a client, its dense twin "
            f"{cost.dense:.3g} ({cost.ticket / cost.dense:.2f} of it); the search took {cost.search:.3g}: "
            f"{MEASURE[cost.unit]}, {paid}."
            + (" Trainings as short as these are fixed costs and noise for the most part." if short else "")
        )
    return " ".join([*parts, *_evaluation(results)])


def _evaluation(results: Results) -> list[str]:
    """Say how much of the clients' CPU time evaluation takes, by phase in which trainings were timed."""
    found: dict[str, list[tuple[float, float]]] = {}
    for phase in results.group[0].header.phases:
        times = (row for facts in results.group for row in facts.times if row.phase == phase.name)
        work = [one for row in times for one in row.work]
        evaluated = sum(one.cpu_s for one in work if one.evaluated is not None)
        trained = sum(one.cpu_s for one in work if one.density is not None)
        if evaluated and trained:
            place = "in step 1" if phase.step == 1 else "in refinement" if phase.joins else "in step 2"
            found.setdefault(place, []).append((evaluated, evaluated + trained))
    sums = {place: np.sum(spent, axis=0) for place, spent in found.items()}
    shares = [f"{100 * evaluated / both:.1f} % {place}" for place, (evaluated, both) in sums.items()]
    return [f"Of the CPU time of training and evaluation, evaluation takes {', '.join(shares)}."] if shares else []


def _round_epochs(facts: Facts) -> float:
    """Return the epochs of a client's training in a round; of one in steps, what its trainings came to."""
    import yaml

    train = (yaml.safe_load(facts.config) or {}).get("train", {})
    if not train.get("steps"):
        return int(train.get("epochs") or 1)
    rounds = {phase.name for phase in facts.header.phases if phase.step == 1}
    done = [one.epochs for row in facts.times if row.phase in rounds for one in row.work if one.epochs]
    return float(np.mean(done)) if done else 1.0


def _cpu(group: tuple[Facts, ...], choice: Choice) -> Cost | None:
    """Return means over clients of each client's own means: who was sampled more often counts no more for it."""
    clients: list[tuple[float, float, float]] = []
    work_of = grouped(((f.header.seed, row.client), one) for f in group for row in f.times for one in row.work)
    own: dict[tuple[int, int | None], float] = {
        (f.header.seed, client): density for f in group if choice.chosen for client, density in f.chosen.items()
    }
    for client, work in work_of.items():
        target = own.get(client, choice.target_density)
        dense = [one for one in work if one.density == 1]  # a count over itself, so exactly 1
        inside = [one for one in work if one.density and abs(one.density / target - 1) < 0.05]
        searches = [
            one.cpu_s - (one.last_cpu_s or 0.0)
            for one in work
            if one.arm == choice.arm and same_density(one.target_density or 0.0, target)
        ]
        if dense and inside and searches:
            clients.append((_an_epoch(dense), _an_epoch(inside), float(np.mean(searches))))
    if not clients:
        return None
    return Cost(CPU, *(float(mean) for mean in np.mean(clients, axis=0)))


def _an_epoch(trainings: Sequence[Work]) -> float:
    return float(np.mean([one.cpu_s / (one.epochs or 1.0) for one in trainings]))


def _flops(results: Results, choice: Choice) -> Cost | None:
    """Count 3 forwards an example, dense for the twin, by what is alive for the ticket."""
    dense, inside, searches = [], [], []
    for facts in results.group:
        for row in rows_of(facts, choice).values():
            if row.diverged:
                continue
            alive = alive_flops(facts.header, row)
            if alive is None or not row.epochs or not row.search_epochs:
                return None
            dense.append(3 * row.num_train * facts.header.network(row.client)[1])
            inside.append(3 * row.num_train * alive)
            searches.append(row.train_flops_effective - inside[-1] * row.epochs)
    if not dense or max(searches) <= 0:
        return None
    giga = 1e-9
    return Cost(GFLOP, giga * float(np.mean(dense)), giga * float(np.mean(inside)), giga * float(np.mean(searches)))
