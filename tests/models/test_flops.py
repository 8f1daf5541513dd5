"""The forward cost by weight, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlth.errors import StudyError
from fedlth.models.flops import layer_flops
from fedlth.models.registry import build


def test_lenet5_by_hand() -> None:
    module = build("lenet5", num_classes=10, input_shape=(1, 28, 28), options={})
    flops, total = layer_flops(module, torch.zeros(3, 1, 28, 28))
    assert {name: count for name, count in flops.items() if count} == {
        "conv1.weight": 2 * 25 * 6 * 28 * 28,
        "conv2.weight": 2 * 25 * 6 * 16 * 10 * 10,
        "fc1.weight": 2 * 400 * 120,
        "fc2.weight": 2 * 120 * 84,
        "fc3.weight": 2 * 84 * 10,
    }
    assert total == sum(flops.values())
    assert set(flops) == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    module = kind(3, 4, num_layers=2, batch_first=True)
    flops, total = layer_flops(module, torch.zeros(2, 5, 3))
    gates = 4 if kind is nn.LSTM else 3
    assert flops["weight_ih_l0"] == 2 * 5 * gates * 4 * 3
    assert flops["weight_hh_l1"] == 2 * 5 * gates * 4 * 4
    assert total == sum(flops.values()) and flops["bias_ih_l0"] == 0


def test_attention_counts_its_projections() -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    flops, _ = layer_flops(module, torch.zeros(2, 5, 8))
    assert flops["self_attn.in_proj_weight"] == 2 * 5 * 3 * 64
    assert flops["self_attn.out_proj.weight"] == 2 * 5 * 64


def test_shared_tied_and_bare_weights_collect_their_uses() -> None:
    layer = nn.Linear(4, 4)
    assert layer_flops(nn.Sequential(layer, layer), torch.zeros(2, 4)) == ({"0.bias": 0, "0.weight": 64}, 64)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.bare = nn.Parameter(torch.zeros(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(x) @ self.bare
            return out

    assert layer_flops(Bare(), torch.zeros(2, 4))[0] == {"bare": 48, "inner.bias": 0, "inner.weight": 32}


def test_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3).eval(), nn.Dropout(), nn.Linear(3, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random = torch.get_rng_state()
    layer_flops(module, torch.ones(2, 2))
    assert [part.training for part in module] == [True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_batch_that_does_not_fit_is_named() -> None:
    with pytest.raises(StudyError, match=r"model: the forward pass fails on a batch \(2, 5\) torch.float32"):
        layer_flops(nn.Linear(4, 4), torch.zeros(2, 5))
