"""Named streams: equal names give equal draws, and any difference in the name another stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlth.models.initial import torch_stream
from fedlth.rng import entropy, stream, torch_seed


def test_equal_names_give_equal_draws() -> None:
    np.testing.assert_array_equal(stream(1, "a", 2, 3).random(8), stream(1, "a", 2, 3).random(8))
    assert torch_seed(1, "a", 2, 3) == torch_seed(1, "a", 2, 3) and 0 <= torch_seed(1, "a") < 2**63


@pytest.mark.parametrize("other", [(2, "a", 2, 3), (1, "b", 2, 3), (1, "a", 3, 3), (1, "a", 2, 4), (1, "a", 2)])
def test_every_part_of_the_name_counts(other: tuple[int, str, int, int]) -> None:
    assert stream(1, "a", 2, 3).integers(2**62) != stream(*other).integers(2**62)
    assert torch_seed(1, "a", 2, 3) != torch_seed(*other)


def test_seeds_never_add_up() -> None:
    """With seed + i, seed 42 of client 1 would equal seed 43 of client 0."""
    assert entropy(42, "a", client=1) != entropy(43, "a", client=0)
    assert entropy(1, "a", round=12) != entropy(11, "a", round=2)
    names = [(s, w, r, c) for s in range(6) for w in ("a", "b", "a/1") for r in range(6) for c in range(-1, 6)]
    assert len({entropy(*n) for n in names}) == len(names)


def test_neighbours_are_not_correlated() -> None:
    draws = np.array([stream(s, "order", r, c).normal(size=2000) for s in (0, 1) for r in (0, 1) for c in (0, 1)])
    apart = np.corrcoef(draws)[np.triu_indices(8, 1)]
    assert np.abs(apart).max() < 0.12


def test_torchs_generator_is_put_back() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    with torch_stream(9):
        inside = torch.rand(2).tolist()
    assert torch.rand(2).tolist() == expected
    with torch_stream(9):
        assert torch.rand(2).tolist() == inside
