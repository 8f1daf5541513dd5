"""Read a module's graph with torch.fx into the kernel's layer table, or say in one line why it cannot run there."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedlth.kernel.forward_proof import outcomes, restored
from fedlth.kernel.fuse import fuse
from fedlth.kernel.kinds import KINDS
from fedlth.kernel.memory_layout import lay_out
from fedlth.kernel.reader import FUNCTIONS, METHODS, MODULES, Reader, Unsupported, Value
from fedlth.kernel.table import LayerTable
from fedlth.models.layout import Layout
from fedlth.models.seed import seed_torch

LANES = 32  # examples side by side where a network is large
_MODULES, _FUNCTIONS, _METHODS = dict(MODULES), dict(FUNCTIONS), dict(METHODS)
for _kind in KINDS.values():
    _MODULES |= _kind.modules
    _FUNCTIONS |= _kind.functions
    _METHODS |= _kind.methods


def _layer(reader: Reader, name: str, part: nn.Module, x: Value) -> Value:
    """Add the layer of a leaf module. Exact types only: a subclass may compute something else."""
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        raise Unsupported(f"{name} has hooks")
    if type(part) not in _MODULES:
        raise Unsupported(f"layer {name} is a {type(part).__name__}")
    found: Value = _MODULES[type(part)](reader, name, part, x)
    return found


def _in_place(reader: Reader, node: fx.Node) -> bool:
    """Say whether a call changes its first argument: a method whose name ends in _, `inplace`, or +=."""
    if node.op == "call_module":
        return bool(getattr(reader.module.get_submodule(str(node.target)), "inplace", False))
    named = node.op == "call_method" and str(node.target).endswith("_")
    return named or node.target is operator.iadd or bool(node.kwargs.get("inplace"))


def _run(reader: Reader, graph: fx.Graph) -> Value:
    known: dict[fx.Node, Any] = {}
    place = {node: number for number, node in enumerate(graph.nodes)}

    def arguments(given: Any) -> Any:
        return fx.node.map_arg(given, lambda node: known[node])

    def read_later(value: Any, now: fx.Node) -> bool:
        """Say whether what lies at `value`, under this name or another (a flatten, an identity), is read after now."""
        names = [node for node, held in known.items() if isinstance(held, Value) and held.at == value.at]
        return any(place[user] > place[now] for node in names for user in node.users)

    for node in graph.nodes:
        args, kwargs = arguments(node.args), arguments(node.kwargs)
        if _in_place(reader, node) and (len(node.args[0].users) > 1 or read_later(args[0], node)):
            raise Unsupported(f"{node.name} changes a value in place that is read again")
        if node.op == "placeholder":
            if known:
                raise Unsupported("a forward with more than one input")
            known[node] = reader.input
        elif node.op == "output":
            if not isinstance(args[0], Value):
                raise Unsupported("a forward that returns other than one tensor")
            found: Value = args[0]
        elif node.op == "call_module":
            known[node] = _layer(reader, node.target, reader.module.get_submodule(node.target), *args, **kwargs)
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            known[node] = _FUNCTIONS[node.target](reader, *args, **kwargs)
        elif node.op == "call_method" and node.target in _METHODS:
            known[node] = _METHODS[node.target](reader, *args, **kwargs)
        elif node.target is getattr and args[1] == "shape":
            known[node] = reader.size(args[0])
        elif node.target is operator.getitem and isinstance(args[0], tuple):
            known[node] = args[0][args[1]]
        else:
            raise Unsupported(f"{node.op} {getattr(node.target, '__name__', node.target)}")
    return found


def compile_layers(module: nn.Module, layout: Layout, input_shape: tuple[int, ...]) -> LayerTable | str:
    """Return the layer table of a module, or one line that says why the kernel cannot run it.

    input_shape: an example's, without the batch: (C, H, W) or (F,). The module's values and modes stay.
    """
    try:
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported("the model has hooks")
        with restored(module) as buffers:
            traced = fx.symbolic_trace(module)
            reader = Reader(module, layout, tuple(input_shape))
            table = _table(reader, layout, _run(reader, traced.graph))
            _check(module, traced, tuple(input_shape), buffers)
        return table
    except Unsupported as reason:
        return str(reason)
    except Exception as error:  # torch.fx runs the user's forward on proxies, which may raise anything
        return f"torch.fx cannot trace the model: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _table(reader: Reader, layout: Layout, logits: Value) -> LayerTable:
    if len(logits.shape) != 1 or reader.shapes[logits.at][1:] != (1, 1):
        raise Unsupported(f"logits of shape {logits.shape}")
    ops = fuse(reader.ops, logits.at)
    if not any(op.weight >= 0 for op in ops):
        raise Unsupported("no layer has weights")
    frozen = tuple((e.offset, e.offset + e.size) for e in layout.floats if e.role == "param" and not e.trainable)
    table = LayerTable(
        ops=ops,
        shapes=tuple(reader.shapes),
        output=logits.at,
        num_floats=layout.num_floats,
        num_params=layout.num_params,
        num_prunable=layout.num_prunable,
        frozen=frozen,
    )
    try:
        lay_out(table, LANES)
    except ValueError as error:  # maps beyond all bounds
        raise Unsupported(str(error)) from error
    return table


def _check(
    module: nn.Module, traced: fx.GraphModule, shape: tuple[int, ...], buffers: list[tuple[Tensor, Tensor]]
) -> None:
    """Refuse a forward that is not one function of its input: a trace freezes modes, counters, dice and no_grad."""
    if any(parameter._backward_hooks for parameter in module.parameters()):
        raise Unsupported("a parameter has hooks")
    seed_torch(0)
    examples = [torch.randn(2, *shape) for _ in range(2)]
    given, seen = (outcomes(module, forward, forward, examples) for forward in (module, traced))
    if not all(
        len(ours) == len(theirs)
        and all(torch.allclose(a, b, equal_nan=True) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(given, seen, strict=True)
    ):
        raise Unsupported("a forward that is not the same function as its trace (modes, chance, no_grad)")
    if not all(torch.equal(buffer, value) for buffer, value in buffers):
        raise Unsupported("a forward that changes a buffer")
