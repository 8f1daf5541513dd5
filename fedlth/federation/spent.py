"""A run's noisy steps added up, client by client (privacy.dp)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from fedlth.experiment.experiment import Experiment
from fedlth.storage.records import DROPPED, RoundRow
from fedlth.storage.spent_privacy import Spent, SpentPrivacy
from fedlth.training.dp_accountant import ACCOUNTANT, epsilon
from fedlth.training.study_recipe import recipes

Steps = Counter[int]  # noisy steps by mean batch size


def spent_by(experiment: Experiment, rounds: Iterable[RoundRow]) -> SpentPrivacy | None:
    """Return what all rounds have spent, void ones and answers that came late included; None where nothing is noisy.

    An answer that was not used may have reached somebody: its visit counts as the longest that its phase has had.
    """
    dp = recipes(experiment.study)[0].dp
    if dp is None:
        return None
    told, assumed = _added_up(rounds)
    found = []
    for client in sorted({*told, *assumed}):
        examples = len(experiment.task.splits.clients[client].train)
        steps, more = told[client], assumed[client]
        found.append(
            Spent(client, examples, steps.total(), more.total(), epsilon(dp, examples, steps + more))
        )  # fmt: skip
    return SpentPrivacy(dp.noise_multiplier, dp.max_grad_norm, dp.delta, ACCOUNTANT, "poisson", found)


def _added_up(rounds: Iterable[RoundRow]) -> tuple[dict[int, Steps], dict[int, Steps]]:
    """Return each client's steps: those that it told of, and those that a visit without a word is taken for."""
    told, assumed = defaultdict[int, Steps](Steps), defaultdict[int, Steps](Steps)
    longest, silent = dict[str, Steps](), list[tuple[str, int]]()
    for row in rounds:
        visits = defaultdict[int, Steps](Steps)
        for one in row.noisy:
            visits[one.client][one.batch_size] += one.steps
        for client, steps in visits.items():
            told[client] += steps
            longest[row.phase] = max(longest.get(row.phase, Steps()), steps, key=Steps.total)
        silent += [(row.phase, f.client) for f in row.failed if f.kind != DROPPED and f.client not in visits]
    for phase, client in silent:
        assumed[client] += longest.get(phase, Steps())
    return told, assumed
