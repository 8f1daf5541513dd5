"""Attention heads and feed-forward channels of a transformer: which tensors hold them, and a network without some.

A head is its rows of queries, keys and values and its columns of the output projection; a channel is a row of the first
feed-forward layer, with its bias, and a column of the second. Whatever a unit computes is read by its columns alone, so
that a network in which its weights are zero equals the one without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedlth.models.layout import Layout, Units
from fedlth.models.transformer_parts import linear

# What a family's attention calls the width of a head, the number of its heads, and the width of all.
SIZES = ("attention_head_size", "head_dim")
COUNTS = ("num_attention_heads", "num_heads", "n_heads")
WIDTHS = ("all_head_size", "split_size")


@dataclass(frozen=True)
class Form:
    """What one family calls the parts of a layer: `reads` make queries, keys and values, in one matrix or in three."""

    reads: tuple[str, ...]
    output: str
    first: str
    second: str


FORMS = (
    # BERT, RoBERTa, and what descends from them.
    Form(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense", "intermediate.dense", "output.dense",
    ),
    Form(("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    Form(("attn.c_attn",), "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),  # GPT-2
)  # fmt: skip


def layers(base: nn.Module) -> list[tuple[str, nn.Module, Form]]:
    """Return the layers of a network whose form is known, each with its name and form; none that has adapters."""
    found = []
    for name, part in base.named_modules():
        inside = dict(part.named_modules())
        found += [
            (name, part, form)
            for form in FORMS
            if all(own in inside and linear(inside[own]) for own in (*form.reads, form.output, form.first, form.second))
        ]
    return found


def units_of(base: nn.Module, prefix: str) -> dict[str, Units]:
    """Return the units of every tensor that holds any, by its name under `prefix`."""
    found: dict[str, Units] = {}
    for name, layer, form in layers(base):
        whole, split = f"{prefix}.{name}".strip("."), 3 // len(form.reads)
        for of, makers, reader, parts, size in (
            (f"{whole}.heads", form.reads, form.output, split, _head_size(layer, form)),
            (f"{whole}.channels", (form.first,), form.second, 1, 1),
        ):
            made = outputs(layer.get_submodule(makers[0]))
            count = layer.get_submodule(makers[0]).get_parameter("weight").shape[made] // parts // size
            for maker in makers:
                found[f"{whole}.{maker}.weight"] = Units(of, count, made, parts)
                found[f"{whole}.{maker}.bias"] = Units(of, count, 0, parts)
            found[f"{whole}.{reader}.weight"] = Units(of, count, 1 - outputs(layer.get_submodule(reader)))
    return found


def _attention(layer: nn.Module, form: Form) -> nn.Module:
    return layer.get_submodule(form.reads[0].rpartition(".")[0])


def _head_size(layer: nn.Module, form: Form) -> int:
    attention = _attention(layer, form)
    return int(next(getattr(attention, name) for name in SIZES if hasattr(attention, name)))


def outputs(part: nn.Module) -> int:
    """Return along which dimension of a linear layer's weight its outputs lie: GPT-2's Conv1D is transposed."""
    return 0 if isinstance(part, nn.Linear) else 1


def living(layout: Layout, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Return, of each layer's heads and channels, which have a weight in `mask` (num_prunable,): name -> (count,)."""
    found: dict[str, np.ndarray] = {}
    for e in layout.prunable:
        if e.units is not None:
            other = tuple(dim for dim in range(len(e.shape)) if dim != e.units.dim)
            kept = mask[e.slice].reshape(e.shape).any(axis=other)
            alive = np.bincount(e.units.along(kept.size), weights=kept, minlength=e.units.count) > 0
            found[e.units.of] = found.get(e.units.of, False) | alive
    return found


def narrow(module: nn.Module, units: Mapping[str, Units], base: nn.Module, kept: Mapping[str, np.ndarray]) -> None:
    """Cut units out of a network in place: of those in `kept`, name -> (count,) bool, the True stay."""
    for name, unit in units.items():
        owner, _, tensor = name.rpartition(".")
        part = module.get_submodule(owner)
        old = getattr(part, tensor)
        if unit.of in kept and old is not None:
            places = np.flatnonzero(kept[unit.of][unit.along(old.shape[unit.dim])])
            values = old.detach().index_select(unit.dim, torch.from_numpy(places))
            setattr(part, tensor, nn.Parameter(values, requires_grad=old.requires_grad))
    for _, layer, form in layers(base):
        for own in (*form.reads, form.output, form.first, form.second):
            _resize(layer.get_submodule(own))
        reader = layer.get_submodule(form.output)
        width = reader.get_parameter("weight").shape[1 - outputs(reader)]
        _tell(_attention(layer, form), width, width // _head_size(layer, form))


def _resize(part: nn.Module) -> None:
    """Let a linear layer know the size of its weight."""
    weight = part.get_parameter("weight")
    for names, dim in ((("out_features", "nf"), outputs(part)), (("in_features", "nx"), 1 - outputs(part))):
        for name in names:
            if hasattr(part, name):
                setattr(part, name, weight.shape[dim])


def _tell(attention: nn.Module, width: int, count: int) -> None:
    """Let an attention know how many heads it has, and how wide they are together."""
    for names, value in ((COUNTS, count), (WIDTHS, width)):
        for name in names:
            if hasattr(attention, name):
                setattr(attention, name, value)
