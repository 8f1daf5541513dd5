"""What a forward pass and a training step cost, by weight, as torch's flop counter counts (one multiply-add is two)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fedlth.data.examples import Inputs, shapes, tensors
from fedlth.data.factory import told
from fedlth.errors import StudyError
from fedlth.models.call import call


def layer_flops(module: nn.Module, example_x: Inputs) -> tuple[dict[str, int], int]:
    """Return forward flops per example by parameter name (every parameter, smallest name if tied), and their total.

    example_x: one batch, (B, ...) or a mapping of such; the cost is divided by B. The module is run once in eval mode,
    without gradient, and left in the mode it was in. Dense; biases, norms and activations are not counted.

    A module's own cost, its children's taken off, is shared among the weights that it owns itself (ndim >= 2) by
    their sizes (nn.MultiheadAttention's output projection counts as its own). On CPU the counter sees nothing of
    nn.LSTM, which is then counted as 2 x weights x positions, and nothing of the products of queries, keys and values.
    What is spent in modules without weights is in the total alone; tied weights and modules called twice collect all
    their uses.
    Raises StudyError when the model cannot take the batch.
    """
    meter = _Meter()
    with _watched(module, meter), _told(example_x), torch.no_grad(), meter:
        call(module, example_x)
    return _by_weight(module, meter, len(tensors(example_x)[0]))


def training_flops(
    module: nn.Module, example_x: Inputs, layers: tuple[dict[str, int], int], trains: Collection[str]
) -> tuple[dict[str, int], int]:
    """Return flops of a training step per example by parameter name, and their total, as `layer_flops` has a forward's.

    `layers` is what that returned, `trains` names the parameters that get a gradient. A weight counts a forward; one
    more, for the gradient of its input, where something before it trains; one more where it gets a gradient itself. It
    then always counts 3, as is usual, in a first layer too, whose input has no gradient: a network that trains as a
    whole costs 3 forwards.
    What is before what is found by one more forward pass, in which torch says which inputs depend on what trains, and
    its backward pass, which says whose outputs a loss depends on. In a module that owns several weights, or has
    children beside its own, all that trains counts as before the others. What is spent in modules without weights
    counts 3 where it depends on what trains, else 1.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    chosen = {id(tensor) for name, tensor in named.items() if name in trains}
    flops, total = layers
    if all(id(tensor) in chosen for tensor in named.values()):
        return {name: 3 * count for name, count in flops.items()}, 3 * total
    meter, before = _Meter(), {tensor: tensor.requires_grad for tensor in named.values()}
    try:
        for tensor in before:
            tensor.requires_grad_(id(tensor) in chosen)
        with _watched(module, meter), _told(example_x), torch.enable_grad():
            with meter:
                out = call(module, example_x)
            if out.requires_grad:
                asked = [tensor for tensor in before if tensor.requires_grad]
                torch.autograd.grad(out.sum(), asked, allow_unused=True)
    finally:
        for tensor, mode in before.items():
            tensor.requires_grad_(mode)
    names, behind, without = _names(module), set[int](), [0, 0]
    for part, spent in meter.own.items():
        weights, inside = _weights(part), list(part.parameters())
        if not weights:
            deep = part in meter.behind or any(id(tensor) in chosen for tensor in inside)
            without[deep and part in meter.reached] += spent
        lone = len(weights) == 1 and not any(part.children())
        for weight in weights:
            beside = any(id(tensor) in chosen for tensor in inside if tensor is not weight)
            if part in meter.reached and (part in meter.behind or (beside and not lone)):
                behind.add(id(weight))
    passes = dict.fromkeys(flops, 1) | {names[key]: 2 for key in behind} | {names[key]: 3 for key in chosen}
    costs = {name: passes[name] * count for name, count in flops.items()}
    rest = total - sum(flops.values())
    return costs, sum(costs.values()) + rest + (2 * rest * without[True] // sum(without) if any(without) else 0)


@contextmanager
def _told(example_x: Inputs) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        batch = shapes(example_x)
        raise StudyError(f"model: the forward pass fails on a batch {batch}: {told(error)}") from error


@contextmanager
def _watched(module: nn.Module, meter: _Meter) -> Iterator[None]:
    """Let a meter watch the modules inside, in eval mode; they are left in the mode that they were in."""
    hooks: list[Any] = []
    for part in module.modules():
        hooks.append(part.register_forward_pre_hook(meter.enter, with_kwargs=True))
        hooks.append(part.register_forward_hook(meter.leave))
    training = {part: part.training for part in module.modules()}
    # The fused attention of inference hides its products from the counter.
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        module.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for hook in hooks:
            hook.remove()
        for part, mode in training.items():
            part.training = mode


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tell each module's own cost from its children's by reading the count on entry and exit.

    torch's FlopCounterMode has the same formulas, but tells modules by path, which is ambiguous when one is shared.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator imports all of torch's compiler: 1.4 CPU seconds of a run's start

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.own: dict[nn.Module, int] = {}
        self.unseen: dict[nn.Module, int] = {}
        self.behind: set[nn.Module] = set()  # modules with an input that depends on what trains
        self.reached: set[nn.Module] = set()  # modules whose output a backward pass has reached
        self._open: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open.append([self.total, 0])
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves((args, kwargs))):
            self.behind.add(part)

    def leave(self, part: nn.Module, args: tuple[Any, ...], output: object) -> None:
        start, inner = self._open.pop()
        spent = self.total - start
        if self._open:
            self._open[-1][1] += spent
        if spent == 0 and isinstance(part, nn.RNNBase):
            x = args[0].data if isinstance(args[0], nn.utils.rnn.PackedSequence) else args[0]
            cost = 2 * math.prod(x.shape[:-1]) * sum(tensor.numel() for tensor in _weights(part))
            self.unseen[part] = self.unseen.get(part, 0) + cost
        self.own[part] = self.own.get(part, 0) + spent - inner
        for x in tree_leaves(output):
            if isinstance(x, torch.Tensor) and x.requires_grad:
                x.register_hook(lambda gradient, part=part: self.reached.add(part))  # type: ignore[no-untyped-call]
            elif not isinstance(x, torch.Tensor | None):
                self.reached.add(part)  # what it holds is not known


def _by_weight(module: nn.Module, meter: _Meter, batch: int) -> tuple[dict[str, int], int]:
    names = _names(module)
    flops = dict.fromkeys(sorted(set(names.values())), 0)
    for part, seen in meter.own.items():
        weights = _weights(part)
        size = sum(tensor.numel() for tensor in weights)
        cost = seen + meter.unseen.get(part, 0)
        for weight in weights:
            flops[names[id(weight)]] += cost * weight.numel() // size
    total = meter.total + sum(meter.unseen.values())
    return {name: count // batch for name, count in flops.items()}, total // batch


def _names(module: nn.Module) -> dict[int, str]:
    """Return the smallest name of every parameter, by its identity."""
    names: dict[int, str] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names[id(tensor)] = min(name, names.get(id(tensor), name))
    return names


def _weights(part: nn.Module) -> list[torch.Tensor]:
    """Return the weights that a module's own forward multiplies with."""
    weights: list[torch.Tensor] = [tensor for tensor in part.parameters(recurse=False) if tensor.ndim >= 2]
    if isinstance(part, nn.MultiheadAttention):
        # Its forward never calls the output projection as a module, only borrows its weight.
        weights.append(part.out_proj.weight)
    return weights
