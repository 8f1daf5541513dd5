"""What noisy steps add up to: (epsilon, delta) of examples, by opacus' Renyi accountant.

Mironov, Talwar, Zhang, Renyi Differential Privacy of the Sampled Gaussian Mechanism, arXiv 1908.10530. It assumes what
`dp_sgd` does: in each step every example is in the batch on its own, with the step's rate; noise is drawn anew.
Neighbours differ by one example that is there or not.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache

from fedlth.errors import require
from fedlth.training.dp_sgd import EXTRA, DpSgd, rate

ACCOUNTANT = "rdp"


def epsilon(dp: DpSgd, num_examples: int, steps: Mapping[int, int]) -> float:
    """Return the epsilon of a client's training examples after so many noisy steps by batch size; 0 after none."""
    rates = {size: rate(num_examples, size) for size in steps}
    history = sorted((rates[size], count) for size, count in steps.items() if count)
    return _epsilon(dp.noise_multiplier, dp.delta, tuple(history)) if history else 0.0


@cache
def _epsilon(noise_multiplier: float, delta: float, history: tuple[tuple[float, int], ...]) -> float:
    require("privacy.dp", "opacus", extra=EXTRA)
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, count) for sample_rate, count in history]
    with warnings.catch_warnings():
        # Where the best of its orders is the first or last: the bound holds, another order might be tighter.
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        return float(accountant.get_epsilon(delta=delta))
