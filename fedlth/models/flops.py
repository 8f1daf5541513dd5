"""What one forward pass costs, by weight, as torch's flop counter counts it (one multiply-add is two)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
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
    hooks = []
    for part in module.modules():
        hooks.append(part.register_forward_pre_hook(meter.enter))
        hooks.append(part.register_forward_hook(meter.leave))
    training = {part: part.training for part in module.modules()}
    # The fused attention of inference hides its products from the counter.
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        module.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), meter:
            call(module, example_x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        batch = shapes(example_x)
        raise StudyError(f"model: the forward pass fails on a batch {batch}: {told(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for hook in hooks:
            hook.remove()
        for part, mode in training.items():
            part.training = mode
    return _by_weight(module, meter, len(tensors(example_x)[0]))


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
        self._open: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def enter(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        self._open.append([self.total, 0])

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


def _by_weight(module: nn.Module, meter: _Meter, batch: int) -> tuple[dict[str, int], int]:
    names: dict[int, str] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names[id(tensor)] = min(name, names.get(id(tensor), name))
    flops = dict.fromkeys(sorted(set(names.values())), 0)
    for part, seen in meter.own.items():
        weights = _weights(part)
        size = sum(tensor.numel() for tensor in weights)
        cost = seen + meter.unseen.get(part, 0)
        for weight in weights:
            flops[names[id(weight)]] += cost * weight.numel() // size
    total = meter.total + sum(meter.unseen.values())
    return {name: count // batch for name, count in flops.items()}, total // batch


def _weights(part: nn.Module) -> list[torch.Tensor]:
    """Return the weights that a module's own forward multiplies with."""
    weights: list[torch.Tensor] = [tensor for tensor in part.parameters(recurse=False) if tensor.ndim >= 2]
    if isinstance(part, nn.MultiheadAttention):
        # Its forward never calls the output projection as a module, only borrows its weight.
        weights.append(part.out_proj.weight)
    return weights
