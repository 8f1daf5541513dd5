"""How many clients of a study train as one: what the user asked for, or what the model and the GPU's memory allow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from fedlth.data.examples import Examples
from fedlth.data.factory import told
from fedlth.errors import StudyError
from fedlth.models.initial import torch_stream
from fedlth.rng import stream
from fedlth.study.schema import Study
from fedlth.training import cohort
from fedlth.training.batch_requests import RAGGED, Evaluation, Training
from fedlth.training.budget import Budget
from fedlth.training.evaluation import evaluate
from fedlth.training.lockstep import side_by_side
from fedlth.training.optimizer import Sgd
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingRequest, TrainingResult, drawn_request
from fedlth.training.task import Task
from fedlth.training.train import train

MOST = 64
USABLE = 0.8  # of the free memory: the rest is for what the allocator cannot use and what a probe has not met
PROBED = 4
PROBE = Sgd(momentum=0.5, weight_decay=1e-3)
CLOSE = 1e-2  # of the way that the weights went: TF32 convolutions of a GPU are a few thousandths apart

Peak = Callable[[Callable[[], object]], int]


def decided(study: Study, task: Task) -> tuple[int, list[str]]:
    """Return `study.cohort` as a number, and a line that says why it is not what was asked for.

    `study` says where it runs, which `task` does not know. A model that cannot be trained together goes one by one.
    Raises StudyError on Flower, whose nodes hold one client each.
    """
    if study.cohort == 1:
        return 1, []
    if study.engine == "flower":
        if study.cohort != "auto":
            raise StudyError(f"cohort: must be 1 on engine flower, a client of which is alone, got {study.cohort}")
        return 1, ["cohort: 1, because a client on Flower is alone"]
    if study.cohort == "auto" and task.device == "cpu":
        return 1, ["cohort: 1, because on a CPU a cohort gains little or loses"]
    reason = next((found for one in task.each if (found := obstacle(one)) is not None), None)
    if reason is not None:
        return 1, [f"cohort: 1, because {reason}"]
    if study.cohort != "auto":
        return study.cohort, []
    try:
        size = min(fitting(*probed(one, _cuda_peak), free=_free_bytes(study, task.device)) for one in task.each)
    except torch.OutOfMemoryError:
        return 1, [f"cohort: 1, because {PROBED} clients do not fit into the free memory of {task.device}"]
    return size, [f"cohort: {size}, from the free memory of {task.device}"]


def obstacle(task: Task) -> str | None:
    """Return one line that says why clients cannot be trained together, or None: it was tried and came out equal.

    Two clients of different sizes, one under a mask, are trained for a few steps alone and together.
    """
    if task.study.compute == "sparse":
        return "compute: sparse trains one client at a time in its kernel"
    largest = _largest(task)
    if largest.lengths:
        return RAGGED
    size = task.study.train.batch_size
    recipe = TrainingRecipe(budget=Budget(epochs=1), batch_size=size, lr=0.01, optimizer=PROBE, loss=task.loss)
    long = min(len(largest), 2 * size + 3)
    short = max(1, min(long - 1, size + 2))
    masks = np.ones(task.layout.num_prunable, bool), np.arange(task.layout.num_prunable) % 2 == 0

    def client(count: int, mask: np.ndarray) -> tuple[TrainingResult, float]:
        data = largest.batch(slice(count))
        request = drawn_request(task.theta_0, data, recipe, order=stream(0, "probe"), torch_seed=0, active=mask)
        result = train(task.flat_model, request)
        return result, evaluate(task.flat_model, result.params, data, task.judged.all).loss

    calls = [partial(client, count, mask) for count, mask in zip((long, short), masks, strict=True)]
    with torch_stream(0), warnings.catch_warnings():
        # vmap does what it has no rule for client by client, slowly, and says so in a warning.
        warnings.filterwarnings("error", message=".*performance drop.*")
        try:
            alone = [call() for call in calls]
            together = side_by_side(calls, cohort.answer)
        except Exception as error:
            return f"its model cannot be batched over clients: {told(error)[:160]}"
    for mask, (one, loss), (other, other_loss) in zip(masks, alone, together, strict=True):
        moved = float(np.abs(one.params.floats - task.theta_0.masked(mask).floats).max())
        off = float(np.abs(one.params.floats - other.params.floats).max())
        same_ints = bool((one.params.ints == other.params.ints).all())
        if not (off <= CLOSE * moved + 1e-6 and abs(loss - other_loss) <= CLOSE * abs(loss) and same_ints):
            return (
                f"a few steps together end {off:.1g} away from the same steps alone: the model mixes the examples of a "
                "batch, counts its batches, or draws at random"
            )
    return None


def probed(task: Task, peak: Peak) -> tuple[int, int]:
    """Return the peak bytes of a cohort of one and of PROBED clients, each as large as the largest."""
    largest = _largest(task)
    size = min(len(largest), task.study.train.batch_size)
    request = TrainingRequest(
        start=task.theta_0, data=largest, batches=[[np.arange(size)] * 2], rates=[0.0, 0.0], torch_seed=0,
        recipe=TrainingRecipe(budget=Budget(epochs=1), batch_size=size, lr=0.01, optimizer=PROBE, loss=task.loss),
        active=np.zeros(task.layout.num_prunable, bool),
    )  # fmt: skip
    training = Training(task.flat_model, request)
    evaluation = Evaluation(task.flat_model, task.theta_0, largest, task.judged.all)

    def work(count: int) -> None:
        cohort.train_together([training] * count)
        cohort.evaluate_together([evaluation] * count)

    work(1)  # what is allocated once, such as the libraries' own, is no client's
    return peak(partial(work, 1)), peak(partial(work, PROBED))


def fitting(one: int, several: int, *, free: int) -> int:
    """Return the largest power of two of clients that fits, 1 to MOST.

    Bits depend on the cohort's size: powers of two, so that a little more or less free memory seldom changes them.
    """
    member = max(1, (several - one) // (PROBED - 1))
    count = (USABLE * free - (one - member)) / member
    size = 1
    while size < MOST and 2 * size <= count:
        size *= 2
    return size


def _largest(task: Task) -> Examples:
    return task.part(max(task.clients, key=lambda client: len(task.splits.clients[client].train)), "train")


def _free_bytes(study: Study, device: str) -> int:
    """Return what one worker may use of the GPU."""
    free = int(torch.cuda.mem_get_info(device)[0])
    if study.engine != "ray":
        return free
    if study.ray.gpu_memory_mb:
        return min(free, study.ray.gpu_memory_mb * 2**20)
    return int(free * min(1.0, study.ray.num_gpus or 1.0))


def _cuda_peak(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()  # workers of the same GPU are other processes
    return used
