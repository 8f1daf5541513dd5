"""How a network is called on its inputs and what counts as its output: the one place that decides both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from fedlth.data.examples import ASKED, Inputs


def call(module: nn.Module, x: Inputs) -> Tensor:
    """Return a module's outputs (N, ...) on inputs.

    A tensor is the forward's only argument. A mapping is given by keyword where the signature takes its names, as
    Hugging Face models do, otherwise as one argument; ASKED only to a forward that names it, which may then return the
    outputs at these positions alone, (positions asked for, C). What comes back is a tensor, something with `logits`, as
    an attribute or under that name, or a tuple or list that begins with a tensor; TypeError otherwise.
    """
    args, keywords = _arguments(module, x)
    return _outputs(module(*args, **keywords))


def call_with(module: nn.Module, state: Mapping[str, Tensor], x: Inputs) -> Tensor:
    """Return what `call` would, with the tensors of `state` in place of the module's own."""
    args, keywords = _arguments(module, x)
    return _outputs(functional_call(module, dict(state), args, keywords))


def _arguments(module: nn.Module, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, dict) and ASKED in x and ASKED not in _named(type(module).forward):
        x = {name: tensor for name, tensor in x.items() if name != ASKED}
    if isinstance(x, dict) and _takes(type(module).forward, tuple(x)):
        return (), x
    return (x,), {}


@lru_cache(maxsize=64)
def _named(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


@lru_cache(maxsize=64)
def _takes(forward: Callable[..., Any], names: tuple[str, ...]) -> bool:
    """Say whether a module's forward can be called with these names, and needs no others."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    more = any(p.kind is p.VAR_KEYWORD for p in parameters)
    needed = {p.name for p in named.values() if p.default is p.empty}
    return needed <= set(names) and (more or set(names) <= set(named))


def _outputs(found: Any) -> Tensor:
    if isinstance(found, Tensor):
        return found
    if isinstance(found, Mapping) and isinstance(found.get("logits"), Tensor):
        return found["logits"]  # type: ignore[no-any-return]
    if isinstance(getattr(found, "logits", None), Tensor):
        return found.logits  # type: ignore[no-any-return]
    if isinstance(found, tuple | list) and found and isinstance(found[0], Tensor):
        return found[0]
    raise TypeError(
        f"must return a tensor, something with logits, or a tuple that begins with a tensor, got {_kind(found)}"
    )


def _kind(found: object) -> str:
    return (
        f"{type(found).__name__} with {', '.join(map(str, found))}"
        if isinstance(found, Mapping)
        else type(found).__name__
    )
