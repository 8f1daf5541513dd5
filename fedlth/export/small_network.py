"""A ticket that lost whole channels or heads, as the smaller network that it is, and `load_small`, which opens it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlth.errors import StudyError
from fedlth.export.source import Source
from fedlth.export.written import Written, of_module
from fedlth.models.channels import refused
from fedlth.models.fewer_channels import Fit, cut, fit
from fedlth.models.initial import drawn
from fedlth.models.needed_channels import needed
from fedlth.models.small import load_smaller, smaller
from fedlth.models.transformer import Transformer
from fedlth.rng import torch_seed
from fedlth.storage.store import content_digest, safetensors_bytes, write_atomic

NETWORK, WEIGHTS = "network.json", "model.safetensors"
FORMAT = "fedlth-small-1"
OPENS = "fedlth.load_small"


def load_small(folder: str | Path) -> nn.Module:
    """Return a ticket that was exported as a smaller network, in evaluation mode, on the CPU.

    It is called as `load_ticket`'s, and has the same outputs up to float32 rounding. Needs neither run nor data, but
    the code of a user's model. Raises StudyError where the folder holds no such network, or other tensors than it says.
    """
    place = Path(folder)
    return _network(place) if (place / NETWORK).is_file() else load_smaller(place)


def small(source: Source, folder: Path) -> Written:
    """Write what is left without the channels, or heads, that are pruned as a whole.

    Raises StudyError naming the place where nothing whole is pruned, or the channels cannot be followed.
    """
    if isinstance(source.module, Transformer):
        files, layers = _write_transformer(source, source.module, folder)
    else:
        files, layers = _write_network(source, folder)
    again = load_small(folder)
    plain = isinstance(again, Transformer) and again.plain
    opens = f"from_pretrained of transformers (for a `head` of ours see docs/study.md), or {OPENS}" if plain else OPENS
    return of_module(again, files, sum(tensor.numel() for tensor in again.parameters()), opens, layers)


def _write_transformer(source: Source, module: Transformer, folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    if not module.counts:
        raise StudyError(f"{source.place}: of transformers only those of a form with heads and channels leave smaller")
    made = smaller(module)
    if made.counts == module.counts:
        raise StudyError(
            f"{source.place}: no head and no channel is pruned as a whole; finder.granularity: heads_and_channels "
            "finds such tickets"
        )
    made.save_pretrained(folder)
    others = sorted(file.name for file in folder.iterdir() if file.name != WEIGHTS)
    return (WEIGHTS, *others), {of: f"{made.counts[of]} of {count}" for of, count in module.counts.items()}


def _write_network(source: Source, folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    name, x = source.model, source.batches[0]
    if isinstance(x, dict):
        raise StudyError(f"{source.place}: model {name} cannot leave smaller: its inputs are several tensors")
    with refused(name, "leave smaller"):
        layers = needed(deepcopy(source.module), source.layout, x)
    made, fits = cut(source.module, layers)
    before, after = (sum(t.numel() for t in module.parameters()) for module in (source.module, made))
    if after == before:
        raise StudyError(
            f"{source.place}: no channel is pruned as a whole; finder.granularity: row or channel finds such tickets"
        )
    try:
        with torch.inference_mode():
            made(x)
    except Exception as error:  # the user's forward may count on the sizes that its code has
        raise StudyError(
            f"{source.place}: model {name} cannot leave smaller, its forward has sizes written out: {error}"
        ) from error
    _save(folder, made, fits, source.about)
    return (WEIGHTS, NETWORK), {name: _told(own) for name, own in fits.items()}


def _told(own: Fit) -> str:
    """Say what a layer keeps: outputs, and inputs where it has any of its own."""
    outputs = f"{own.outputs} of {own.of}"
    return outputs if own.inputs is None else f"{outputs}, reads {own.inputs} of {own.of_inputs}"


def _save(folder: Path, module: nn.Module, fits: Mapping[str, Fit], about: Mapping[str, Any]) -> None:
    """Write tensors, and in network.json what the network was built by and what each layer has left."""
    arrays = {name: np.array(tensor.detach().numpy(), order="C") for name, tensor in module.state_dict().items()}
    digest = content_digest(arrays, FORMAT)
    told = {"format": FORMAT, **about, "layers": {name: asdict(own) for name, own in fits.items()}, "content": digest}
    write_atomic(folder / WEIGHTS, safetensors_bytes(arrays, {"format": "pt", "content": digest}))
    write_atomic(folder / NETWORK, (json.dumps(told, indent=1) + "\n").encode())


def _network(place: Path) -> nn.Module:
    from safetensors.numpy import load_file

    try:
        told = json.loads((place / NETWORK).read_text())
        if told["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {told['format']!r}")
        arrays = load_file(place / WEIGHTS)
        if content_digest(arrays, FORMAT) != told["content"]:
            raise ValueError(f"{WEIGHTS} has other tensors than were written")
        module = drawn(
            told["model"], num_classes=told["num_classes"], input_shape=tuple(told["input_shape"]),
            options=told["options"], seed=torch_seed(told["seed"], "theta_0"),
        )  # fmt: skip
        fits = {name: Fit(**own) for name, own in told["layers"].items()}
        fit(module, fits, {name: torch.from_numpy(array) for name, array in arrays.items()})
    except StudyError:
        raise
    except Exception as error:  # the file system's, safetensors' own, and what does not fit the model's code
        raise StudyError(f"{place}: must hold a smaller network and its model the same code, got: {error}") from error
    return module.eval()
