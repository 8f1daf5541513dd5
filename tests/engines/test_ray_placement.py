"""Where Ray workers go: whole workers a GPU, never a sum over GPUs."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedlth.engines.ray_placement import Share, count, share_of, shortage, taken
from fedlth.errors import StudyError
from fedlth.study.sections import Ray

TWO_GPUS = [{"CPU": 64.0, "GPU": 2.0}]


def shared(total: int | None = None, device: str = "cpu", **settings: Any) -> Share:
    return share_of(Ray(**settings), device=device, total_memory_mb=lambda: total)


@pytest.mark.parametrize(("fraction", "workers"), [(0.25, 8), (0.4, 4), (0.5, 4), (1.0, 2), (0.34, 4), (0.1, 20)])
def test_a_fraction_fits_whole_workers_on_each_gpu(fraction: float, workers: int) -> None:
    assert count(shared(num_gpus=fraction), TWO_GPUS, wanted=50) == workers
    assert count(shared(num_gpus=fraction), TWO_GPUS, wanted=1) == 1


@pytest.mark.parametrize("per_gpu", range(1, 30))
def test_ray_is_never_asked_for_more_than_fits(per_gpu: int) -> None:
    share = shared(gpu_memory_mb=1000, gpu_total_memory_mb=1000 * per_gpu)
    assert share.per_gpu == per_gpu
    # Ray rounds to ten-thousandths, and a GPU is 10000 of them.
    assert round(share.asked_gpu * 10_000) * per_gpu <= 10_000


def test_memory_is_asked_of_the_gpu_where_it_is_not_given() -> None:
    assert shared(total=24_000, gpu_memory_mb=7_000).per_gpu == 3
    assert shared(total=24_000, gpu_memory_mb=7_000, gpu_total_memory_mb=16_000).per_gpu == 2


def test_a_node_gives_what_its_scarcer_resource_allows() -> None:
    share = shared(num_gpus=0.5, num_cpus=2.0)
    nodes = [{"CPU": 4.0, "GPU": 4.0}, {"CPU": 64.0, "GPU": 1.0}, {"CPU": 64.0}]
    assert count(share, nodes, wanted=99) == 2 + 2 + 0
    assert count(shared(num_cpus=0.0), [{"CPU": 1.0}], wanted=3) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_gpus": 2.0}, "ray.num_gpus: must be at most 1"),
        ({"num_gpus": 1e-6}, "ray.num_gpus: must be 0 or at least"),
        ({"num_gpus": 0.5, "gpu_memory_mb": 10}, "not both"),
        ({"gpu_memory_mb": 10}, "ray.gpu_total_memory_mb: required"),
        ({"gpu_memory_mb": 10, "gpu_total_memory_mb": 5}, "ray.gpu_memory_mb: must be at most"),
        ({"logical_gpus": 2, "address": "host:1"}, "ray.logical_gpus: only"),
        ({"device": "cuda"}, "ray.num_gpus: must be above 0"),
        ({"device": "cuda:1", "num_gpus": 0.5}, "device: must be"),
    ],
)
def test_what_cannot_be_placed_is_said(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        shared(**settings)


def test_no_room_is_said() -> None:
    with pytest.raises(StudyError, match="the nodes have: 2 CPUs and 0 GPUs"):
        count(shared(num_gpus=0.5), [{"CPU": 2.0}], wanted=2)


def test_workers_for_which_there_is_no_place_are_said() -> None:
    """Row 42: 80 asked for where 4 fit."""
    assert shortage(shared(num_gpus=0.5), TWO_GPUS, wanted=4) == ""
    said = shortage(shared(num_gpus=0.5), TWO_GPUS, wanted=80)
    assert said == (
        "note: ray.workers: 4 work, got 80: a worker takes 1 CPUs and 0.5 of a GPU, the nodes have: 64 CPUs and 2 GPUs"
    )


@pytest.mark.parametrize(
    ("free", "said"),
    [
        ({"CPU": 62.0, "GPU": 2.0}, ""),
        ({"CPU": 62.0, "GPU": 0.5}, "1 of 4 workers fit now; .*by other jobs: 2 of 64 CPUs, 1.5 of 2 GPUs"),
        ({"CPU": 62.0}, "no room for a worker now, the wait is at most 300 s; .*: 2 of 64 CPUs, 2 of 2 GPUs"),
        ({"CPU": 0.5, "GPU": 2.0}, "no room .*: 63.5 of 64 CPUs, 0 of 2 GPUs"),
    ],
)
def test_what_others_have_taken_is_said_at_once(free: dict[str, float], said: str) -> None:
    """Row 41: all resources of the cluster are held by another job."""
    got = taken(shared(num_gpus=0.5), TWO_GPUS, [free], size=4, wait_s=300.0)
    assert bool(got) == bool(said) and re.search(said, got)
