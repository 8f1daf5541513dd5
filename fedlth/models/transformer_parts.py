"""Which parts of a transformer train, adapters by peft among them, and its tensors without the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fedlth.data.factory import told
from fedlth.data.pretrained import EXTRA
from fedlth.errors import StudyError, require, wrong
from fedlth.study.parts import is_number

PLACE = "model.options"
EMBEDDINGS = "embeddings"
TRAINS = ("all", "head", "bitfit")
LORA = {"rank": 8, "alpha": 16.0, "targets": None, "dropout": 0.0}
QUERIES_AND_VALUES = ("query", "value", "q_lin", "v_lin", "q_proj", "v_proj", "c_attn", "query_key_value")
INSIDE = ".base_layer."  # where peft puts the layer that it adapts


def linear(part: nn.Module) -> bool:
    """Say whether a module is a linear layer; GPT-2's Conv1D is one, whose weight is transposed."""
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def choose(
    module: nn.Module, base: nn.Module, trains: str | Mapping[str, Any], frozen: Sequence[str], *, pools: bool
) -> None:
    """Let training change the parts of a network that `trains` names; all else of its encoder `base` is frozen.

    pools: whether the outputs depend on the encoder's own pooler.
    """
    lora = isinstance(trains, Mapping) and set(trains) == {"lora"} and (trains["lora"] or {})
    if not isinstance(lora, Mapping) and trains not in TRAINS:
        raise wrong(f"{PLACE}.trains", f"{', '.join(TRAINS)} or {{lora: {{{', '.join(LORA)}}}}}", trains)
    if isinstance(lora, Mapping):
        _adapt(base, lora)
        return
    for name, tensor in base.named_parameters():
        tensor.requires_grad_(trains == "all" or (trains == "bitfit" and name.endswith(".bias")))
        if name.startswith("pooler.") and not pools:
            tensor.requires_grad_(False)
    if trains == "all":
        _freeze(module, base, frozen)


def _freeze(module: nn.Module, base: nn.Module, frozen: Sequence[str]) -> None:
    if not isinstance(frozen, list | tuple) or not all(isinstance(one, str) for one in frozen):
        raise wrong(f"{PLACE}.frozen", "a list of embeddings and globs of names", frozen)
    for one in frozen:
        if one == EMBEDDINGS:
            found = [part.weight for part in base.modules() if isinstance(part, nn.Embedding)]
        else:
            found = [tensor for name, tensor in module.named_parameters() if fnmatchcase(name, one)]
        if not found:
            known = ", ".join(list(dict(module.named_parameters()))[:3])
            raise wrong(f"{PLACE}.frozen", f"{EMBEDDINGS} or globs of names such as {known}", one)
        for tensor in found:
            tensor.requires_grad_(False)


def _adapt(base: nn.Module, given: Mapping[str, Any]) -> None:
    """Put low-rank adapters beside linear layers; peft freezes everything else of the encoder."""
    place = f"{PLACE}.trains.lora"
    if not given.keys() <= LORA.keys():
        raise wrong(place, f"any of {', '.join(LORA)}", dict(given))
    own = {**LORA, **given}
    for name, least in (("rank", 1), ("alpha", 0), ("dropout", 0)):
        value = own[name]
        if not is_number(value) or value < least or (name == "rank" and not isinstance(value, int)):
            raise wrong(
                f"{place}.{name}", f"{'a whole number' if name == 'rank' else 'a number'} of at least {least}", value
            )
    layers = {name.rpartition(".")[2] for name, part in base.named_modules() if linear(part)}
    targets = [name for name in QUERIES_AND_VALUES if name in layers] if own["targets"] is None else own["targets"]
    if not isinstance(targets, list | tuple) or not targets or not layers.issuperset(targets):
        raise wrong(f"{place}.targets", f"a list of {', '.join(sorted(layers))}", own["targets"])
    require("model.options.trains: lora", "peft", extra=EXTRA)
    with torch.random.fork_rng(devices=[]):
        peft: Any = import_module("peft")
    try:
        settings = peft.LoraConfig(
            r=own["rank"], lora_alpha=own["alpha"], target_modules=list(targets), lora_dropout=own["dropout"],
            fan_in_fan_out=any(type(part).__name__ == "Conv1D" for part in base.modules()),
        )  # fmt: skip
        peft.inject_adapter_in_model(settings, base)
    except Exception as error:  # peft's own, of every kind
        raise StudyError(f"{place}: {told(error)}") from error


def merged(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a state dict without adapters: what they add is in the weights that they adapt."""
    adapted = {name: part for name, part in module.named_modules() if hasattr(part, "get_delta_weight")}
    found: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if ".lora_" in name:
            continue
        owner, inside, own = name.rpartition(INSIDE)
        if inside and own == "weight":
            delta: Tensor = adapted[owner].get_delta_weight("default")
            tensor = tensor + delta.detach()
        found[name.replace(INSIDE, ".")] = tensor
    return found
