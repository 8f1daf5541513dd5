"""The loss of a network on data, as scores ask about it: gradients, curvature, flow, norm scales, learned masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from fedlth.data.examples import Examples, Inputs, each, tensors
from fedlth.errors import StudyError
from fedlth.models.call import call, call_with
from fedlth.models.layout import Layout, Params
from fedlth.tickets.evidence import Lesson
from fedlth.training.evaluation import gradient
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import examined
from fedlth.training.metrics import counted
from fedlth.training.supermask import learn

EXAMPLES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class LossProbe:
    """The network of `model` at `params` over `data`, all in evaluation mode.

    Curvature and flow are computed in float64. `layer_flops` are forward FLOPs an example by tensor name; `order` and
    `torch_seed` give the batches and dice of learned masks, `batch_size` their batches; `learning`, given such a
    training, is entered around it, since it is a cost. `refuse`, given what looks at the examples, raises StudyError
    where nothing may.
    """

    model: FlatModel
    params: Params
    data: Examples
    layer_flops: Callable[[], Mapping[str, int]]
    order: Callable[[], np.random.Generator]
    torch_seed: int
    batch_size: int
    learning: Callable[[Lesson], AbstractContextManager[object]] = lambda lesson: nullcontext()
    refuse: Callable[[str], None] = lambda what: None

    @property
    def layout(self) -> Layout:
        return self.model.layout

    def gradient(self, weights: np.ndarray, /) -> np.ndarray:
        self.refuse("a gradient")
        return gradient(self.model, self._at(weights), self.data)

    def hessian_gradient(self, weights: np.ndarray, /, *, temperature: float) -> np.ndarray:
        self.refuse("curvature")
        fixed, flat = self._doubles(weights)
        flat.requires_grad_()
        first = torch.zeros_like(flat)
        for part, share in self._shares():
            first += torch.autograd.grad(self._loss(fixed, flat, part.x, part.y, temperature) * share, flat)[0]
        product = torch.zeros_like(flat)
        for part, share in self._shares():
            loss = self._loss(fixed, flat, part.x, part.y, temperature) * share
            (slope,) = torch.autograd.grad(loss, flat, create_graph=True)
            product += torch.autograd.grad(slope @ first, flat)[0]
        return product.cpu().numpy()

    def squared_gradient(self, weights: np.ndarray, /) -> np.ndarray:
        self.refuse("a gradient of single examples")
        fixed, flat = self._doubles(weights)

        def one(flat: Tensor, x: Inputs, y: Tensor) -> Tensor:
            return self._loss(fixed, flat, each(x, lambda t: t[None]), y[None], 1.0)

        data = examined(self.model.loss, self.data).double()
        total = torch.zeros_like(flat)
        size = EXAMPLES_AT_ONCE if _batches(one, flat, data.batch(slice(2))) else 1
        for at in range(0, len(data), size):
            part = data.batch(slice(at, at + size))
            if size > 1:
                slopes = vmap(grad(one), (None, 0, 0))(flat, part.x, part.y)
            else:
                slopes = grad(one)(flat, each(part.x, lambda t: t[0]), part.y[0])[None]
            total += slopes.square().sum(0)
        return (total / len(data)).cpu().numpy()

    def flow(self, weights: np.ndarray, /) -> np.ndarray:
        x = self.data.batch(slice(1)).x
        if not all(t.is_floating_point() for t in tensors(x)):
            raise StudyError("finder.score: synflow feeds ones in place of images, and these inputs are tokens")
        fixed, flat = self._doubles(np.abs(weights))
        for e in self.layout.floats[len(self.layout.prunable) :]:
            fixed[e.name] = _positive(e.name, e.role, fixed[e.name])
        flat.requires_grad_()
        ones = each(x, lambda t: torch.ones_like(t, dtype=torch.float64))
        total = self._logits(fixed, flat, ones).sum()
        return torch.autograd.grad(total, flat)[0].cpu().numpy()

    def gammas(self) -> np.ndarray:
        behind = norm_behind(self.model.module, self.layout, self.data.batch(slice(2)).x)
        at = {name: e for e in self.layout.floats for name in (e.name, *e.aliases)}
        out = np.zeros(self.layout.num_prunable, np.float32)
        for e in self.layout.prunable:
            if e.name not in behind:
                raise StudyError(
                    f"finder.score: gamma needs a norm layer with weights right behind {e.name}; leave that tensor "
                    "out by model.prunable"
                )
            scale = np.abs(self.params.floats[at[behind[e.name]].slice])
            out[e.slice] = e.as_stored(np.repeat(scale, e.fan_in))
        return out

    def flops(self) -> np.ndarray:
        costs = self.layer_flops()
        out = np.zeros(self.layout.num_prunable)
        for e in self.layout.prunable:
            out[e.slice] = costs[e.name] / e.size
        return out

    def learn(self, weights: np.ndarray, lesson: Lesson, /) -> np.ndarray:
        self.refuse("learning a mask")
        first = self.order().uniform(-1, 1, weights.size).astype(np.float32)
        if lesson.rule != "bernoulli":  # whose scores are log-odds; these have the scale that edge-popup gives weights
            for e in self.layout.prunable:
                first[e.slice] /= np.float32(np.sqrt(e.fan_in))
        with self.learning(lesson):
            scores, _ = learn(
                self.model, self._at(weights), first, data=self.data, lesson=lesson, batch_size=self.batch_size,
                order=self.order(), torch_seed=self.torch_seed,
            )  # fmt: skip
        return scores

    def _at(self, weights: np.ndarray) -> Params:
        floats = self.params.floats.copy()
        floats[: weights.size] = weights
        return replace(self.params, floats=floats)

    def _doubles(self, weights: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """Return every tensor that is no prunable weight, by name, and the prunable weights as one flat tensor."""
        self.model.load(self.params)  # its integer buffers; all floats are handed in below
        self.model.module.eval()
        floats = torch.from_numpy(self.params.floats.astype(np.float64)).to(self.model.device)
        fixed = {e.name: floats[e.slice].view(e.shape) for e in self.layout.floats if not e.prunable}
        flat = torch.from_numpy(weights.astype(np.float64)).to(self.model.device)
        return fixed, flat

    def _logits(self, fixed: Mapping[str, Tensor], flat: Tensor, x: Inputs) -> Tensor:
        named = {e.name: flat[e.slice].view(e.shape) for e in self.layout.prunable}
        return call_with(self.model.module, {**fixed, **named}, x)

    def _loss(self, fixed: Mapping[str, Tensor], flat: Tensor, x: Inputs, y: Tensor, temperature: float) -> Tensor:
        return self.model.loss(self._logits(fixed, flat, x) / temperature, y)

    def _shares(self) -> Iterator[tuple[Examples, float]]:
        """Yield the data in parts with each part's share of the mean."""
        data = examined(self.model.loss, self.data)
        total = int(counted(data.y).sum())
        for at in range(0, len(data), 256):
            part = data.batch(slice(at, at + 256))
            yield part.double(), int(counted(part.y).sum()) / total


def _batches(one: Callable[[Tensor, Inputs, Tensor], Tensor], flat: Tensor, two: Examples) -> bool:
    """Say whether torch can batch the examples' own gradients: not through recurrent layers or ifs on values."""
    try:
        vmap(grad(one), (None, 0, 0))(flat, two.x, two.y)
    except RuntimeError:
        return False
    return True


def _positive(name: str, role: str, value: Tensor) -> Tensor:
    """Return what SynFlow's linear net has in place of a tensor that is no prunable weight.

    A norm becomes a positive scale, biases and running means nothing: the flow is then conserved from layer to layer.
    """
    last = name.rpartition(".")[2]
    if last == "running_mean" or "bias" in last:
        return torch.zeros_like(value)
    return value if role == "buffer" else value.abs()


def norm_behind(module: nn.Module, layout: Layout, x: Inputs) -> dict[str, str]:
    """Return, for each prunable tensor, the weight of the norm layer that ran right behind its module.

    x: a few examples; the module is run once in evaluation mode.
    """
    ran: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, args, out: ran.append(m)) for m in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            call(module, x)
    finally:
        for hook in hooks:
            hook.remove()
    names: dict[int, str] = {id(p): n for n, p in module.named_parameters(remove_duplicate=False)}
    prunable = {n for e in layout.prunable for n in (e.name, *e.aliases)}
    first = {n: e.name for e in layout.prunable for n in (e.name, *e.aliases)}
    found: dict[str, str] = {}
    waiting: list[str] = []
    for part in ran:
        own = [names[id(p)] for p in part.parameters(recurse=False)]
        scale = getattr(part, "weight", None)
        if "norm" in type(part).__name__.lower() and isinstance(scale, Tensor):
            found.update({n: names[id(scale)] for n in waiting if _units(layout, n) == scale.numel()})
            waiting = []
        elif prunable & set(own):
            waiting = [first[n] for n in own if n in prunable]
    return found


def _units(layout: Layout, name: str) -> int:
    return next(e for e in layout.prunable if e.name == name).outputs
