"""Small networks and the three trainings that the kernel's tests compare: torch float32, torch float64, the kernel."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fedlth.data.examples import Examples
from fedlth.kernel import kernel
from fedlth.kernel.graph import compile_layers
from fedlth.kernel.table import LayerTable
from fedlth.models.layout import Layout, Params, layout_of, read
from fedlth.models.prunable import prunable_names
from fedlth.training.flat_model import FlatModel
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingRequest, drawn_request
from fedlth.training.train import train
from tests import tiny


class Residual(nn.Module):
    """A strided block with a shortcut, a depthwise convolution, group normalisation and a global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.side = nn.Conv2d(4, 6, 1, stride=2)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.GroupNorm(3, 6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.down(x) + self.side(x))
        x = x + F.relu(self.norm(self.deep(x)))
        logits: torch.Tensor = self.head(self.pool(x).view(x.size(0), -1))
        return logits


def small(rng: np.random.Generator) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a random network of supported layers and its input shape."""
    layers: list[nn.Module] = []
    shape = (int(rng.integers(1, 4)), *(int(n) for n in rng.integers(9, 14, 2)))

    def now() -> torch.Size:
        with torch.no_grad():
            return nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1:]

    for _ in range(int(rng.integers(1, 3))):
        channels = now()[0]
        groups = channels if rng.random() < 0.2 else 1
        out = channels * int(rng.integers(1, 4)) if groups > 1 else int(rng.integers(1, 14))
        window, stride = int(rng.integers(1, min(5, 1 + min(now()[1:])))), int(rng.integers(1, 3))
        options = {"stride": stride, "padding": int(rng.integers(0, 3)), "groups": groups, "bias": rng.random() < 0.7}
        layers.append(nn.Conv2d(channels, out, window, **options))
        if rng.random() < 0.8:
            layers.append(nn.ReLU())
        if min(now()[1:]) > 2 and rng.random() < 0.8:
            pools = nn.MaxPool2d(2), nn.MaxPool2d(3, stride=2, padding=1), nn.AvgPool2d(2)
            layers.append(pools[int(rng.integers(3))])
        if rng.random() < 0.3:
            layers.append(nn.ReLU())
    features, hidden = now().numel(), int(rng.integers(3, 30))
    layers += [nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, int(rng.integers(2, 7)))]
    return nn.Sequential(*layers), shape


@dataclass(frozen=True)
class Case:
    """One comparison: a module with its data, recipe and masks."""

    module: nn.Module
    layout: Layout
    table: LayerTable
    start: Params
    x: torch.Tensor
    y: torch.Tensor
    recipe: TrainingRecipe
    mask: np.ndarray | None
    trainable: np.ndarray | None

    @property
    def request(self) -> TrainingRequest:
        return drawn_request(
            self.start, Examples(self.x, self.y), self.recipe, order=np.random.default_rng(7), torch_seed=0,
            active=self.mask, trainable=self.trainable,
        )  # fmt: skip

    def reference(self) -> tuple[np.ndarray, float]:
        done = train(FlatModel(copy.deepcopy(self.module), self.layout, "cpu"), self.request)
        return done.params.floats, done.loss

    @property
    def sgd(self) -> dict[str, float]:
        return {key: value for key, value in vars(self.recipe.optimizer).items() if key != "nesterov"}

    def kernel(self, snapshots: tuple[int, ...] = (), *, debug: bool = False) -> kernel.Outcome:
        request = self.request
        return kernel.train_epochs(
            self.table, self.start.floats, self.x.numpy(), self.y.numpy(), request.batches,
            rates=np.array(request.rates), mask=self.mask, **self.sgd,
            moves=None if self.trainable is None else self.trainable.astype(np.float32), snapshots=snapshots,
            debug=debug,
        )  # fmt: skip

    def judge(self) -> np.ndarray:
        """The same training in float64, written out plainly."""
        module = copy.deepcopy(self.module).double()
        named = dict(module.named_parameters())
        entries = [(e, named[e.name]) for e in self.layout.floats]
        factor = torch.ones(self.layout.num_params, dtype=torch.float64)
        alive = factor.clone()
        if self.mask is not None:
            alive[: self.mask.size] = torch.from_numpy(self.mask.astype(np.float64))
        if self.trainable is not None:
            factor = torch.from_numpy(self.trainable.astype(np.float64))
        flat = torch.from_numpy(self.start.floats.astype(np.float64)) * alive
        velocity, rates, step = torch.zeros_like(flat), self.request.rates, 0
        sgd = self.recipe.optimizer
        for parts in self.request.batches:
            for part in parts:
                for e, tensor in entries:
                    tensor.data = flat[e.slice].view(e.shape).clone()
                module.zero_grad()
                F.cross_entropy(module(self.x[part].double()), self.y[part]).backward()
                grad = torch.cat([t.grad.reshape(-1) if t.grad is not None else t.reshape(-1) * 0 for _, t in entries])
                frozen = torch.cat([torch.full((e.size,), float(e.trainable), dtype=torch.float64) for e, _ in entries])
                grad = (grad + sgd.weight_decay * flat) * factor * alive * frozen
                velocity = sgd.momentum * velocity + grad
                flat = flat - float(rates[step]) * velocity
                step += 1
        return flat.detach().numpy()


def case(
    module: nn.Module,
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    examples: int = 40,
    density: float | None = None,
    movable: float | None = None,
    **recipe: float,
) -> Case:
    """Return a case of random data; `density` and `movable` are shares of weights: alive, and trainable."""
    rng = np.random.default_rng(seed)
    layout = layout_of(module, prunable_names(module, None))
    table = compile_layers(module, layout, shape)
    assert isinstance(table, LayerTable), table
    x = torch.from_numpy(rng.standard_normal((examples, *shape)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, table.num_classes, examples))
    options = {"epochs": 2, "batch_size": 16, "lr": 0.05, **recipe}
    masks = [None if share is None else rng.random(layout.num_prunable) < share for share in (density, movable)]
    trainable = None if masks[1] is None else layout.over_params(masks[1])
    return Case(module, layout, table, read(module, layout), x, y, tiny.recipe(**options), masks[0], trainable)
