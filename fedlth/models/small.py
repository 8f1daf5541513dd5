"""A transformer that has lost heads and channels, back from the folder that `save_pretrained` wrote."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from fedlth.data.pretrained import config_in
from fedlth.data.ragged import Shape
from fedlth.errors import StudyError
from fedlth.models.hf import hf
from fedlth.models.initial import torch_stream
from fedlth.models.transformer import SMALL, Transformer


def load_smaller(place: Path) -> Transformer:
    """Return a transformer that left as a smaller network, in evaluation mode, on the CPU.

    Raises StudyError where the folder holds no such network, or other tensors than its config.json says.
    """
    from safetensors.torch import load_file

    config = config_in("load_small", place)
    told: dict[str, Any] | None = config.pop(SMALL, None)
    if told is None:
        raise StudyError(f"{place}: must be a folder of `tickets export --to small`, got a config.json without {SMALL}")
    shape: Shape = {"input_ids": (1,), "attention_mask": (1,)}
    with torch_stream(0):  # the caller's generator stays as it is
        module = hf(told["outputs"], shape, config=config, task=told["task"], pooling=told["pooling"])
    assert isinstance(module, Transformer)
    units, left = module.counts, told["units"]
    if units.keys() != left.keys() or any(not 0 < left[of] <= units[of] for of in units):
        raise StudyError(f"{place}: {SMALL} must have units of {', '.join(units)}, got {left}")
    module.narrow({of: np.arange(count) < left[of] for of, count in units.items()})
    module.source = place.resolve()
    try:
        found = load_file(place / "model.safetensors")
        lacking = set(module.load_state_dict(found, strict=False).missing_keys)
        unknown = found.keys() - module.state_dict().keys()
    except Exception as error:  # the file system's, safetensors' own, and torch's of a wrong shape
        raise StudyError(f"{place}: model.safetensors does not fit config.json: {error}") from error
    there = {tensor.data_ptr() for name, tensor in module.state_dict().items() if name in found}
    lacking = {name for name in lacking if module.state_dict()[name].data_ptr() not in there}  # a tied tensor is there
    if lacking or unknown:
        raise StudyError(f"{place}: model.safetensors must hold {sorted(lacking)}, and not {sorted(unknown)}")
    return module.eval()


def smaller(module: Transformer) -> Transformer:
    """Return a copy without the heads and channels whose weights are all zero, of each kind one a layer at least."""
    alive: dict[str, np.ndarray] = {}
    tensors = dict(module.named_parameters())
    for name, unit in module.units().items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.dim() > 1:
            kept = (tensor.detach() != 0).any(dim=1 - unit.dim).numpy()
            here = np.bincount(unit.along(kept.size), weights=kept, minlength=unit.count) > 0
            alive[unit.of] = alive.get(unit.of, np.zeros(unit.count, bool)) | here
    for kept in alive.values():
        kept[0] |= not kept.any()
    small = deepcopy(module)
    small.narrow(alive)
    return small
