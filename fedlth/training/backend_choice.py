"""Which backend trains a network the fastest on this processor: measured, a step of each, dense and inside tickets.

What is tried: torch as it is written, torch rearranged where that changes anything, and the kernel, dense and inside
random tickets of the study's densities, with crossovers of its layers that are measured first. Which of them a training
of the run then goes to is decided by what its ticket leaves of the dense multiply-adds. Where the kernel cannot run the
network, torch is tried inside tickets too, as it is and with layers that go over their kept weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth.data.examples import Examples
from fedlth.data.tensors import inputs
from fedlth.kernel import kernel
from fedlth.kernel.crossover import lists_below, ticket, timed
from fedlth.kernel.graph import LANES
from fedlth.kernel.step_time import TRAINING_STEPS, StepTimer, in_turns
from fedlth.kernel.table import LayerTable
from fedlth.models.initial import torch_stream
from fedlth.rng import stream
from fedlth.study.compute_section import Crossovers
from fedlth.training import torch_backend
from fedlth.training.answer_file import kept_answer
from fedlth.training.budget import Budget
from fedlth.training.flat_model import FlatModel
from fedlth.training.kept_crossover import kept_below
from fedlth.training.kept_layers import exchangeable
from fedlth.training.measured_table import by_name
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingRequest, drawn_request
from fedlth.training.task import Task
from fedlth.training.tuned import tune

REFERENCE, TUNED, SPARSE = "reference", "tuned", "sparse"
BETTER = 0.98  # of another's time at most, or what was done without a measurement is done still
LISTS_BETTER = 0.93  # of lists in torch, which each training makes first: that is in no step's time
_LAYERS_S, _STEPS_S = 1.0, 1.5  # CPU seconds for the layers' crossovers and for the backends, one turn at least
_STEP_S, _FEW = 0.25, 16  # CPU seconds of a step in torch at most, where so many examples take no longer

Key = tuple[str, float, int]  # a backend, the ticket's density, and of the kernel how many examples go side by side


@dataclass(frozen=True)
class Choice:
    """What trains a study; crossovers where that is the kernel. `times` are what was measured, as a user reads it."""

    compute: str
    crossovers: Crossovers | None
    times: str


def choose(task: Task, *, in_kernel: bool, lists: bool, batch_size: int, densities: Sequence[float]) -> Choice:
    """Return the fastest backend for a task's network, as this machine has measured it before, or does now.

    in_kernel: the kernel can train it. lists: its layers may go over their kept weights alone in torch. batch_size:
    examples of a step. densities: those of the study's tickets, ascending.
    """
    table = task.table if in_kernel else None
    assert not isinstance(table, str)
    asked = table or (str(task.model.module()), task.dataset.input_shape)
    return kept_answer(
        repr((asked, batch_size, [*densities] if in_kernel or lists else [])), _read,
        lambda: _measured(task, table, lists, batch_size, densities), _written,
    )  # fmt: skip


def _read(made: Any) -> Choice:
    crossovers = made["crossovers"]
    return Choice(made["compute"], None if crossovers is None else Crossovers(**crossovers), made["times"])


def _written(choice: Choice) -> dict[str, Any]:
    crossovers = None if choice.crossovers is None else choice.crossovers.model_dump(mode="json")
    return {"compute": choice.compute, "crossovers": crossovers, "times": choice.times}


def _measured(task: Task, table: LayerTable | None, lists: bool, batch_size: int, densities: Sequence[float]) -> Choice:
    with torch_stream(0):
        task.probe()  # says what is wrong with the model or the loss
        models = _in_torch(task)
        lists = lists and bool(densities) and bool(exchangeable(task.flat_model.module, task.layout))
        if table is None and len(models) == 1 and not lists:
            return Choice(TUNED, None, "nothing of the network in torch can be rearranged")
        if table is not None:
            kernel.warm()
        examples = _examples(task, models[REFERENCE], batch_size)
        runs = {(name, 1.0, 0): _timer(task, model, examples) for name, model in models.items()}
        if table is not None:
            table = table.with_lists_below(lists_below(table, examples, _LAYERS_S))
            last = list(models)[-1]
            if densities:
                runs[last, densities[0], 0] = _timer(task, models[last], examples, ticket(table, densities[0]))
            runs |= _in_kernel(table, task.theta_0.floats, examples, densities)
        below = dict[str, float]()
        if lists:
            name, model = list(models.items())[-1]
            below = kept_below(model, _batch(task, examples), _LAYERS_S)
            most = max((torch_backend.FEW, *below.values()))  # from there on both trainings are the same
            for density in (one for one in densities if one < most):
                mask = stream(0, "ticket").random(task.layout.num_prunable) < density
                runs[name, density, 0] = _timer(task, model, examples, mask)
                runs[SPARSE, density, 0] = _timer(task, model, examples, mask, below)
        cost = in_turns(runs, _STEPS_S)
    if table is None:
        return _with_lists(cost, below, _told(cost, examples))
    shares = {density: kernel.share(table, ticket(table, density)) for density in densities}
    compute, above, narrow = decided(cost, shares)
    crossovers = Crossovers(
        torch=_form(cost), torch_above=above, narrow_below=narrow, sparse_below=by_name(table, task.layout)
    )  # fmt: skip
    return Choice(compute, crossovers if compute == SPARSE else None, _told(cost, examples))


def _in_torch(task: Task) -> dict[str, FlatModel]:
    """Return the network as written and, where that is another, rearranged."""
    module, few = task.model.module(), inputs(task.dataset, task.few[:3], train=True)
    tuned = tune(module, few.x)
    found = {REFERENCE: task.flat_model}
    if not tuned.note.startswith("as written"):
        found[TUNED] = FlatModel(module, task.layout, "cpu", None, tuned, task.loss)
    return found


def _in_kernel(
    table: LayerTable, floats: np.ndarray, examples: int, densities: Sequence[float]
) -> dict[Key, StepTimer]:
    found = {(SPARSE, 1.0, 0): timed(table, floats, 1.0, examples)}
    sides = {16: 2.0} if kernel.large(table) or examples <= 16 else {16: 2.0, LANES: 0.0}
    for density in densities:
        for side, below in sides.items():
            found[SPARSE, density, side] = timed(replace(table, narrow_below=below), floats, density, examples)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class TimedRequest(TrainingRequest):
    """A training that tells when it begins a step, which torch says by asking what the step is shown."""

    begin: Callable[[], None]

    @property
    def draws_examples(self) -> bool:
        return True

    def shown(self, step: int, batch: Any) -> Any:
        self.begin()
        return batch


def _batch(task: Task, examples: int) -> Examples:
    """Return so many of the examples that a network is tried on, as one batch."""
    return inputs(task.dataset, np.resize(task.few, examples), train=True).batch(slice(None))


def _timer(
    task: Task,
    model: FlatModel,
    examples: int,
    mask: np.ndarray | None = None,
    below: Mapping[str, float] | None = None,
) -> StepTimer:
    """Return the timer of a plain training in torch: what else a recipe may have costs as much in either form.

    below: of the layers that go over their kept weights, the density below which they do.
    """
    recipe = TrainingRecipe(budget=Budget(steps=TRAINING_STEPS + 1), batch_size=examples, lr=1e-6, loss=task.loss)
    data = inputs(task.dataset, np.resize(task.few, examples), train=True)
    drawn = drawn_request(task.theta_0, data, recipe, order=stream(0, "backends"), torch_seed=0, active=mask)

    def run(step: Callable[[], None]) -> object:
        model.kept = below
        try:
            return torch_backend.train(model, TimedRequest(**vars(drawn), begin=step))
        finally:
            model.kept = None

    return StepTimer(run)


def _examples(task: Task, model: FlatModel, batch_size: int) -> int:
    """Return how many examples a step is tried with: fewer than a batch where it would take long.

    Then a multiple of 16, so that the kernel has no lane empty that it would not have.
    """
    if batch_size <= _FEW:
        return batch_size
    return min(batch_size, _FEW * max(1, int(_STEP_S / _timer(task, model, _FEW)())))


def decided(cost: Mapping[Key, float], shares: Mapping[float, float]) -> tuple[str, float | None, float]:
    """Return the backend, the share of the multiply-adds from which on torch is faster, and `narrow_below`.

    cost: CPU seconds of a step. shares: what a ticket of a density leaves of the dense multiply-adds, by density.
    """
    form, narrow_below, points = _form(cost), 0.0, list[tuple[float, float, float]]()
    dense = cost.get((form, 1.0, 0), cost[REFERENCE, 1.0, 0])
    masked = next((key for key in cost if key[0] != SPARSE and key[1] < 1), None)
    masks = 0.0 if masked is None else max(0.0, cost[masked] - cost[masked[0], 1.0, 0])
    for density, above in zip(sorted(shares), [*sorted(shares)[1:], 1.0], strict=True):
        narrow, wide = (cost.get((SPARSE, density, side), math.inf) for side in (16, LANES))
        if wide >= BETTER * narrow:
            narrow_below = (density + above) / 2
        points.append((shares[density], min(narrow, wide), dense + masks))
    points.append((1.0, cost[SPARSE, 1.0, 0], dense))
    won = [at for at, (_, ours, torch) in enumerate(points) if torch >= BETTER * ours]
    if not won:
        return form, None, narrow_below
    if won[-1] == len(points) - 1:
        return SPARSE, None, narrow_below
    (low, *ours), (high, *theirs) = points[won[-1]], points[won[-1] + 1]
    ahead, behind = max(0.0, ours[1] - ours[0]), theirs[0] - theirs[1]
    met = low + (high - low) * ahead / (ahead + behind)
    return SPARSE, round(min(1.0, max(met, low + 0.01)), 2), round(narrow_below, 2)


def _with_lists(cost: Mapping[Key, float], below: Mapping[str, float], times: str) -> Choice:
    """Return torch's faster form, with layers over their kept weights where that is faster at any density."""
    form = _form(cost)
    both = [(one, cost[SPARSE, key[1], 0]) for key, one in cost.items() if key[0] != SPARSE and key[1] < 1 and below]
    if not any(ours <= LISTS_BETTER * torch for torch, ours in both):
        return Choice(form, None, times)
    return Choice(SPARSE, Crossovers(torch=form, torch_above=None, narrow_below=0.0, sparse_below=dict(below)), times)


def _form(cost: Mapping[Key, float]) -> Any:
    """Return the faster of torch's two forms."""
    tuned = cost.get((TUNED, 1.0, 0), 0.0)
    return REFERENCE if cost[REFERENCE, 1.0, 0] < BETTER * tuned else TUNED


def _told(cost: Mapping[Key, float], examples: int) -> str:
    """Return what was measured in one line: of each backend a dense step, then those inside tickets."""
    found = dict[str, dict[float, float]]()
    for (backend, density, _), seconds in cost.items():
        times = found.setdefault(backend, {})
        times[density] = min(seconds, times.get(density, math.inf))
    parts = []
    for backend, times in found.items():
        inside = ", ".join(f"{1e3 * times[d]:.3g} at density {d:g}" for d in sorted(times, reverse=True) if d < 1)
        dense = f" {1e3 * times[1.0]:.3g}" if 1.0 in times else ""
        parts.append(f"{backend}{dense}{f' ({inside})' if inside else ''}")
    return f"CPU ms a step of {examples} examples: {', '.join(parts)}"
