"""Layers whose weight has its inputs first: what leads into an output, held against what its outputs depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlth.models.layout import layout_of
from fedlth.tickets.granularity import Block, Channel, Row
from fedlth.tickets.learned import frozen_values
from fedlth.tickets.scope import NOfM


class Conv1D(nn.Module):
    """GPT-2's linear layer, by the name that transformers gives it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (6,)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), (4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, padding=1), (4, 5, 5)),
    "transposed, as wide": (nn.ConvTranspose1d(4, 4, 3), (4, 5)),
    "transposed, in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
    "Conv1D": (Conv1D(6, 4), (6,)),
}


def dependent(layer: nn.Module, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return which output units and which inputs each weight ties, (weights, outputs) and (weights, inputs) bool."""
    weight = dict(layer.named_parameters())["weight"]
    x = torch.rand(1, *shape, requires_grad=True)
    y = layer(x)[0].reshape(layer(x).shape[1], -1).sum(1)
    outputs = torch.stack([torch.autograd.grad(one, weight, retain_graph=True)[0].reshape(-1) != 0 for one in y], 1)
    inputs = []
    for i in range(shape[0]):
        alone = torch.zeros(1, *shape)
        alone[:, i] = 1.0
        inputs.append(torch.autograd.grad(layer(alone).sum(), weight)[0].reshape(-1) != 0)
    return outputs.numpy(), torch.stack(inputs, 1).numpy()


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_are_outputs_and_channels_are_inputs(kind: str) -> None:
    layer, shape = LAYERS[kind]
    layout = layout_of(layer, ["weight"])
    (e,) = layout.prunable
    outputs, inputs = dependent(layer, shape)
    assert (outputs.sum(1) == 1).all() and (inputs.sum(1) == 1).all()
    np.testing.assert_array_equal(Row().groups(layout).of, outputs.argmax(1))
    np.testing.assert_array_equal(Channel().groups(layout).of, inputs.argmax(1))
    assert (e.outputs, e.fan_in) == (outputs.shape[1], outputs[:, 0].sum())
    assert [rows.size for rows in layout.rows.floats] == [e.outputs]


@pytest.mark.parametrize("kind", LAYERS)
def test_there_and_back(kind: str) -> None:
    (e,) = layout_of(LAYERS[kind][0], ["weight"]).prunable
    values = torch.arange(e.size)
    matrix = e.by_output(values)
    assert matrix.shape == (e.outputs, e.fan_in) and torch.equal(e.as_stored(matrix), values)
    np.testing.assert_array_equal(e.by_output(values.numpy()), matrix.numpy())


def test_blocks_and_runs_lie_as_in_the_same_linear_layer() -> None:
    linear, turned = layout_of(nn.Linear(8, 6), ["weight"]), layout_of(Conv1D(8, 6), ["weight"])
    score = np.random.default_rng(0).random((6, 8))
    blocks = [Block(2, 3).groups(layout).of for layout in (linear, turned)]
    np.testing.assert_array_equal(blocks[0].reshape(6, 8), blocks[1].reshape(8, 6).T)
    alive = np.ones(48, bool)
    wanted = NOfM(4)(score.reshape(-1), alive, linear, 0.5).reshape(6, 8)
    assert (wanted.reshape(6, 2, 4).sum(2) == 2).all()
    np.testing.assert_array_equal(NOfM(4)(score.T.reshape(-1), alive, turned, 0.5).reshape(8, 6).T, wanted)


@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_values_have_the_scale_of_the_fan_in(kind: str) -> None:
    layer, shape = LAYERS[kind]
    layout = layout_of(layer, ["weight"])
    outputs, _ = dependent(layer, shape)
    init = np.random.default_rng(0).normal(size=layout.num_prunable).astype(np.float32)
    signed = frozen_values("signed_constant", init, np.ones(init.size, bool), layout)
    np.testing.assert_allclose(np.abs(signed), np.sqrt(2 / outputs[:, 0].sum()), rtol=1e-6)
