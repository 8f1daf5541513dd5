"""Which tensors of a model are prunable: a default that is safe, and patterns that say it outright."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from fedlth.errors import StudyError

FROZEN = "@frozen"  # among patterns: of what is prunable by default, the weights that nothing trains
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def prunable_names(module: nn.Module, patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Return the sorted names of the prunable parameters; a tied tensor goes by its smallest name.

    patterns: globs over parameter names (`conv*.weight`), which replace the default; `!glob` takes what it matches from
    those before it, or from the default where it is the first. None is the default: the weights of convolutions, linear
    layers, recurrent layers and attention projections, or what the module's own `prunable_weights()` yields where any
    of it trains. Frozen parameters are prunable by `FROZEN` alone, which names the default's counterpart among them;
    bias, norm and embedding only by pattern. A tensor that is tied to an embedding counts as one.
    Raises StudyError when a pattern matches no such parameter, or nothing is prunable.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    trainable = {key for key, tensor in tensors.items() if tensor.requires_grad and tensor.numel() > 0}
    frozen = {key for key, tensor in tensors.items() if not tensor.requires_grad and tensor.numel() > 0}
    chosen = set[int]()
    if not patterns or patterns[0].startswith("!"):
        chosen = (_own(module) & trainable) or (_default(module) & trainable)
    for pattern in patterns or ():
        glob = pattern.removeprefix("!")
        hits = {key for key in trainable if any(fnmatchcase(name, glob) for name in names[key])}
        if glob == FROZEN:
            hits = (_own(module) or _default(module)) & frozen
        if not hits and glob == FROZEN:
            raise StudyError(
                f"model.prunable: {FROZEN} (what the masks of method ticket_lora are over) needs a model with weights "
                "that nothing trains, such as hf with trains: {lora: {}}, got one without"
            )
        if not hits:
            known = ", ".join(sorted(min(names[key]) for key in trainable)) or "none"
            raise StudyError(f"model.prunable: {pattern!r} matches no trainable parameter of: {known}")
        chosen = chosen | hits if glob == pattern else chosen - hits
    if not chosen:
        raise StudyError(
            "model.prunable: the model must have at least one prunable tensor (a trainable weight of a convolution, "
            "linear, recurrent or attention layer), got none; name tensors by pattern"
        )
    return tuple(sorted(min(names[key]) for key in chosen))


def _own(module: nn.Module) -> set[int]:
    """Return the identities of the weights that a module itself says are prunable."""
    weights = getattr(module, "prunable_weights", None)
    return set() if weights is None else {id(tensor) for tensor in weights()}


def _default(module: nn.Module) -> set[int]:
    """Return the identities of the weights that are prunable by default."""
    weights: set[int] = set()
    embeddings: set[int] = set()
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            embeddings.add(id(part.weight))
        weights |= {id(tensor) for tensor in _weights(part) if tensor.ndim >= 2}
    return weights - embeddings


def _weights(part: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the weights that this module itself owns, without those of its children."""
    own = dict(part.named_parameters(recurse=False))
    if isinstance(part, (*CONVOLUTIONS, nn.Linear, nn.Bilinear)):
        wanted: tuple[str, ...] = ("weight",)
    elif isinstance(part, (nn.RNNBase, nn.RNNCellBase)):
        wanted = tuple(name for name in own if name.startswith("weight_"))
    elif isinstance(part, nn.MultiheadAttention):
        wanted = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    else:
        return
    for name in wanted:
        if name in own:
            yield own[name]
