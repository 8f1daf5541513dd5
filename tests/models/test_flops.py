"""The forward cost by weight, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlth.errors import StudyError
from fedlth.models.flops import layer_flops, training_flops
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


class Layers(nn.Module):
    """Three layers, the second with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.down, self.up = nn.Linear(8, 3, bias=False), nn.Linear(3, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        out: torch.Tensor = self.head(torch.relu(self.second(x) + self.up(self.down(x))))
        return out


SIZES = {"first": 2 * 64, "second": 2 * 64, "down": 2 * 24, "up": 2 * 24, "head": 2 * 16}


@pytest.mark.parametrize(
    ("trains", "passes"),
    [
        (["head.weight", "head.bias"], {"head": 3}),
        (["head.bias"], {}),
        (["first.bias"], dict.fromkeys(("second", "down", "up", "head"), 2)),
        (["first.bias", "second.bias", "head.bias"], dict.fromkeys(("second", "down", "up", "head"), 2)),
        (["second.bias"], {"head": 2}),
        (["down.weight", "up.weight"], {"down": 3, "up": 3, "head": 2}),
        (["down.weight", "up.weight", "head.weight"], {"down": 3, "up": 3, "head": 3}),
        (["first.weight"], {"first": 3, "second": 2, "down": 2, "up": 2, "head": 2}),
        ([], {}),
    ],
)
def test_a_step_counts_the_gradients_that_are_taken(trains: list[str], passes: dict[str, int]) -> None:
    """By hand: 1 forward, 1 more where something before it trains, 3 for what trains itself."""
    module, x = Layers(), torch.zeros(3, 8)
    found, total = training_flops(module, x, layer_flops(module, x), trains)
    wanted = {f"{name}.weight": passes.get(name, 1) * size for name, size in SIZES.items()}
    assert {name: count for name, count in found.items() if count} == wanted and total == sum(wanted.values())


@pytest.mark.parametrize("module", [Layers(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
def test_a_network_that_trains_as_a_whole_costs_three_forwards(module: nn.Module) -> None:
    x = torch.zeros(2, 5, 8)
    layers, total = forward = layer_flops(module, x)
    names = [name for name, _ in module.named_parameters()]
    assert training_flops(module, x, forward, names) == ({n: 3 * c for n, c in layers.items()}, 3 * total)


def test_a_step_s_count_leaves_the_module_as_it_was() -> None:
    module, x = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), torch.ones(2, 2)
    module[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    training_flops(module, x, layer_flops(module, x), ["2.bias"])
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items()) and module.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_of_several_weights_in_a_module_one_that_trains_counts_as_before_the_others() -> None:
    module, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(2, 5, 8)
    layers = layer_flops(module, x)
    found, _ = training_flops(module, x, layers, ["self_attn.in_proj_bias"])
    assert all(found[name] == 2 * count for name, count in layers[0].items())
    found, _ = training_flops(module, x, layers, ["linear1.bias"])
    assert found["self_attn.in_proj_weight"] == layers[0]["self_attn.in_proj_weight"]
    assert found["linear1.weight"] == layers[0]["linear1.weight"]
    assert found["linear2.weight"] == 2 * layers[0]["linear2.weight"]


def test_a_layer_that_no_loss_depends_on_has_no_backward_pass() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x)
            self.unused(x)
            out: torch.Tensor = self.head(x)
            return out

    module, x = Beside(), torch.zeros(2, 4)
    found, total = training_flops(module, x, layer_flops(module, x), ["body.weight", "body.bias"])
    assert (found["body.weight"], found["unused.weight"], found["head.weight"]) == (3 * 32, 32, 2 * 16)
    assert total == 3 * 32 + 32 + 2 * 16 and all(p.grad is None for p in module.parameters())
