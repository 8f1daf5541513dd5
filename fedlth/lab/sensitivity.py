"""Scores at initialisation against what they stand for: differences of the loss, explicit Hessians, conserved flow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad as gradient
from torch.func import hessian
from torch.nn import functional

from fedlth.data.examples import Examples
from fedlth.errors import wrong
from fedlth.lab.bench import Bench, few
from fedlth.lab.search import dry, network_of
from fedlth.models.call import call_with
from fedlth.models.initial import torch_stream
from fedlth.models.layout import Layout, layout_of, read
from fedlth.study.parts import make
from fedlth.tickets.evidence import Evidence
from fedlth.tickets.finder import Finder
from fedlth.tickets.rewind import ToInit
from fedlth.tickets.schedule import Rescore
from fedlth.tickets.scope import Global
from fedlth.tickets.score import SCORES, Score
from fedlth.tickets.sensitivity import Grasp, Snip, SynFlow
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss_probe import LossProbe


def evidence_of(network: LossProbe, layout: Layout, rng: np.random.Generator) -> Evidence:
    """Return what a score sees before any training."""
    floats = network.params.floats[: layout.num_prunable]
    full = np.ones(layout.num_prunable, bool)
    return Evidence(
        layout=layout, init=floats, start=floats, now=floats, mask=full, gradient=network.gradient, rng=rng,
        at_start=network, at_now=network,
    )  # fmt: skip


@dataclass(frozen=True)
class Exact:
    """SNIP against |L(w) - L(w without weight i)|, GraSP against an explicit Hessian, on a net of some fifty weights.

    The net, tanh so that none is dead, sees images pooled to 2 x 2. `snip_rank` is a rank correlation, `grasp_error`
    a relative L2 error.
    """

    examples: int = 200
    hidden: int = 4
    temperature: float = 200.0

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        whole = few(bench.parts["train"], self.examples)
        data = Examples(functional.adaptive_avg_pool2d(whole.tensor, 2).mean(1).flatten(1), whole.y)
        with torch_stream(bench.torch_seed("exact")):
            module = nn.Sequential(
                nn.Linear(4, self.hidden), nn.Tanh(), nn.Linear(self.hidden, bench.dataset.num_classes)
            )
        layout = layout_of(module, ("0.weight", "2.weight"))
        params = read(module, layout)
        weights, loss = _loss_of(module, layout, data)  # before the module's tensors become views of a FlatModel
        network = LossProbe(
            model=FlatModel(module, layout, "cpu"), params=params, data=data, layer_flops=lambda: {},
            order=lambda: bench.rng("exact"), torch_seed=0, batch_size=1,
        )  # fmt: skip
        evidence = evidence_of(network, layout, bench.rng("exact"))
        removed = []
        for i in range(layout.num_prunable):
            without = weights.clone()
            without[i] = 0.0
            removed.append(abs(float(loss(without, 1.0) - loss(weights, 1.0))))
        from scipy.stats import spearmanr

        rank = float(spearmanr(Snip()(evidence), removed).statistic)
        curvature: Any = hessian(lambda w: loss(w, self.temperature))(weights)
        slope = gradient(lambda w: loss(w, self.temperature))(weights)
        wanted = (weights * (curvature @ slope)).numpy()
        found = Grasp(temperature=self.temperature)(evidence)
        error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        yield {"weights": layout.num_prunable, "snip_rank": rank, "grasp_error": error}


def _loss_of(module: nn.Module, layout: Layout, data: Examples) -> tuple[Tensor, Any]:
    """Return the prunable weights in float64, and the loss as a function of them and a temperature."""
    named = {n: p.detach().double().clone() for n, p in module.named_parameters()}
    flat = torch.cat([named[e.name].reshape(-1) for e in layout.prunable])

    def loss(weights: Tensor, temperature: float) -> Tensor:
        parts = {e.name: weights[e.slice].view(e.shape) for e in layout.prunable}
        logits = call_with(module, {**named, **parts}, data.tensor.double())
        return functional.cross_entropy(logits / temperature, data.y)

    return flat, loss


@dataclass(frozen=True)
class Conservation:
    """SynFlow's conserved flow: every layer's scores have the same sum, and no data is looked at.

    `spread` is (largest - smallest) / mean over layers; `differing` counts weights whose mask differs when the
    network is shown other data. Tanaka et al., NeurIPS 2020, arXiv 2006.05467.
    """

    density: float = 0.01

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        network = network_of(bench, bench.theta_0, "synflow")
        score = SynFlow()(evidence_of(network, bench.layout, bench.rng("synflow")))
        sums = np.array([score[e.slice].sum() for e in bench.layout.prunable])
        finder = Finder(score=SynFlow(), schedule=Rescore(100), scope=Global(), rewind=ToInit())
        masks = []
        for part in ("train", "test"):
            *_, mask = dry(bench, finder, (self.density,), part=part)
            masks.append(mask)
        yield {
            "density": f"{self.density:g}", "spread": float((sums.max() - sums.min()) / sums.mean()),
            "differing": float(np.count_nonzero(masks[0] != masks[1])),
        }  # fmt: skip


@dataclass(frozen=True)
class Collapse:
    """Layer collapse: up to which compression 10^x a score leaves no layer empty, against the most that is possible.

    `scores` are names, `steps` how often each is scored anew; one pair a place. `critical` is x on the grid, `most`
    is log10(weights / layers): beyond it any mask has an empty layer. Tanaka et al., NeurIPS 2020, arXiv 2006.05467.
    """

    scores: tuple[str, ...] = ("magnitude", "random", "snip", "synflow", "synflow")
    steps: tuple[int, ...] = (1, 1, 1, 1, 100)
    grid: float = 0.25

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.steps) or min(self.steps, default=1) < 1:
            raise wrong("probes.collapse.steps", f"{len(self.scores)} numbers from 1, one for each score", self.steps)
        if not 0 < self.grid < np.inf:
            raise wrong("probes.collapse.grid", "above 0", self.grid)

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        layers = len(bench.layout.prunable)
        most = float(np.log10(bench.layout.num_prunable / layers))
        places = [self.grid * i for i in range(1, int(most / self.grid) + 1)]
        for name, steps in zip(self.scores, self.steps, strict=True):
            score: Score = make(SCORES, {"name": name}, "probes.collapse.scores")
            finder = Finder(score=score, schedule=Rescore(steps), scope=Global(), rewind=ToInit())
            first = next((x for x in places if self._empty(bench, finder, 10**-x)), None)
            yield {
                "score": name, "steps": steps, "most": f"{most:.2f}",
                "critical": float(places[-1] if first is None else first - self.grid),
            }  # fmt: skip

    def _empty(self, bench: Bench, finder: Finder, density: float) -> bool:
        *_, mask = dry(bench, finder, (density,))
        return any(not mask[e.slice].any() for e in bench.layout.prunable)
