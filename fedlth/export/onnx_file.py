"""A ticket as an ONNX file, which other runtimes run without Python (extra: onnx)."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlth.data.examples import Inputs, each
from fedlth.data.factory import told
from fedlth.errors import StudyError, require
from fedlth.export.source import Source
from fedlth.export.written import Written
from fedlth.models.call import call
from fedlth.models.flops import layer_flops
from fedlth.storage.store import write_atomic

FILE = "model.onnx"
EXAMPLES = 2  # a batch of one would make the exporter write a one where the size of a batch stands
NAME, OUTPUT = "x", "logits"
VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")  # of the same memory


class Positional(nn.Module):
    """A network whose inputs are given one after the other, as an ONNX graph names them."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *given: Tensor) -> Tensor:
        several = self.names != (NAME,)
        return call(self.module, dict(zip(self.names, given, strict=True)) if several else given[0])


def onnx(source: Source, folder: Path) -> Written:
    """Write the network with a free batch axis, of ragged inputs also a free length; read it again with onnxruntime.

    Raises MissingExtra, and StudyError naming the model where ONNX cannot express it.
    """
    require("fedlth tickets export --to onnx", "onnx", "onnxscript", "onnxruntime", extra="onnx")
    x = source.batches[0]
    few = each(x, lambda t: t.repeat(EXAMPLES, *[1] * (t.dim() - 1))[:EXAMPLES])
    given = few if isinstance(few, dict) else {NAME: few}
    with _quiet():
        try:
            model = _exported(source, given)
            for name, value in source.metadata.items():
                model.metadata_props.add(key=name, value=value)
            data: bytes = model.SerializeToString()
        except Exception as error:  # torch's, onnxscript's and protobuf's, of every kind
            cause = error.__cause__ or error
            raise StudyError(f"{source.place}: ONNX cannot express the model {source.model}: {told(cause)}") from error
    write_atomic(folder / FILE, data)
    session = _session(data)

    def forward(inputs: Inputs) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], _arrays(inputs, session))[0])

    stored = sum(tensor.numel() for tensor in source.module.parameters())
    return Written(
        forward, (FILE,), stored, "onnxruntime.InferenceSession", lambda inputs: _memory(data, inputs),
        lambda inputs: layer_flops(source.module, inputs)[1],
    )  # fmt: skip


def _exported(source: Source, given: Mapping[str, Tensor]) -> Any:
    free = torch.export.Dim.DYNAMIC
    axes = tuple({0: free, **({1: free} if name in source.test.lengths else {})} for name in given)
    module = Positional(source.module, tuple(given)).eval()
    with torch.no_grad():
        program: Any = torch.onnx.export(
            module, tuple(given.values()), dynamo=True, dynamic_shapes=(axes,), input_names=list(given),
            output_names=[OUTPUT], verbose=False,
        )  # fmt: skip
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes off the terminal; what is wrong with a model is our own error."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _session(data: bytes, *, plain: bool = False) -> Any:
    """Open a graph with as many threads as torch has; `plain`: as it was written, nothing fused."""
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    if plain:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _arrays(x: Inputs, session: Any) -> dict[str, np.ndarray]:
    """Return the inputs that a graph has by its names; what a network does not read is no input of it."""
    named = x if isinstance(x, dict) else {NAME: x}
    return {own.name: named[own.name].numpy() for own in session.get_inputs()}


def _memory(data: bytes, x: Inputs) -> int:
    """Return the bytes of a graph's weights and the most that live at once beside them, in the graph's own order.

    A runtime that fuses steps, or works in place, holds less; onnxruntime does not say how much.
    """
    library: Any = import_module("onnx")
    model = library.load_from_string(data)
    graph = model.graph
    weights = sum(library.numpy_helper.to_array(one).nbytes for one in graph.initializer)
    outputs = [name for node in graph.node for name in node.output if name]
    shown = {one.name for one in graph.output}
    graph.output.extend(library.ValueInfoProto(name=name) for name in outputs if name not in shown)
    session = _session(model.SerializeToString(), plain=True)
    names = [one.name for one in session.get_outputs()]
    sizes = {n: np.asarray(v).nbytes for n, v in zip(names, session.run(names, _arrays(x, session)), strict=True)}
    owner: dict[str, str] = {}
    last: dict[str, float] = {}
    for at, node in enumerate(graph.node):
        for name in node.input:
            last[owner.get(name, name)] = at
        if node.op_type in VIEWS:
            owner |= {name: owner.get(node.input[0], node.input[0]) for name in node.output}
    last |= {owner.get(name, name): math.inf for name in shown}
    live: dict[str, int] = {}
    most = 0
    for at, node in enumerate(graph.node):
        live |= {name: sizes[name] for name in node.output if name and name not in owner}
        most = max(most, sum(live.values()))
        live = {name: size for name, size in live.items() if last.get(name, -1) > at}
    return int(weights + most)
