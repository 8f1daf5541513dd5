"""The table of probes: what else a lottery study can measure, each a frozen part called with the bench of a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from fedlth.lab.bench import Bench
from fedlth.lab.equilibrium import NeuronsAtEquilibrium
from fedlth.lab.instability import Instability
from fedlth.lab.masks import Overlap, Settling
from fedlth.lab.rewinds import Rewinds
from fedlth.lab.robustness import Attack
from fedlth.lab.sensitivity import Collapse, Conservation, Exact
from fedlth.lab.theory import SpectralGap, SubsetSums, TangentSpace
from fedlth.lab.transfer import Pretrained, Transfer


class Probe(Protocol):
    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        """Yield rows: what was measured as floats, all else (names, counts) as text and integers."""
        ...


PROBES: dict[str, Callable[..., Probe]] = {
    "instability": Instability,
    "overlap": Overlap,
    "settling": Settling,
    "rewinds": Rewinds,
    "attack": Attack,
    "exact": Exact,
    "conservation": Conservation,
    "collapse": Collapse,
    "tangent": TangentSpace,
    "spectral_gap": SpectralGap,
    "subset_sums": SubsetSums,
    "equilibrium": NeuronsAtEquilibrium,
    "pretrained": Pretrained,
    "transfer": Transfer,
}
