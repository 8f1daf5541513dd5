"""Stock torch, tuned: a module's own function with max pools before relu and images in channels_last.

Each change is proved on a small batch before it is used. A forward that a change would break, such as one that asks
for `x.view` of a map or that a trace would freeze, stays as it is written; one line says what was done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedlth.data.examples import Examples, Inputs
from fedlth.kernel.forward_proof import outcomes, restored
from fedlth.models.call import call
from fedlth.models.seed import seed_torch

_RELU: tuple[Any, ...] = (F.relu, torch.relu, "relu", "relu_")
_POOL: tuple[Any, ...] = (F.max_pool2d, torch.max_pool2d)
_TOLERANCE = 1e-3  # of the largest value: float32 rounding is a hundredth of it, a different function far beyond


@dataclass(frozen=True)
class Tuned:
    """Two forwards of one module, for training and for evaluation, and one line that says what was done.

    With `channels_last`, the module's 4-D parameters lie in that format and its images should.
    """

    train: Callable[[Inputs], Tensor]
    evaluate: Callable[[Inputs], Tensor]
    channels_last: bool
    note: str

    def images(self, data: Examples) -> Examples:
        """Return the examples with their images in the format that the forwards are fastest in."""
        if not (self.channels_last and isinstance(data.x, Tensor)):
            return data
        return replace(data, x=self._arranged(data.x))

    def _arranged(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x


def as_written(module: nn.Module, why: str = "") -> Tuned:
    """Return the module's own forward."""
    forward = partial(call, module)
    return Tuned(forward, forward, False, f"as written{why}")


def tune(module: nn.Module, example: Inputs) -> Tuned:
    """Return the fastest forwards that agree with the module on `example` (N, ...), N at least 2.

    The module keeps its values and its mode; its 4-D parameters may change their memory format. torch's generator
    stays where it was.
    """
    written = as_written(module)
    if isinstance(example, dict):
        return as_written(module, ": no images to rearrange")
    maps = example.dim() == 4 and example.is_floating_point() and any(p.dim() == 4 for p in module.parameters())
    if not maps:
        return as_written(module, ": no images to rearrange")
    traced, swapped = _rewritten(module)
    rewritten = f"{swapped} max pool{'' if swapped == 1 else 's'} before relu"
    candidates = [replace(written, channels_last=True, note="channels_last")]
    if traced is not None:
        graphs = partial(call, traced[0]), partial(call, traced[1])
        candidates.insert(0 if swapped else 1, Tuned(*graphs, True, f"channels_last, {rewritten}"))
        if swapped:
            candidates.append(Tuned(*graphs, False, rewritten))
    wanted = _results(written, module, example)
    for candidate in candidates:
        _to(module, torch.channels_last if candidate.channels_last else torch.contiguous_format)
        if _agrees(candidate, module, example, wanted):
            return candidate
    _to(module, torch.contiguous_format)
    return as_written(module, ": its forward depends on the memory format and cannot be traced")


def _to(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the 4-D parameters out; the Parameter objects stay, since others hold them."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _rewritten(module: nn.Module) -> tuple[tuple[fx.GraphModule, fx.GraphModule] | None, int]:
    """Return the traced forward by mode (a trace freezes `self.training`), and how many pools were moved."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())
    if hooked:
        return None, 0
    found, swapped = [], 0
    try:
        with restored(module):
            for mode in (True, False):
                graph = fx.symbolic_trace(module.train(mode))
                _reshape(graph)
                swapped = _pool_first(graph)
                graph.recompile()
                found.append(graph)
    except Exception:  # torch.fx runs the user's forward on proxies, which may raise anything
        return None, 0
    return (found[0], found[1]), swapped


def _reshape(graph: fx.GraphModule) -> None:
    """Turn x.view(sizes) into x.reshape(sizes): the same values where it worked, and no error in channels_last."""
    for node in graph.graph.nodes:
        dtypes = any(isinstance(argument, torch.dtype) for argument in node.args)
        if node.op == "call_method" and node.target == "view" and not dtypes:
            node.target = "reshape"


def _pool_first(graph: fx.GraphModule) -> int:
    """Move each relu that only a max pool reads behind it, where there are fewer values; return how many."""
    swapped = 0
    for pool in list(graph.graph.nodes):
        relu = pool.args[0] if pool.args else None
        if not (_is_pool(graph, pool) and isinstance(relu, fx.Node) and _is_relu(graph, relu)):
            continue
        source = relu.args[0] if relu.args else None
        # A relu in place changes what others read of its source; then the order is part of the function.
        if len(relu.users) > 1 or not isinstance(source, fx.Node) or len(source.users) > 1:
            continue
        pool.replace_input_with(relu, source)
        with graph.graph.inserting_after(pool):
            behind = graph.graph.node_copy(relu)
        pool.replace_all_uses_with(behind)
        behind.replace_input_with(source, pool)
        graph.graph.erase_node(relu)
        swapped += 1
    return swapped


def _is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in _RELU


def _is_pool(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        part = graph.get_submodule(str(node.target))
        return type(part) is nn.MaxPool2d and not part.return_indices
    indices = node.kwargs.get("return_indices", False) or len(node.args) > 6
    return node.op == "call_function" and node.target in _POOL and not indices


def _results(forward: Tuned, module: nn.Module, example: Tensor) -> tuple[list[Tensor], ...]:
    """Return logits of batches of two sizes in both modes, the gradients in training, and the buffers at the end."""
    with restored(module) as buffers:
        seed_torch(0)
        examples = map(forward._arranged, (example, example[:-1]))
        outputs, gradients = outcomes(module, forward.train, forward.evaluate, examples)
        ends = [[buffer.to(torch.float64, copy=True)] for buffer, _ in buffers]
    return outputs, gradients, *ends


def _agrees(forward: Tuned, module: nn.Module, example: Tensor, wanted: tuple[list[Tensor], ...]) -> bool:
    try:
        found = _results(forward, module, example)
    except RuntimeError:  # torch, of a view that the memory format does not allow
        return False
    # One scale for all gradients: that of a bias before a norm is nothing but rounding.
    return all(_near(a, b) for a, b in zip(found, wanted, strict=True))


def _near(found: list[Tensor], wanted: list[Tensor]) -> bool:
    if [one.shape for one in found] != [one.shape for one in wanted]:
        return False
    scale = max((float(one.abs().max()) for one in wanted if one.numel()), default=0.0)
    return all(
        float((a - b).abs().max()) <= _TOLERANCE * scale for a, b in zip(found, wanted, strict=True) if b.numel()
    )
