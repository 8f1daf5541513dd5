"""A network with fewer channels than its code makes: cut out of a masked one, and built again from its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlth.models.channels import CHANNEL_NORMS, TRANSPOSED
from fedlth.models.needed_channels import Layer, Weighted

WORTH = 0.8  # of a layer's multiply-adds at most: for less than a fifth, copying channels costs what it saves
TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Fit:
    """What a layer has of what its code says. `chosen`: it reads and makes some of its channels only (`Chosen`)."""

    outputs: int
    of: int
    inputs: int | None = None
    of_inputs: int | None = None
    groups: int | None = None
    chosen: bool = False

    @property
    def weights(self) -> tuple[int, int]:
        """How many inputs x outputs are left, and how many there were; of what treats channels alone, none."""
        if self.inputs is None or self.of_inputs is None:
            return 0, 0
        return self.inputs * self.outputs, self.of_inputs * self.of


class Chosen(nn.Module):
    """A layer that reads the channels `reads` of its input and makes the channels `makes`; the others are `rest`."""

    reads: Tensor
    makes: Tensor
    rest: Tensor

    def __init__(self, layer: nn.Module, reads: Tensor, makes: Tensor, rest: Tensor) -> None:
        super().__init__()
        self.layer = layer
        for name, values in (("reads", reads), ("makes", makes), ("rest", rest)):
            self.register_buffer(name, values)

    def forward(self, x: Tensor) -> Tensor:
        dim = x.dim() - 1 if isinstance(self.layer, nn.Linear) else 1
        made: Tensor = self.layer(x if len(self.reads) == x.shape[dim] else x.index_select(dim, self.reads))
        if len(self.makes) == len(self.rest):
            return made
        sizes = [len(self.rest) if d == dim else size for d, size in enumerate(made.shape)]
        whole = self.rest.view([-1 if d == dim else 1 for d in range(len(sizes))]).expand(sizes)
        return whole.index_copy(dim, self.makes, made)


def cut(module: nn.Module, layers: Mapping[str, Layer]) -> tuple[nn.Module, dict[str, Fit]]:
    """Return a smaller copy of a network with the outputs of the whole one, and what each layer keeps.

    Sums of constants are made in float64 and cast once.
    """
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    fits: dict[str, Fit] = {}
    for name, layer in layers.items():
        part: Any = module.get_submodule(name)
        inside = f"{name}." if name else ""
        if layer.weighted is not None:
            found, fits[name] = _weights(part, layer, layer.weighted, inside != "")
            if fits[name].chosen:
                for tensor in ("weight", "bias"):
                    state.pop(inside + tensor, None)
        else:
            stay = torch.from_numpy(np.flatnonzero(layer.makes))
            held = {n: getattr(part, n, None) for n in TENSORS}
            along = 1 if isinstance(part, nn.Embedding) else 0
            found = {n: t.detach().index_select(along, stay) for n, t in held.items() if t is not None}
            fits[name] = _fit(part, layer.makes)
        state |= {inside + n: t for n, t in found.items()}
    small = deepcopy(module)
    fit(small, fits, state)
    return small.eval(), fits


def _fit(part: Any, makes: np.ndarray) -> Fit:
    kept, groups = int(makes.sum()), None
    if isinstance(part, nn.GroupNorm):
        groups = part.num_groups * kept // makes.size
    return Fit(kept, makes.size, groups=groups)


def _weights(part: Any, layer: Layer, own: Weighted, named: bool) -> tuple[dict[str, Tensor], Fit]:
    """Return a convolution's or linear layer's tensors, constants folded in."""
    turned = isinstance(part, TRANSPOSED)
    weight = part.weight.detach().double()
    weight = weight.transpose(0, 1).clone() if turned else weight.clone()
    if own.merge is not None:
        gone, ratio = torch.from_numpy(own.merge.gone), torch.from_numpy(own.merge.ratio)
        weight[:, own.merge.into] += torch.tensordot(weight[:, gone], ratio, dims=([1], [0]))
    folded = weight.reshape(*weight.shape[:2], -1).sum(2) @ torch.from_numpy(own.constant)
    if own.alone:  # what stays for others alone may hold anything
        weight[:, torch.from_numpy(own.reads & ~own.asked)] = 0
    bias = folded if part.bias is None else part.bias.detach().double() + folded
    biased = part.bias is not None or bool((folded[torch.from_numpy(layer.makes)] != 0).any())
    rows, asked = layer.makes & own.rows, own.reads & own.asked
    cost, most = rows.sum() * asked.sum(), layer.makes.sum() * own.reads.sum()
    chosen = named and own.alone and not turned and bool(0 < cost <= WORTH * most)
    outputs, inputs = (rows, asked) if chosen else (layer.makes, own.reads)
    weight = weight[torch.from_numpy(outputs)][:, torch.from_numpy(inputs)]
    found = {"weight": (weight.transpose(0, 1) if turned else weight).float().contiguous()}
    if biased:
        found["bias"] = bias[torch.from_numpy(outputs)].float()
    if chosen:
        found = {f"layer.{name}": tensor for name, tensor in found.items()}
        found["reads"] = torch.from_numpy(np.flatnonzero(asked[own.reads]))
        found["makes"] = torch.from_numpy(np.flatnonzero(rows[layer.makes]))
        found["rest"] = torch.from_numpy(own.level[layer.makes]).float()
    sizes = int(outputs.sum()), layer.makes.size, int(inputs.sum()), own.reads.size
    return found, Fit(*sizes, chosen=chosen)


def fit(module: nn.Module, fits: Mapping[str, Fit], state: Mapping[str, Tensor]) -> None:
    """Give a network, as its code makes it, the tensors of `state` and the sizes of `fits`, in place.

    Raises ValueError where a tensor is of no layer, or a layer has none.
    """
    for name, own in fits.items():
        if own.chosen:
            empty = torch.zeros(0, dtype=torch.int64)
            module.set_submodule(name, Chosen(module.get_submodule(name), empty, empty, torch.zeros(0)))
    left, made = set(state), dict[nn.Parameter, nn.Parameter]()
    for name, part in module.named_modules():
        inside = f"{name}." if name else ""
        for key, old in list(part._parameters.items()):
            new = state.get(inside + key)
            if new is None and old is not None:
                raise ValueError(f"no tensor {inside + key}")
            if new is not None:
                grad = old is None or old.requires_grad
                fresh = nn.Parameter(new.clone(), requires_grad=grad)
                part._parameters[key] = fresh if old is None else made.setdefault(old, fresh)
        for key, there in list(part._buffers.items()):
            if inside + key in state and there is not None:
                part._buffers[key] = state[inside + key].to(there.dtype).clone()
    for name, part in module.named_modules(remove_duplicate=False):
        left -= {f"{name}.{key}".removeprefix(".") for key in (*part._parameters, *part._buffers)}
    if left:
        raise ValueError(f"no layer has the tensor {min(left)}")
    for name, own in fits.items():
        part = module.get_submodule(name)
        _resize(part.layer if isinstance(part, Chosen) else part, own)


def _resize(layer: nn.Module, own: Fit) -> None:
    """Let a layer know its sizes."""
    part: Any = layer  # attributes that their types say are numbers, of a file that may say otherwise
    if isinstance(layer, nn.Linear):
        part.in_features, part.out_features = own.inputs, own.outputs
    elif isinstance(layer, nn.Embedding):
        part.embedding_dim = own.outputs
    elif isinstance(layer, CHANNEL_NORMS):
        part.num_features = own.outputs
    elif isinstance(layer, nn.GroupNorm):
        part.num_channels, part.num_groups = own.outputs, own.groups
    elif own.inputs is None:  # each channel alone
        part.in_channels = part.out_channels = part.groups = own.outputs
    else:
        part.in_channels, part.out_channels = own.inputs, own.outputs
