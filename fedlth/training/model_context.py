"""One model on one data set, as the federation and the laboratory both need it: module, layout, weights, FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import nn

from fedlth.data.dataset import Dataset
from fedlth.data.examples import Examples, Inputs
from fedlth.data.ragged import Shape, named
from fedlth.data.tensors import inputs
from fedlth.errors import StudyError
from fedlth.kernel import kernel
from fedlth.kernel.graph import compile_layers
from fedlth.kernel.table import LayerTable
from fedlth.models.channels import Channels, channels_of
from fedlth.models.flops import layer_flops, training_flops
from fedlth.models.initial import brought, digest_of, drawn, fixed, redrawn, refuse, torch_stream
from fedlth.models.layout import Entry, Layout, Params, layout_of, read
from fedlth.models.prunable import prunable_names
from fedlth.rng import stream, torch_seed


class ModelSpec(Protocol):
    """A study's model section: which network, with what other options it is drawn anew, what of it is prunable."""

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def reinit_options(self) -> Mapping[str, Any]: ...
    @property
    def prunable(self) -> tuple[str, ...] | None: ...


class Init(Protocol):
    def __call__(self, params: Params, layout: Layout, rng: np.random.Generator, /) -> Params:
        """Return initial weights in place of those that the network was drawn with."""
        ...


@dataclass(frozen=True)
class AsDrawn:
    """The network's own initialisation."""

    def __call__(self, params: Params, layout: Layout, rng: np.random.Generator, /) -> Params:
        return params


def alone(params: Params, layout: Layout) -> Params:
    """Share no tensor with another network."""
    return params


def as_they_are(examples: Examples) -> Examples:
    """Change nothing of what a network is given."""
    return examples


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelContext:
    """What a model section decides before anything trains; weights are drawn from named streams of `seed`.

    `share` puts the tensors that this network has in common with another into theta_0. `shown` makes of examples what
    the network is given of them.
    """

    spec: ModelSpec
    dataset: Dataset
    seed: int
    init: Init = AsDrawn()
    share: Callable[[Params, Layout], Params] = alone
    shown: Callable[[Examples], Examples] = as_they_are

    def module(self) -> nn.Module:
        """Return a fresh module as theta_0 was drawn."""
        return initial_module(self.spec, self.dataset.num_classes, self.dataset.input_shape, self.seed)

    @cached_property
    def _built(self) -> tuple[Layout, Params]:
        module = self.module()
        _check_tokens(self.spec.name, module, self.dataset)
        layout = layout_of(module, prunable_names(module, self.spec.prunable))
        drawn = self.init(read(module, layout), layout, stream(self.seed, "theta_0"))
        return layout, self.share(drawn, layout)

    @property
    def layout(self) -> Layout:
        return self._built[0]

    @property
    def theta_0(self) -> Params:
        return self._built[1]

    def fresh(self, what: str, round: int = 0, client: int = -1) -> Params:
        """Draw other initial weights from the stream so named; what nothing trains stays as in theta_0.

        Raises StudyError where the model brings its weights: they would be theta_0's again.
        """
        refuse(self.brought, "start reinit")
        return self._drawn(what, round, client)

    @cached_property
    def brought(self) -> str:
        """Say which of theta_0's weights the model brings, which another draw gives again; "" where none."""
        return brought(self.spec.name, self.layout, self.theta_0, self._drawn("second theta_0"))

    @cached_property
    def fixed(self) -> str | None:
        """Name what both ends must have bit by bit before anything crosses; None where there is no such tensor.

        That is what nothing trains, and what the model brings. Tensors that are drawn are left out: every download
        replaces them, and their last bits may differ with the machine.
        """
        module = drawn(
            self.spec.name, num_classes=self.dataset.num_classes, input_shape=self.dataset.input_shape,
            options=self.spec.options, seed=torch_seed(self.seed, "second theta_0"),
        )  # fmt: skip
        found = fixed(self.layout, self.theta_0, redrawn(module, self.layout))
        return digest_of(found, self.theta_0) if found else None

    def _drawn(self, what: str, round: int = 0, client: int = -1) -> Params:
        options, seed = {**self.spec.options, **self.spec.reinit_options}, torch_seed(self.seed, what, round, client)
        try:
            module = drawn(
                self.spec.name, num_classes=self.dataset.num_classes, input_shape=self.dataset.input_shape,
                options=options, seed=seed,
            )  # fmt: skip
        except StudyError as error:
            raise StudyError(f"model.reinit_options: {error}") from error  # the model itself has been built without
        params = self.init(redrawn(module, self.layout), self.layout, stream(self.seed, what, round, client))
        moving = self.layout.moving
        return moving.put_into(self.theta_0, self.layout, moving.part_of(params, self.layout))

    @cached_property
    def table(self) -> LayerTable | str:
        """Return the network as the compute kernel sees it, or one line that says why the kernel cannot run it."""
        shape = self.dataset.input_shape
        if isinstance(shape, dict):
            return "the inputs are several tensors"
        if self.dataset.tokens:
            return "the inputs are tokens"
        if self.dataset.lengths_train:
            return "the data are ragged"
        if self.dataset.targets == "numbers":
            return "the targets are real numbers"
        return kernel.available() or compile_layers(self.module(), self.layout, shape)

    @cached_property
    def channels(self) -> Channels:
        """The network's channels, of which narrower sub-models are made; raise StudyError naming what has none."""
        x = inputs(self.dataset, np.arange(min(2, len(self.dataset.y_train))), train=True).batch(slice(None)).x
        if isinstance(x, dict):
            raise StudyError(f"model: {self.spec.name} cannot be sliced by width: its inputs are several tensors")
        with torch_stream(0):
            return channels_of(self.spec.name, self.module(), self.layout, x)

    @cached_property
    def flops(self) -> dict[str, int]:
        """Forward FLOPs an example of each parameter's layer, by torch's flop counter; "" is the whole model."""
        with torch_stream(0):
            layers, total = layer_flops(self.module(), self._few_x)
        return {**layers, "": total}

    @property
    def training_flops(self) -> dict[str, int]:
        """FLOPs of a training step an example, forward and backward, in the form of `flops`: what nothing trains, and
        what lies before all that trains, has less of a backward pass, or none."""
        return self._step_flops(self._trains)

    @property
    def gradient_flops(self) -> dict[str, int]:
        """The same where prunable weights have a gradient too, whatever trains: a score of masks asks for it."""
        return self._step_flops(self._trains | {e.name for e in self.layout.prunable})

    def part_flops(self, trainable: np.ndarray) -> dict[str, int]:
        """The same where only tensors train of which `trainable` (num_params,) bool has any parameter."""
        return self._step_flops(frozenset(e.name for e in self._moving if trainable[e.slice].any()))

    @property
    def _moving(self) -> list[Entry]:
        return [e for e in self.layout.entries if e.trainable]

    @cached_property
    def _trains(self) -> frozenset[str]:
        return frozenset(e.name for e in self._moving)

    @cached_property
    def _few_x(self) -> Inputs:
        few = inputs(self.dataset, np.arange(min(2, len(self.dataset.y_train))), train=True)
        return self.shown(few.batch(slice(None))).x

    @cached_property
    def _steps(self) -> dict[frozenset[str], dict[str, int]]:
        return {}

    def _step_flops(self, trains: frozenset[str]) -> dict[str, int]:
        """Return the FLOPs of a step in which the tensors so named have a gradient; counted once a set."""
        if trains not in self._steps:
            forward = {name: count for name, count in self.flops.items() if name}, self.flops[""]
            with torch_stream(0):
                layers, total = training_flops(self.module(), self._few_x, forward, trains)
            self._steps[trains] = {**layers, "": total}
        return self._steps[trains]


def initial_module(spec: ModelSpec, num_classes: int, input_shape: Shape, seed: int) -> nn.Module:
    """Build a network as theta_0 is drawn; no data are needed."""
    return drawn(
        spec.name, num_classes=num_classes, input_shape=input_shape, options=spec.options,
        seed=torch_seed(seed, "theta_0"),
    )  # fmt: skip


def _check_tokens(name: str, module: nn.Module, dataset: Dataset) -> None:
    """Refuse tokens that a network has no embedding for; one that says how many it knows has a `vocabulary`."""
    size: int | None = getattr(module, "vocabulary", None)
    parts = (named(x).get("input_ids") for x in (dataset.x_train, dataset.x_test)) if size is not None else ()
    most = max((int(tokens.max()) for tokens in parts if tokens is not None and tokens.size), default=-1)
    if size is not None and most >= size:
        raise StudyError(
            f"data.options.tokenizer: must give tokens below {size}, the vocabulary of model {name}, got {most}; name "
            "the model's own tokenizer, and for task masked_lm data.options.label: null"
        )
