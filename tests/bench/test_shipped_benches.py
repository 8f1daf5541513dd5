"""The benches that are here: a network of a row's own is the others' network but for what the row is about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlth.bench.matrix import load
from fedlth.models.lenet5 import LeNet5
from simulations.benchmark.nets import Normed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_the_network_with_norms_is_lenet5_and_the_norms(shape: tuple[int, int, int]) -> None:
    plain, normed = (made(num_classes=10, input_shape=shape) for made in (LeNet5, Normed))
    assert _count(normed) == _count(plain) + 2 * (6 + 16)
    assert normed(torch.zeros(2, *shape)).shape == plain(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("file", ["bench/fashion.yaml", "simulations/benchmark/fashion.yaml"])
def test_fedbn_has_a_rival_on_its_own_network(file: str) -> None:
    matrix = load(ROOT / file)
    studies = {cell.method: cell.study for cell in matrix.cells}
    rival, plain = studies["fedavg_ft_bn"], studies["fedavg_ft"]
    own = studies["fedbn"]
    assert (rival.model, rival.compute) == (own.model, own.compute) and rival.model != plain.model
    same = {"model": plain.model, "compute": plain.compute, "study": ""}
    assert rival.method == plain.method and rival.model_copy(update=same) == plain.model_copy(update=same)


def _count(network: torch.nn.Module) -> int:
    return sum(one.numel() for one in network.parameters())
