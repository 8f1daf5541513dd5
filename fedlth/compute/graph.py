"""Read a module's graph with torch.fx into the kernel's layer table, or say in one line why it cannot run there."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn

from fedlth.compute.fuse import fuse
from fedlth.compute.reader import FUNCTIONS, METHODS, Reader, Unsupported, Value
from fedlth.compute.table import LayerTable
from fedlth.params import Layout


def _run(reader: Reader, graph: torch.fx.Graph) -> Value:
    known: dict[torch.fx.Node, Any] = {}

    def arguments(given: Any) -> Any:
        return torch.fx.node.map_arg(given, lambda node: known[node])

    for node in graph.nodes:
        args, kwargs = arguments(node.args), arguments(node.kwargs)
        changes = node.target in ("relu_", "add_", operator.iadd) or kwargs.get("inplace")
        if node.op == "call_module":
            changes = changes or getattr(reader.module.get_submodule(node.target), "inplace", False)
        if changes and len(node.args[0].users) > 1:
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
            known[node] = reader.layer(node.target, reader.module.get_submodule(node.target), *args, **kwargs)
        elif node.op == "call_function" and node.target in FUNCTIONS:
            known[node] = FUNCTIONS[node.target](reader, *args, **kwargs)
        elif node.op == "call_method" and node.target in METHODS:
            known[node] = METHODS[node.target](reader, *args, **kwargs)
        elif node.target is getattr and args[1] == "shape":
            known[node] = reader.size(args[0])
        elif node.target is operator.getitem and isinstance(args[0], tuple):
            known[node] = args[0][args[1]]
        else:
            raise Unsupported(f"{node.op} {getattr(node.target, '__name__', node.target)}")
    return found


def compile_layers(module: nn.Module, layout: Layout, input_shape: tuple[int, ...]) -> LayerTable | str:
    """Return the layer table of a module, or one line that says why the kernel cannot run it.

    input_shape: an example's, without the batch: (C, H, W) or (F,). The module is only read.
    """
    try:
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported("the model has hooks")
        graph = torch.fx.symbolic_trace(module).graph
        reader = Reader(module, layout, tuple(input_shape))
        logits = _run(reader, graph)
        if len(logits.shape) != 1 or reader.shapes[logits.at][1:] != (1, 1):
            raise Unsupported(f"logits of shape {logits.shape}")
    except Unsupported as reason:
        return str(reason)
    except Exception as error:  # torch.fx runs the user's forward on proxies, which may raise anything
        return f"torch.fx cannot trace the model: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    ops = fuse(reader.ops, logits.at)
    if not any(op.weight >= 0 for op in ops):
        return "no layer has weights"
    frozen = tuple((e.offset, e.offset + e.size) for e in layout.floats if e.role == "param" and not e.trainable)
    return LayerTable(
        ops=ops,
        shapes=tuple(reader.shapes),
        output=logits.at,
        num_floats=layout.num_floats,
        num_params=layout.num_params,
        num_prunable=layout.num_prunable,
        frozen=frozen,
    )
