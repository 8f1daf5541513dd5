"""What `compute: auto` stands for: the fastest backend here, by measurement, and why."""

from __future__ import annotations

from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.kernel import kernel
from fedlth.kernel.tile_variable import misnamed
from fedlth.study.schema import Study
from fedlth.training import kernel_backend
from fedlth.training.backend_choice import Choice, choose
from fedlth.training.study_recipe import recipes


def with_backend(experiment: Experiment) -> tuple[Study, list[str]]:
    """Return the study with `compute: auto` decided, and a note that says what was decided and why."""
    study, task = experiment.study, experiment.task
    if study.compute in ("sparse", "auto") and (why := misnamed()):
        raise StudyError(why)  # with auto too: a slip must not choose another backend
    if study.compute != "auto":
        return study, []
    if task.device != "cpu":
        made = study.model_copy(update={"compute": "tuned", "crossovers": None})
        return made, [f"compute: tuned, because the kernel cannot run: the device is {task.device}"]
    tried = recipes(study, task.dataset.num_classes, task.dataset.targets)
    lacking = [kernel_backend.lacks(recipe) for recipe in tried]
    why = next((f"the kernel cannot run: {one.table}" for one in task.each if isinstance(one.table, str)), "")
    if not why and all(lacking):
        why = f"the kernel has no {' and '.join(sorted(set(lacking)))}"
    recipe = next((recipe for recipe, lacks in zip(tried, lacking, strict=True) if not lacks), tried[0])
    largest = max(len(client.train) for client in task.splits.clients)
    targets = study.finder.densities
    lists = not kernel.available() and all(isinstance(one.table, str) for one in task.each)
    choice = choose(
        task.each[0], in_kernel=not why, lists=lists, batch_size=min(recipe.batch_size, largest),
        densities=sorted({targets[0], targets[len(targets) // 2], targets[-1]} - {1.0}),
    )  # fmt: skip
    made = study.model_copy(update={"compute": choice.compute, "crossovers": choice.crossovers})
    return made, [f"compute: {choice.compute}, {_reason(choice, why)}; {choice.times}"]


def _reason(choice: Choice, why: str) -> str:
    if why and choice.compute == "sparse":
        return f"because {why}, and its layers are faster here over a ticket's kept weights alone"
    if why:
        return f"because {why}"
    if choice.crossovers is None:
        return "which is faster here than the kernel"
    if choice.crossovers.torch_above is None:
        return "the kernel is the fastest here"
    above, form = choice.crossovers.torch_above, choice.crossovers.torch
    return f"the kernel is the fastest here below {above:g} of the dense multiply-adds, torch ({form}) from there on"
